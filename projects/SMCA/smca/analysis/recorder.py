"""What the layers of a modulated decoder compute: where their queries look."""

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Dict, Iterator, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smca.errors import UserError
from smca.modeling.weight_map import HALF_CELL, WeightMap

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Detections, Predictor


class NoModulationError(UserError):
    """The model has no weight maps."""


@dataclass
class LayerRecord:
    """What one decoder layer computed for a batch.

    The methods take queries (K,), indices, and give numbers of the first image, in pixels of that
    image at `size`, (h, w).
    """

    index: int  # of the layer
    num_layers: int  # of the decoder
    weight_maps: Sequence[WeightMap]  # of each of the L scales, in its cells
    center: Tensor  # (B, Q, 2) predicted center (x, y) in pixels of the model's input
    strides: List[int]  # L pixels (of the model's input) a cell
    image_sizes: Tensor  # (B, 2) width and height of the model's input without padding
    # (B, Q, L), which add up to 1; None where the model does not select scales
    scale_weights: Optional[Tensor] = None

    def centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, 2) predicted centers (x, y), which the heads share."""
        return self.center[0, queries].float() * self._scaling(size)

    def head_centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', 2)"""
        scales = self._maps_and_cells(queries, size)
        found = [(m.centers[0].transpose(0, 1) + shift) * cell for m, shift, cell in scales]
        return torch.stack(found, dim=1)

    def maps(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', h, w) weights exp(log-weight); row i and column j are at y = i and x = j."""
        x, y = (torch.arange(n, device=self.image_sizes.device) for n in size[::-1])
        found = []
        for weight_map, shift, (width, height) in self._maps_and_cells(queries, size):
            log_weights = weight_map.log_weights(x / width - shift, y / height - shift)
            found.append(log_weights[0].transpose(0, 1).exp())
        return torch.stack(found, dim=1)

    def _maps_and_cells(
        self, queries: Tensor, size: Tuple[int, int]
    ) -> Iterator[Tuple[WeightMap, float, Tensor]]:
        """Each scale's map of these queries alone, B = 1, in float32; where in its cells it has its
        positions, in cells from their corners; and its cells' (width, height)."""
        for weight_map, stride in zip(self.weight_maps, self.strides):
            chosen = weight_map.of_queries(queries)
            values = {name: getattr(chosen, name) for name in ("centers", "spreads", "unit")}
            first = {name: v[:1].float() for name, v in values.items() if v is not None}
            shift = 0.0 if weight_map.unit is None else HALF_CELL
            yield replace(chosen, **first), shift, stride * self._scaling(size)

    def _scaling(self, size: Tuple[int, int]) -> Tensor:
        return self.image_sizes.new_tensor(size[::-1]) / self.image_sizes[0]

    def scale_shares(self, queries: Tensor) -> Tensor:
        """(K, L) scale weights of the first image; equal where the model does not select."""
        if self.scale_weights is None:
            return self.center.new_full((len(queries), len(self.strides)), 1 / len(self.strides))
        return self.scale_weights[0, queries]


class Recorder:
    """A context in which the calls of an `SMCA`'s decoder are recorded.

    Raises:
        NoModulationError: the model has no modulation.
    """

    def __init__(self, model: nn.Module):
        decoder: Any = getattr(model, "decoder", None)
        if not getattr(decoder, "modulated", False):
            raise NoModulationError(
                "This model has no spatial modulation (model.decoder.modulation=null, as in DETR), "
                "so there are no weight maps to draw."
            )
        self._decoder = decoder
        self._handles: List[RemovableHandle] = []
        self._uncompiled = contextlib.ExitStack()
        self._image_sizes: Tensor
        self._layers: Dict[int, LayerRecord] = {}

    def layer(self, index: int) -> LayerRecord:
        """The record of a decoder layer in the last call; -1 is the last layer.

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
        if self._decoder._compiled_call_impl is not None:
            # It would not call hooks that it did not have when it was compiled.
            self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        self._handles = [self._decoder.register_forward_pre_hook(self._keep_sizes)]
        for index, layer in enumerate(self._decoder.layers):
            keep: Any = functools.partial(self._keep_weight_maps, index)
            self._handles.append(layer.modulation.register_forward_hook(keep))
            if layer.scale_weight is not None:
                keep = functools.partial(self._keep_scale_weights, index)
                self._handles.append(layer.scale_weight.register_forward_hook(keep))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._uncompiled.close()

    def _keep_sizes(self, module: nn.Module, inputs: Tuple[Any, ...]) -> None:
        self._image_sizes = inputs[2]

    def _keep_weight_maps(
        self, index: int, module: nn.Module, inputs: Tuple[Any, ...], output: List[WeightMap]
    ) -> None:  # a layer computes these first
        _, center, scales, *_ = inputs
        strides = [scale.stride for scale in scales]
        place = (index, len(self._decoder.layers))
        self._layers[index] = LayerRecord(*place, output, center, strides, self._image_sizes)

    def _keep_scale_weights(
        self, index: int, module: nn.Module, inputs: Tuple[Any, ...], output: Tensor
    ) -> None:
        self._layers[index].scale_weights = output.float().softmax(dim=-1)


def detect_and_record(
    predictor: "Predictor", image: np.ndarray
) -> Tuple["Detections", Optional[Recorder]]:
    """All detections of an (h, w, 3) uint8 RGB image, best first, and the record of the call; None
    for a model without modulation."""
    try:
        recorder = Recorder(predictor.model)
    except NoModulationError:
        return predictor(image, threshold=0), None
    with recorder:
        return predictor(image, threshold=0), recorder
