"""Where each head of a query looks, over the image, in each layer of a modulated decoder.

Positions in a drawn image are in its pixels, (0, 0) being the corner of the first pixel.
"""

import contextlib
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from PIL import Image
from torch import Tensor, nn

from smca.analysis.detections import DPI, aspect, class_color, class_name, plain_text
from smca.errors import UserError
from smca.modeling.weight_map import HALF_CELL, WeightMap

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Detections, Predictor

_MAP_LONG_SIDE = 384  # pixels of the images under the maps
_SCALE_MARKERS = "osD^vP"


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


@dataclass(kw_only=True)
class DetectionMaps:
    """A detection and where the query that made it looks, in one decoder layer.

    All positions are in pixels of `image`. H' is 1 if the heads share their map.
    """

    image: np.ndarray  # (h, w, 3) uint8 RGB
    box: np.ndarray  # XYXY
    class_index: int
    score: float
    query: int  # its index
    layer: LayerRecord
    center: np.ndarray  # (2,) predicted center (x, y), the same for all heads
    head_centers: np.ndarray  # (L, H', 2)
    # (L, H', h, w) exp(log-weight), 1 at a head's center; row i and column j are at y = i and x = j
    maps: np.ndarray
    scale_weights: np.ndarray  # (L,), adding up to 1; equal where the model does not select scales


def modulation_maps(
    predictor: "Predictor", image: np.ndarray, indices: Sequence[int] = (0,), layer: int = -1
) -> List[DetectionMaps]:
    """Detect objects in an (h, w, 3) uint8 RGB image, and compute where the queries of some
    detections, of which 0 is the best, look in a decoder layer; errors are those of `record_of`."""
    instances, records = detect_and_record(predictor, image)
    return maps_of(instances[list(indices)], record_of(records, layer), image)


def maps_of(instances: Instances, record: LayerRecord, image: np.ndarray) -> List[DetectionMaps]:
    """Where the queries of some detections, on the CPU and in pixels of `image`, look, on a copy of
    this (h, w, 3) uint8 RGB image whose long side is 384 pixels. `record` is of the model's call
    for it."""
    height, width = image.shape[:2]
    factor = _MAP_LONG_SIDE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    drawn = np.asarray(Image.fromarray(image).resize(size[::-1]))
    queries = instances.query_indices
    arrays = (
        instances.pred_boxes.tensor * torch.tensor([size[1] / width, size[0] / height] * 2),
        record.centers_in_pixels(queries, size),
        *record.heads(queries, size),
        record.scale_shares(queries),
    )
    names = ("box", "center", "head_centers", "maps", "scale_weights")
    return [
        DetectionMaps(
            image=drawn,
            class_index=int(instances.pred_classes[index]),
            score=float(instances.scores[index]),
            query=int(queries[index]),
            layer=record,
            **{name: array[index].cpu().numpy() for name, array in zip(names, arrays)},
        )
        for index in range(len(instances))
    ]


def draw_gaussians(
    detections: Sequence[DetectionMaps],
    class_names: Sequence[str] = (),
    scale: Optional[int] = None,
) -> Figure:
    """Draw the box and the heads' centers of each detection, and each head's map over the image.

    Args:
        detections: at least one.
        class_names: as in `draw_instances`.
        scale: index of the scale whose map is drawn, 0 is the finest; None draws the sum over the
            scales, weighted with the query's scale weights. One that is not there is a UserError.
    """
    num_scales, num_heads = detections[0].maps.shape[:2]
    if scale is not None and not 0 <= scale < num_scales:
        raise UserError(f"There is no scale {scale}, the model has {num_scales}: 0 is the finest.")
    num_columns = min(num_heads, 4)  # of heads; the overview is as wide as their rows are many
    num_rows = math.ceil(num_heads / num_columns)
    # Inches of a head's panel; the title and the legend need 10 in all.
    unit = max(2.1, 10 / (num_columns + num_rows))
    heights = [num_rows * (unit * aspect(d.image) + 0.25) + 0.4 for d in detections]
    size = (unit * (num_columns + num_rows), sum(heights) + 0.6)
    figure = Figure(size, dpi=DPI, layout="constrained")
    rows = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for subfigure, detection in zip(rows, detections):
        shares = detection.scale_weights if scale is None else np.eye(num_scales)[scale]
        subfigure.suptitle(plain_text(_describe(detection, class_names, shares)), fontsize=11)
        ratios = [num_rows] + [1] * num_columns
        grid = subfigure.add_gridspec(num_rows, num_columns + 1, width_ratios=ratios)
        _draw_overview(subfigure.add_subplot(grid[:, 0]), detection, shares)
        for head in range(num_heads):
            axes = subfigure.add_subplot(grid[head // num_columns, 1 + head % num_columns])
            _draw_head(axes, detection, shares, head)
    handles, labels = figure.axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure


def _draw_overview(axes: Axes, detection: DetectionMaps, shares: np.ndarray) -> None:
    """The detection, and its heads' centers, the means of those of the scales with `shares`."""
    _show_image(axes, detection.image, "detection and heads' centers")
    centers = np.tensordot(shares, detection.head_centers, axes=1)
    style: Dict[str, Any] = dict(ha="center", va="center", clip_on=True, fontsize=6.5)
    for head, (x, y) in enumerate(centers if len(centers) > 1 else ()):
        axes.plot(x, y, "o", color="white", markersize=9, markeredgecolor="black")
        axes.text(x, y, str(head + 1), color="black", **style)
    _draw_query(axes, detection, linewidth=2, markersize=11)


def _draw_head(axes: Axes, detection: DetectionMaps, shares: np.ndarray, head: int) -> None:
    """A head's map, the sum of those of the scales with `shares`, over the image."""
    gray = 0.55 * np.asarray(Image.fromarray(detection.image).convert("L"))
    background = np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    has_others = detection.maps.shape[1] > 1
    _show_image(axes, background, f"head {head + 1}" if has_others else "all heads")
    weights = np.tensordot(shares, detection.maps[:, head], axes=1)
    colors = colormaps["inferno"](weights)
    colors[..., 3] = 0.8 * weights**0.6
    # The weight in row 0 and column 0 is that of the position (0, 0), not of a pixel's middle.
    height, width = weights.shape
    axes.imshow(colors, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set(xlim=(0, width), ylim=(height, 0))
    for scale in np.flatnonzero(shares):
        # Larger and clearer, the more the query reads from that scale.
        share, marker = shares[scale], _SCALE_MARKERS[scale % len(_SCALE_MARKERS)]
        style: Dict[str, Any] = dict(color="white", markeredgecolor="black", markeredgewidth=0.7)
        style.update(markersize=2.5 + 2 * share, alpha=0.4 + 0.6 * share)
        label = f"head's center, stride {detection.layer.strides[scale]}"
        axes.plot(*detection.head_centers[scale, head], marker, label=label, **style)
    _draw_query(axes, detection, linewidth=1, markersize=7)


def _describe(detection: DetectionMaps, class_names: Sequence[str], shares: np.ndarray) -> str:
    scales = zip(detection.layer.strides, shares)
    parts = [
        f"{class_name(class_names, detection.class_index)} {100 * detection.score:.0f}%",
        f"query {detection.query}",
        f"decoder layer {detection.layer.index + 1} of {detection.layer.num_layers}",
        ", ".join(f"stride {stride} ({100 * share:.0f}%)" for stride, share in scales if share),
    ]
    return "   ·   ".join(parts)


def _show_image(axes: Axes, image: np.ndarray, title: str) -> None:
    """One unit of the axes is a pixel."""
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def _draw_query(axes: Axes, detection: DetectionMaps, linewidth: float, markersize: float) -> None:
    """The detection's box, and the center that its query predicts."""
    x0, y0, x1, y1 = detection.box
    style: Dict[str, Any] = dict(fill=False, linewidth=linewidth, label="box")
    style.update(edgecolor=class_color(detection.class_index))
    style.update(path_effects=[withStroke(linewidth=linewidth + 1.5, foreground="black")])
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, **style))
    style = dict(color="white", markersize=markersize, markeredgewidth=2)
    style.update(path_effects=[withStroke(linewidth=4, foreground="black")])
    axes.plot(*detection.center, "+", label="predicted center, shared by the heads", **style)
