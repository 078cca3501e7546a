"""What the layers of a modulated decoder compute: where their queries look."""

import contextlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor, nn

from smca.errors import UserError
from smca.modeling.weight_map import HALF_CELL, WeightMap

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Detections, Predictor


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

    def heads(self, queries: Tensor, size: Tuple[int, int]) -> Tuple[Tensor, Tensor]:
        """Of each scale and head the center (K, L, H', 2), and the weights exp(log-weight)
        (K, L, H', h, w); row i and column j are at y = i and x = j."""
        x, y = (torch.arange(n, device=self.image_sizes.device) for n in size[::-1])
        centers, maps = [], []
        for weight_map, stride in zip(self.weight_maps, self.strides):
            chosen = weight_map.of_queries(queries)
            values = {name: getattr(chosen, name) for name in ("centers", "spreads", "unit")}
            first = {name: v[:1].float() for name, v in values.items() if v is not None}
            chosen = replace(chosen, **first)  # of B = 1
            shift = 0.0 if chosen.unit is None else HALF_CELL  # of positions, from a cell's corner
            width, height = cell = stride * self._scaling(size)
            centers.append((chosen.centers[0].transpose(0, 1) + shift) * cell)
            log_weights = chosen.log_weights(x / width - shift, y / height - shift)
            maps.append(log_weights[0].transpose(0, 1).exp())
        return torch.stack(centers, dim=1), torch.stack(maps, dim=1)

    def _scaling(self, size: Tuple[int, int]) -> Tensor:
        return self.image_sizes.new_tensor(size[::-1]) / self.image_sizes[0]

    def scale_shares(self, queries: Tensor) -> Tensor:
        """(K, L) scale weights of the first image; equal where the model does not select."""
        if self.scale_weights is None:
            return self.center.new_full((len(queries), len(self.strides)), 1 / len(self.strides))
        return self.scale_weights[0, queries]


def detect_and_record(
    predictor: "Predictor", image: np.ndarray
) -> Tuple["Detections", List[LayerRecord]]:
    """All detections of an (h, w, 3) uint8 RGB image, best first, and the record of each decoder
    layer; none for a model without modulation."""
    decoder: Any = getattr(predictor.model, "decoder", None)
    layers = decoder.layers if getattr(decoder, "modulated", False) else ()
    image_sizes: List[Tensor] = []
    records: List[LayerRecord] = []

    def keep_image_sizes(module: nn.Module, inputs: Tuple[Any, ...]) -> None:
        image_sizes.append(inputs[2])

    def keep_maps(module: nn.Module, inputs: Tuple[Any, ...], output: List[WeightMap]) -> None:
        _, center, scales, *_ = inputs
        strides = [scale.stride for scale in scales]
        place = (len(records), len(layers))
        records.append(LayerRecord(*place, output, center, strides, image_sizes[0]))

    def keep_shares(module: nn.Module, inputs: Tuple[Any, ...], output: Tensor) -> None:
        records[-1].scale_weights = output.float().softmax(dim=-1)  # a layer's maps come first

    with contextlib.ExitStack() as stack:
        if layers:
            stack.callback(decoder.register_forward_pre_hook(keep_image_sizes).remove)
        for layer in layers:
            stack.callback(layer.modulation.register_forward_hook(keep_maps).remove)
            if layer.scale_weight is not None:
                stack.callback(layer.scale_weight.register_forward_hook(keep_shares).remove)
        return predictor(image, threshold=0), records


def record_of(records: Sequence[LayerRecord], layer: int) -> LayerRecord:
    """The record of the decoder layer of an index; -1 is the last layer. One that is not there, or
    a model without modulation, is a UserError."""
    if not records:
        raise UserError("A model without modulation (model.decoder.modulation=null) has no maps.")
    count = len(records)
    if not -count <= layer < count:
        raise UserError(f"There is no decoder layer {layer}, the model has {count}.")
    return records[layer]
