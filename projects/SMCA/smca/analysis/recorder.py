"""What the layers of a modulated decoder compute in a call of the model: where its queries look."""

import contextlib
from dataclasses import dataclass, replace
from typing import Any, Callable, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from smca.errors import UserError
from smca.modeling.decoder import DecoderOutput
from smca.modeling.weight_map import HALF_CELL, WeightMap

__all__ = ["LayerRecord", "NoModulationError", "Recorder"]


class NoModulationError(UserError):
    """The model has no weight maps."""


@dataclass
class LayerRecord:
    """What one decoder layer computed for a batch.

    Attributes:
        index, num_layers: of the decoder, counted from 0.
        weight_maps: of each of the L scales, in its cells.
        center: (B, Q, 2) predicted center (x, y) in pixels of the model's input.
        strides: L pixels (of the model's input) a cell.
        image_sizes: (B, 2) width and height of the model's input without padding.
        scale_weights: (B, Q, L), adding up to 1; None where the model does not select scales.
    """

    index: int
    num_layers: int
    weight_maps: Sequence[WeightMap]
    center: Tensor
    strides: List[int]
    image_sizes: Tensor
    scale_weights: Optional[Tensor] = None

    # Of queries (K,), indices, of the first image, in pixels of that image at `size`, (h, w):

    def centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, 2) predicted centers (x, y), which the heads share."""
        scaling = self.image_sizes.new_tensor(size[::-1]) / self.image_sizes[0]
        return self.center[0, queries].float() * scaling

    def head_centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', 2)"""
        return self._stack(
            (weight_map.centers[0].transpose(0, 1) + _shift(weight_map)) * cell
            for weight_map, cell in self._maps_and_cells(queries, size)
        )

    def radii_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', 2) how far along x and y from a head's center its log-weight is -1/2: the
        standard deviation of a Gaussian."""
        return self._stack(
            radii(weight_map)[0].transpose(0, 1) * cell
            for weight_map, cell in self._maps_and_cells(queries, size)
        )

    def maps(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', h, w) weights exp(log-weight); row i and column j are at y = i and x = j."""
        x, y = (torch.arange(n, device=self.image_sizes.device) for n in size[::-1])
        return self._stack(
            self._map_at(weight_map, x / cell[0], y / cell[1])
            for weight_map, cell in self._maps_and_cells(queries, size)
        )

    @staticmethod
    def _map_at(weight_map: WeightMap, x: Tensor, y: Tensor) -> Tensor:
        """(K, H', h, w) of the first image, at positions in cells from the corner of the first."""
        shift = _shift(weight_map)
        return weight_map.log_weights(x - shift, y - shift)[0].transpose(0, 1).exp()

    def _maps_and_cells(
        self, queries: Tensor, size: Tuple[int, int]
    ) -> Iterator[Tuple[WeightMap, Tensor]]:
        """Each scale's map of these queries alone, B = 1, and its cells' (width, height)."""
        scaling = self.image_sizes.new_tensor(size[::-1]) / self.image_sizes[0]
        for weight_map, stride in zip(self.weight_maps, self.strides):
            yield _converted(weight_map.of_queries(queries), torch.float32), stride * scaling

    @staticmethod
    def _stack(scales: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(scales), dim=1)

    def scale_shares(self, queries: Tensor) -> Tensor:
        """(K, L) scale weights of the first image; equal where the model does not select."""
        if self.scale_weights is None:
            return self.center.new_full((len(queries), len(self.strides)), 1 / len(self.strides))
        return self.scale_weights[0, queries]


class Recorder:
    """A context in which a model's decoder keeps a record of its last call.

    Args:
        model: an `SMCA`.

    Attributes:
        output: what the decoder returned in the last call.

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
        self.output: DecoderOutput
        self._decoder = decoder
        self._handles: List[RemovableHandle] = []
        self._uncompiled = contextlib.ExitStack()
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
        if self._decoder._compiled_call_impl is not None:
            # It would not call hooks that it did not have when it was compiled.
            self._uncompiled.enter_context(torch.compiler.set_stance("force_eager"))
        self._handles.append(self._decoder.register_forward_pre_hook(self._keep_sizes))
        self._handles.append(self._decoder.register_forward_hook(self._keep_output))
        for index, layer in enumerate(self._decoder.layers):
            # In the order in which the layer computes them: the maps begin its record.
            for module, keep in (
                (layer.modulation, self._keep_weight_maps),
                (layer.scale_weight, self._keep_scale_weights),
            ):
                if module is not None:
                    self._handles.append(module.register_forward_hook(_with_index(keep, index)))
        return self

    def __exit__(self, *exc_info: Any) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._uncompiled.close()

    def _keep_sizes(self, module: nn.Module, inputs: Tuple[Any, ...]) -> None:
        self._image_sizes = inputs[2]

    def _keep_output(
        self, module: nn.Module, inputs: Tuple[Any, ...], output: DecoderOutput
    ) -> None:
        self.output = output

    def _keep_weight_maps(
        self, index: int, inputs: Tuple[Any, ...], output: List[WeightMap]
    ) -> None:
        _, center, scales, *_ = inputs
        strides = [scale.stride for scale in scales]
        place = (index, len(self._decoder.layers))
        self._layers[index] = LayerRecord(*place, output, center, strides, self._image_sizes)

    def _keep_scale_weights(self, index: int, inputs: Tuple[Any, ...], output: Tensor) -> None:
        self._layers[index].scale_weights = output.float().softmax(dim=-1)


def _with_index(keep: Callable[..., None], index: int) -> Callable[..., None]:
    """A forward hook that calls `keep` with the layer's index in place of the module."""
    return lambda module, inputs, output: keep(index, inputs, output)


def _shift(weight_map: WeightMap) -> float:
    """Where a map has its cells, in cells from their corners."""
    return 0.0 if weight_map.unit is None else HALF_CELL


def radii(weight_map: WeightMap) -> Tensor:
    """(B, H', Q, 2) distances from the heads' centers along x and y, in cells, where log-weights
    are -1/2; infinite where they never are. Found by bisection, so that any shape has them."""
    zero = torch.zeros_like(weight_map.centers[..., :1, None], dtype=torch.float64)
    exact = _converted(weight_map, torch.float64)
    found = []
    for axis in (0, 1):
        low, high = torch.full_like(zero, 1e-9), torch.full_like(zero, 1e9)
        for _ in range(80):  # halves the ratio of the bounds
            middle = (low * high).sqrt()
            distances = (middle, zero) if axis == 0 else (zero, middle)
            inside = exact.log_weights_at(*distances) > -0.5
            low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
        found.append(torch.where(high < 1e9, high, torch.inf)[..., 0, 0])
    result = torch.stack(found, dim=-1).to(weight_map.centers.dtype)
    return result if weight_map.unit is None else result * weight_map.unit[:, :1]


def _converted(weight_map: WeightMap, dtype: torch.dtype) -> WeightMap:
    """The maps of a batch's first image in another type."""
    fields: Dict[str, Any] = {}
    for name in ("centers", "spreads", "unit"):
        value = getattr(weight_map, name)
        fields[name] = None if value is None else value[:1].to(dtype)
    return replace(weight_map, **fields)
