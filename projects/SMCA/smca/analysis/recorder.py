"""What the layers of a modulated decoder compute in a call of the model: where its queries look."""

from dataclasses import dataclass
from typing import Any, Callable, Dict, List, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smca.errors import UserError
from smca.modeling.decoder import DecoderOutput
from smca.modeling.modulation import Gaussians

__all__ = ["LayerRecord", "NoModulationError", "Recorder"]


class NoModulationError(UserError):
    """The model has no Gaussian maps."""


@dataclass
class LayerRecord:
    """What one decoder layer computed for a batch.

    Attributes:
        index, num_layers: of the decoder, counted from 0.
        gaussians: in cells of the scales.
        centre: (B, Q, 2) predicted centre (x, y) in pixels of the model's input.
        strides: L pixels (of the model's input) a cell.
        image_sizes: (B, 2) width and height of the model's input without padding.
        scale_weights: (B, Q, L), adding up to 1; None where the model does not select scales.
    """

    index: int
    num_layers: int
    gaussians: Gaussians
    centre: Tensor
    strides: List[int]
    image_sizes: Tensor
    scale_weights: Optional[Tensor] = None

    def in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tuple[Gaussians, Tensor]:
        """The maps of some queries on an image of another size.

        Args:
            queries: (K,) indices, of the first image.
            size: (h, w) that this image is resized to.

        Returns:
            Gaussians of B = 1 and these queries, and their centres (K, 2), all in pixels of the
            resized image.
        """
        centres = self.gaussians.centres[:1, queries].float()
        precisions = self.gaussians.precisions[:1, queries].float()
        scale = centres.new_tensor(size[::-1]) / self.image_sizes[0]
        cell = centres.new_tensor(self.strides)[:, None] * scale  # (L, 2) pixels a cell
        squared = cell.square()
        divisors = [squared, squared.prod(dim=1, keepdim=True)]
        divisor = torch.cat(divisors, dim=1)[:, None, : precisions.shape[-1]]
        gaussians = Gaussians(centres * cell[:, None], precisions / divisor)
        return gaussians, self.centre[0, queries].float() * scale

    def scale_shares(self, queries: Tensor) -> Tensor:
        """(K, L) scale weights of the first image; equal where the model does not select."""
        if self.scale_weights is None:
            return self.centre.new_full((len(queries), len(self.strides)), 1 / len(self.strides))
        return self.scale_weights[0, queries]


class Recorder:
    """A context in which a model's decoder keeps a record of its last call.

    Args:
        model: an `SMCA`.

    Attributes:
        decoded: what the decoder returned in the last call.

    Raises:
        NoModulationError: the model has no modulation.
    """

    def __init__(self, model: nn.Module):
        decoder: Any = getattr(model, "decoder", None)
        if not getattr(decoder, "modulated", False):
            raise NoModulationError(
                "This model has no spatial modulation (model.decoder.modulation=none, as in DETR), "
                "so there are no Gaussian maps to draw."
            )
        self.decoded: DecoderOutput
        self._decoder = decoder
        self._handles: List[RemovableHandle] = []
        self._image_sizes: Tensor
        self._layers: Dict[int, LayerRecord] = {}

    def layer(self, index: int) -> LayerRecord:
        """The record of a decoder layer, -1 is the last.

        Raises:
            UserError: the model has no such layer.
        """
        num_layers = len(self._decoder.layers)
        if not -num_layers <= index < num_layers:
            raise UserError(
                f"There is no decoder layer {index}, the model has {num_layers}: 0 to "
                f"{num_layers - 1}, or -1 for the last."
            )
        return self._layers[index % num_layers]

    def __enter__(self) -> "Recorder":
        self._handles.append(self._decoder.register_forward_pre_hook(self._keep_sizes))
        self._handles.append(self._decoder.register_forward_hook(self._keep_output))
        for index, layer in enumerate(self._decoder.layers):
            # In the order in which the layer computes them: the Gaussians begin its record.
            for module, keep in (
                (layer.modulation, self._keep_gaussians),
                (layer.scale_weight, self._keep_scale_weights),
            ):
                if module is not None:
                    self._handles.append(module.register_forward_hook(_with_index(keep, index)))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _keep_sizes(self, module: nn.Module, inputs: Tuple[Any, ...]) -> None:
        self._image_sizes = inputs[2]

    def _keep_output(
        self, module: nn.Module, inputs: Tuple[Any, ...], output: DecoderOutput
    ) -> None:
        self.decoded = output

    def _keep_gaussians(self, index: int, inputs: Tuple[Any, ...], output: Gaussians) -> None:
        _, centre, scales = inputs
        strides = [scale.stride for scale in scales]
        place = (index, len(self._decoder.layers))
        self._layers[index] = LayerRecord(*place, output, centre, strides, self._image_sizes)

    def _keep_scale_weights(self, index: int, inputs: Tuple[Any, ...], output: Tensor) -> None:
        self._layers[index].scale_weights = output.float().softmax(dim=-1)


def _with_index(keep: Callable[..., None], index: int) -> Callable[..., None]:
    """A forward hook that calls `keep` with the layer's index in place of the module."""
    return lambda module, inputs, output: keep(index, inputs, output)
