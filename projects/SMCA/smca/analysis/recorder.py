"""What the layers of a modulated decoder compute: where their queries look."""

import contextlib
import functools
from dataclasses import dataclass, replace
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple

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

    The methods take queries (K,), indices, and give numbers of the first image, in pixels of that
    image at `size`, (h, w).

    Attributes:
        index: of the layer, from 0.
        num_layers: how many the decoder has.
        weight_maps: of each of the L scales, in its cells.
        center: (B, Q, 2) predicted center (x, y) in pixels of the model's input.
        strides: L pixels (of the model's input) a cell.
        image_sizes: (B, 2) width and height of the model's input without padding.
        scale_weights: (B, Q, L), which add up to 1; None where the model does not select scales.
    """

    index: int
    num_layers: int
    weight_maps: Sequence[WeightMap]
    center: Tensor
    strides: List[int]
    image_sizes: Tensor
    scale_weights: Optional[Tensor] = None

    def centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, 2) predicted centers (x, y), which the heads share."""
        return self.center[0, queries].float() * self._scaling(size)

    def head_centers_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', 2)"""
        scales = self._maps_and_cells(queries, size)
        return _stack((m.centers[0].transpose(0, 1) + _shift(m)) * cell for m, cell in scales)

    def radii_in_pixels(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', 2) distances along x and y at which a head's log-weight is -1/2: the standard
        deviation of a Gaussian."""
        scales = self._maps_and_cells(queries, size)
        return _stack(radii(weight_map)[0].transpose(0, 1) * cell for weight_map, cell in scales)

    def maps(self, queries: Tensor, size: Tuple[int, int]) -> Tensor:
        """(K, L, H', h, w) weights exp(log-weight); row i and column j are at y = i and x = j."""
        x, y = (torch.arange(n, device=self.image_sizes.device) for n in size[::-1])
        found = []
        for weight_map, (width, height) in self._maps_and_cells(queries, size):
            shift = _shift(weight_map)
            log_weights = weight_map.log_weights(x / width - shift, y / height - shift)
            found.append(log_weights[0].transpose(0, 1).exp())
        return _stack(found)

    def _maps_and_cells(
        self, queries: Tensor, size: Tuple[int, int]
    ) -> Iterator[Tuple[WeightMap, Tensor]]:
        """Each scale's map of these queries alone, B = 1, and its cells' (width, height)."""
        for weight_map, stride in zip(self.weight_maps, self.strides):
            cell = stride * self._scaling(size)
            yield _converted(weight_map.of_queries(queries), torch.float32), cell

    def _scaling(self, size: Tuple[int, int]) -> Tensor:
        return self.image_sizes.new_tensor(size[::-1]) / self.image_sizes[0]

    def scale_shares(self, queries: Tensor) -> Tensor:
        """(K, L) scale weights of the first image; equal where the model does not select."""
        if self.scale_weights is None:
            return self.center.new_full((len(queries), len(self.strides)), 1 / len(self.strides))
        return self.scale_weights[0, queries]


class Recorder:
    """A context in which the calls of a model's decoder are recorded.

    Args:
        model: an `SMCA`.

    Attributes:
        output: what the decoder returned in its last call.

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
        self._handles = [
            self._decoder.register_forward_pre_hook(self._keep_sizes),
            self._decoder.register_forward_hook(self._keep_output),
        ]
        for index, layer in enumerate(self._decoder.layers):
            for module, keep in (
                (layer.modulation, self._keep_weight_maps),
                (layer.scale_weight, self._keep_scale_weights),
            ):
                if module is not None:
                    hook = functools.partial(keep, index)
                    self._handles.append(module.register_forward_hook(hook))
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


def _stack(scales: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(scales), dim=1)


def _shift(weight_map: WeightMap) -> float:
    """Where in its cells a map has its positions, in cells from their corners."""
    return 0.0 if weight_map.unit is None else HALF_CELL


def radii(weight_map: WeightMap) -> Tensor:
    """(B, H', Q, 2) distances from the heads' centers along x and y, in cells, at which log-weights
    are -1/2; infinite where they never are. Bisection finds them for any shape of a map."""
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
    values = {name: getattr(weight_map, name) for name in ("centers", "spreads", "unit")}
    first = {name: value[:1].to(dtype) for name, value in values.items() if value is not None}
    return replace(weight_map, **first)
