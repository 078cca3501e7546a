"""
Pictures: detections beside the truth, where each head of a query looks, the course of a training.

Positions in a drawn image are in its pixels, (0, 0) being the corner of the first pixel.
"""

import json
import logging
import math
import os
from dataclasses import dataclass
from typing import Dict, List

import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib import colormaps
from matplotlib.colors import hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter
from PIL import Image

from smca.data import read_image
from smca.errors import UserError
from smca.recorder import NoModulationError, Recorder

__all__ = [
    "DetectionMaps",
    "NoModulationError",
    "draw_contact_sheet",
    "draw_curves",
    "draw_gaussians",
    "draw_instances",
    "draw_truth_and_detections",
    "modulation_maps",
    "read_metrics",
    "truth_of",
    "write_pictures",
]

logger = logging.getLogger(__name__)

_MIN_LONG_SIDE = 480  # pixels; on anything smaller the labels would hide the objects
_MAP_LONG_SIDE = 384  # pixels of the images under Gaussian maps
DPI = 120
_SCALE_MARKERS = "osD^vP"


# Detections and truth


def draw_instances(image, instances, class_names=()):
    """
    Draw boxes with their class and, if they have one, their score.

    Args:
        image (np.ndarray): uint8 (height, width, 3), RGB.
        instances (Instances): on the CPU, in pixels of `image`: ``pred_boxes``, ``scores`` and
            ``pred_classes``, or ``gt_boxes`` and ``gt_classes`` (and perhaps ``gt_crowd``).
        class_names (sequence of str): a class without a name is shown by its index.

    Returns:
        np.ndarray: uint8 RGB, of the size of `image`; a small image is enlarged by a whole factor.
    """
    height, width = image.shape[:2]
    factor = math.ceil(_MIN_LONG_SIDE / max(height, width))
    image = np.asarray(_resize(image, width * factor, height * factor))
    is_truth = instances.has("gt_boxes")
    classes = instances.gt_classes if is_truth else instances.pred_classes
    boxes = (instances.gt_boxes if is_truth else instances.pred_boxes).clone()
    boxes.scale(factor, factor)
    boxes.clip(image.shape[:2])

    labels = [class_name(class_names, index) for index in classes.tolist()]
    if instances.has("scores"):
        scores = instances.scores.tolist()
        labels = [f"{label} {100 * score:.0f}%" for label, score in zip(labels, scores)]
    if instances.has("gt_crowd"):
        crowds = instances.gt_crowd.tolist()
        labels = [f"{label} (crowd)" if crowd else label for label, crowd in zip(labels, crowds)]
    visualizer = Visualizer(image, font_size_scale=1.4)
    colors = [_class_color(index) for index in classes.tolist()]
    return visualizer.overlay_instances(
        boxes=boxes.tensor.numpy(), labels=labels, assigned_colors=colors
    ).get_image()


def draw_truth_and_detections(image, truth, detections, class_names=()):
    """
    The truth at the left, detections at the right; arguments as of :func:`draw_instances`.

    Returns:
        np.ndarray: uint8 RGB; both halves have the size that :func:`draw_instances` gives them,
        with a white gap between.
    """
    left = draw_instances(image, truth, class_names)
    right = draw_instances(image, detections, class_names)
    gap = np.full((left.shape[0], max(4, left.shape[1] // 64), 3), 255, dtype=np.uint8)
    return np.concatenate([left, gap, right], axis=1)


def truth_of(dataset_dict):
    """
    Returns:
        Instances: a dataset dict's objects, with ``gt_boxes`` (XYXY in pixels of the original
        image), ``gt_classes`` and ``gt_crowd``.
    """
    annotations = dataset_dict.get("annotations", [])
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    return Instances(
        (dataset_dict["height"], dataset_dict["width"]),
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64),
        gt_crowd=torch.tensor([bool(a.get("iscrowd", 0)) for a in annotations], dtype=torch.bool),
    )


def draw_contact_sheet(pictures, captions, num_columns=2):
    """
    Args:
        pictures (list of np.ndarray): uint8 RGB, of any sizes.
        captions (list of str): one for each.

    Returns:
        matplotlib.figure.Figure
    """
    width = 7.0  # inches of a column
    rows = [pictures[i : i + num_columns] for i in range(0, len(pictures), num_columns)]
    heights = [width * max(map(_aspect, row)) + 0.35 for row in rows]
    figure = Figure((width * num_columns, sum(heights)), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), num_columns, squeeze=False, height_ratios=heights)
    for axes in grid.flat:
        axes.set_axis_off()
        axes.set_anchor("N")
    for axes, picture, caption in zip(grid.flat, pictures, captions):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=11)
    return figure


# Gaussian maps


@dataclass
class DetectionMaps:
    """
    A detection and where the query that made it looks, in one decoder layer. All positions are in
    pixels of `image`.

    Attributes:
        image: (h, w, 3) uint8 RGB.
        box: (4,) XYXY. class_index, score: of the detection.
        query: its index. layer, num_layers: of the decoder, counted from 0.
        centre: (2,) predicted centre (x, y), the same for all heads.
        head_centres: (L, H', 2); H' is 1 if the heads share their map.
        maps: (L, H', h, w) weights exp(log-weight), 1 at a head's centre. Row i and column j are
            at y = i and x = j.
        scale_weights: (L,), adding up to 1; equal where the model does not select scales.
        strides: L pixels (of the model's input) a cell.
    """

    image: np.ndarray
    box: np.ndarray
    class_index: int
    score: float
    query: int
    layer: int
    num_layers: int
    centre: np.ndarray
    head_centres: np.ndarray
    maps: np.ndarray
    scale_weights: np.ndarray
    strides: List[int]

    def combined(self):
        """(H', h, w) the maps of all scales, weighted with the query's scale weights."""
        return np.tensordot(self.scale_weights, self.maps, axes=1)

    def mean_head_centres(self):
        """(H', 2) the heads' centres of all scales, weighted likewise."""
        return np.tensordot(self.scale_weights, self.head_centres, axes=1)


def modulation_maps(predictor, image, select=None, layer=-1):
    """
    Detect objects, and compute where their queries look.

    Args:
        predictor (Predictor):
        image (np.ndarray): uint8 (height, width, 3), RGB.
        select (callable or None): from the Instances to the indices of the detections wanted;
            None: the best one.
        layer (int): of the decoder; -1 is the last.

    Returns:
        list[DetectionMaps]: on a copy of `image` whose long side is 384 pixels.

    Raises:
        NoModulationError: the model has no modulation.
        UserError: it has no such layer.
    """
    with Recorder(predictor.model) as recorder:
        instances = predictor(image)
    indices = [0] if select is None else list(select(instances))
    return maps_of(instances[indices], recorder.layer(layer), image)


def maps_of(instances, record, image):
    """
    Args:
        instances (Instances): on the CPU, in pixels of `image`: ``pred_boxes``, ``scores``,
            ``pred_classes`` and ``query_indices``.
        record (LayerRecord): of the model's call for `image`.
        image (np.ndarray): uint8 (height, width, 3), RGB.

    Returns:
        list[DetectionMaps]: see :func:`modulation_maps`.
    """
    height, width = image.shape[:2]
    factor = _MAP_LONG_SIDE / max(height, width)
    size = (max(1, round(height * factor)), max(1, round(width * factor)))
    drawn = np.asarray(_resize(image, size[1], size[0]))
    queries = instances.query_indices
    arrays = (
        instances.pred_boxes.tensor * torch.tensor([size[1] / width, size[0] / height] * 2),
        record.centres_in_pixels(queries, size),
        record.head_centres_in_pixels(queries, size),
        record.maps(queries, size),
        record.scale_shares(queries),
    )
    names = ("box", "centre", "head_centres", "maps", "scale_weights")
    return [
        DetectionMaps(
            image=drawn,
            class_index=int(instances.pred_classes[index]),
            score=float(instances.scores[index]),
            query=int(queries[index]),
            layer=record.index,
            num_layers=record.num_layers,
            strides=record.strides,
            **{name: array[index].cpu().numpy() for name, array in zip(names, arrays)},
        )
        for index in range(len(instances))
    ]


def draw_gaussians(detections, class_names=(), scale=None):
    """
    For each detection: its box and all heads' centres, and each head's map over the image.

    Args:
        detections (list[DetectionMaps]): at least one.
        class_names (sequence of str):
        scale (int or None): which scale's map to draw, 0 is the finest; None: the maps of all
            scales together, weighted with the query's scale weights.

    Returns:
        matplotlib.figure.Figure

    Raises:
        UserError: the model has no such scale.
    """
    num_scales, num_heads = detections[0].maps.shape[:2]
    if scale is not None and not 0 <= scale < num_scales:
        raise UserError(f"There is no scale {scale}, the model has {num_scales}: 0 is the finest.")
    num_columns = min(num_heads, 4)  # of heads; the overview is as wide as their rows are many
    num_rows = math.ceil(num_heads / num_columns)
    # Inches of a head's panel; the title and the legend need 10 in all.
    unit = max(2.1, 10 / (num_columns + num_rows))
    heights = [num_rows * (unit * _aspect(d.image) + 0.25) + 0.4 for d in detections]
    heights.append(0.6)  # of the legend
    size = (unit * (num_columns + num_rows), sum(heights))
    figure = Figure(size, dpi=DPI, layout="constrained")
    rows = figure.subfigures(len(heights), 1, height_ratios=heights)
    for subfigure, detection in zip(rows, detections):
        _draw_detection_row(subfigure, detection, class_names, scale, num_rows, num_columns)
    _draw_legend(rows[-1], detections[0], scale)
    return figure


def _draw_detection_row(figure, detection, class_names, scale, num_rows, num_columns):
    figure.suptitle(_describe(detection, class_names, scale), fontsize=11)
    grid = figure.add_gridspec(
        num_rows, num_columns + 1, width_ratios=[num_rows] + [1] * num_columns
    )
    overview = figure.add_subplot(grid[:, 0])
    show_image(overview, detection.image, "detection and heads' centres")
    draw_box(overview, detection)
    centres = detection.head_centres
    number_heads(overview, detection.mean_head_centres() if scale is None else centres[scale])
    draw_centre(overview, detection)

    maps = detection.combined() if scale is None else detection.maps[scale]
    background = dimmed(detection.image)
    for head, weights in enumerate(maps):
        axes = figure.add_subplot(grid[head // num_columns, 1 + head % num_columns])
        name = f"head {head + 1}" if len(maps) > 1 else "all heads"
        show_image(axes, background, name)
        overlay_map(axes, weights)
        draw_box(axes, detection, linewidth=1)
        for index in range(len(detection.strides)) if scale is None else [scale]:
            _draw_head_centre(axes, detection, index, head)
        draw_centre(axes, detection, markersize=7)


def _describe(detection, class_names, scale):
    parts = [
        f"{class_name(class_names, detection.class_index)} {100 * detection.score:.0f}%",
        f"query {detection.query}",
        f"decoder layer {detection.layer + 1} of {detection.num_layers}",
    ]
    if scale is not None:
        parts.append(f"map of stride {detection.strides[scale]}")
    elif len(detection.strides) > 1:
        shares = zip(detection.strides, detection.scale_weights)
        parts.append("strides read: " + ", ".join(f"{s} ({100 * w:.0f}%)" for s, w in shares))
    return "   ·   ".join(parts)


def _draw_legend(figure, detection, scale):
    axes = figure.add_subplot()
    axes.set_axis_off()
    box = dict(color="black", linewidth=1.5)
    handles = [axes.plot([], [], **box)[0]]
    labels = ["detected box"]
    handles.append(axes.plot([], [], "+", color="black", markersize=9, markeredgewidth=2)[0])
    labels.append("predicted centre, shared by the heads")
    several = len(detection.strides) > 1 and scale is None
    for index, stride in enumerate(detection.strides):
        if several or index == (scale or 0):
            marker = _SCALE_MARKERS[index % len(_SCALE_MARKERS)]
            style = dict(color="white", markeredgecolor="black", markersize=7)
            handles.append(axes.plot([], [], marker, **style)[0])
            labels.append(f"head's centre, stride {stride}" if several else "head's centre")
    num_columns = len(labels) if len(labels) <= 4 else math.ceil(len(labels) / 2)
    axes.legend(handles, labels, loc="center", ncols=num_columns, frameon=False, fontsize=9)


def show_image(axes, image, title):
    height, width = image.shape[:2]
    axes.imshow(image, extent=(0, width, height, 0))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    axes.set_title(title, fontsize=9)


def dimmed(image):
    """In grey and darker, as a ground for maps."""
    grey = np.asarray(Image.fromarray(image).convert("L"))
    return np.repeat((0.55 * grey).astype(np.uint8)[..., None], 3, axis=2)


def overlay_map(axes, weights):
    """Draw (h, w) weights from 0 to 1 over an image of h x w pixels."""
    height, width = weights.shape
    colors = colormaps["inferno"](weights)
    colors[..., 3] = 0.8 * weights**0.6
    # The weight in row 0 and column 0 is that of the position (0, 0), not of a pixel's middle.
    axes.imshow(colors, extent=(-0.5, width - 0.5, height - 0.5, -0.5))
    axes.set(xlim=(0, width), ylim=(height, 0))


def draw_box(axes, detection, linewidth=2):
    x0, y0, x1, y1 = detection.box
    color = _class_color(detection.class_index)
    axes.add_patch(
        Rectangle(
            (x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, linewidth=linewidth,
            path_effects=[withStroke(linewidth=linewidth + 1.5, foreground="black")],
        )
    )


def draw_centre(axes, detection, markersize=11):
    axes.plot(
        *detection.centre, "+", color="white", markersize=markersize, markeredgewidth=2,
        path_effects=[withStroke(linewidth=4, foreground="black")],
    )


def number_heads(axes, centres):
    """Numbered dots at (H', 2) positions; none if the heads share theirs."""
    for head, (x, y) in enumerate(centres if len(centres) > 1 else ()):
        axes.plot(x, y, "o", color="white", markersize=9, markeredgecolor="black")
        axes.text(
            x, y, str(head + 1), color="black", fontsize=6.5, ha="center", va="center",
            clip_on=True,
        )


def _draw_head_centre(axes, detection, scale, head):
    """Marked the more clearly, the more the query reads from that scale."""
    weight = detection.scale_weights[scale] if len(detection.strides) > 1 else 1.0
    axes.plot(
        *detection.head_centres[scale, head],
        _SCALE_MARKERS[scale % len(_SCALE_MARKERS)],
        color="white",
        markeredgecolor="black",
        markersize=2.5 + 2 * weight,
        markeredgewidth=0.7,
        alpha=0.4 + 0.6 * weight,
    )


# Curves


def read_metrics(path):
    """
    Read the ``metrics.json`` of a training. Lines that are no JSON, as a run leaves that was
    stopped while it wrote, are skipped. Where a metric goes back to an earlier iteration, a resumed
    run replaces what the run before wrote from there on.

    Args:
        path (str): one JSON object with ``iteration`` a line, as Detectron2's JSONWriter writes.

    Returns:
        dict[str, (list[int], list[float])]: iterations and values of each metric.

    Raises:
        UserError: there is no such file, or there is nothing in it.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    metrics: Dict[str, Dict[int, float]] = {}  # iterations ascend
    for line in lines:
        try:
            row = json.loads(line)
            iteration = row.pop("iteration")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        values = {name: v for name, v in row.items() if isinstance(v, (int, float))}
        # Rows alone do not tell: JSONWriter writes an evaluation between two log steps after
        # the second of them.
        if any(iteration < next(reversed(metrics.get(name, {})), -1) for name in values):
            metrics = {
                name: {i: v for i, v in before.items() if i <= iteration}
                for name, before in metrics.items()
            }
        for name, value in values.items():
            metrics.setdefault(name, {})[iteration] = value
    metrics = {name: values for name, values in metrics.items() if values}
    if not metrics:
        raise UserError(f"{path} holds no metrics.")
    return {name: (list(v), list(v.values())) for name, v in metrics.items()}


_LOSSES = {
    "total_loss": "total (all layers)",
    "loss_ce": "class, last layer",
    "loss_bbox": "L1, last layer",
    "loss_giou": "GIoU, last layer",
}
_RESULTS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def draw_curves(metrics):
    """
    Losses, and AP where there was an evaluation, over the iterations.

    Args:
        metrics (dict): as of :func:`read_metrics`; what is absent is left out.

    Returns:
        matplotlib.figure.Figure
    """
    panels = []
    if any(name in metrics for name in _LOSSES):
        panels.append(_draw_losses)
    if any(prefix + name in metrics for name in _RESULTS for prefix in ("", "ema/")):
        panels.append(_draw_results)
    if not panels:
        raise UserError("There are neither losses nor AP among the metrics.")
    figure = Figure(figsize=(6.5 * len(panels), 4.2), dpi=DPI, layout="constrained")
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        draw(axes, metrics)
        axes.set_xlabel("iteration")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        axes.legend(frameon=False, fontsize=9, loc="best")
    return figure


def _draw_losses(axes, metrics):
    for index, (name, label) in enumerate(_LOSSES.items()):
        if name in metrics:
            style = dict(color="black", linewidth=1.8) if index == 0 else dict(color=f"C{index}")
            axes.plot(*metrics[name], label=label, **{"linewidth": 1.3, **style})
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Training losses (weighted)")


def _draw_results(axes, metrics):
    highest = 0
    for prefix, suffix, style in (("", "", "o-"), ("ema/", ", averaged weights", "s--")):
        for index, (name, label) in enumerate(_RESULTS.items()):
            if prefix + name not in metrics:
                continue
            iterations, values = metrics[prefix + name]
            axes.plot(
                iterations, values, style, color=f"C{index}", markersize=4, label=label + suffix
            )
            highest = max([highest] + [v for v in values if math.isfinite(v)])
    axes.set_ylim(0, max(5, 1.15 * highest))
    axes.set_title("Box AP on the validation data (%)")


# All pictures of a run


def write_pictures(
    predictor,
    dataset_dicts,
    output_dir,
    metrics_file=None,
    num_images=8,
    num_detections=4,
    confidence_threshold=0.3,
    layer=-1,
    scale=None,
):
    """
    Write ``validation.png`` (truth and detections), ``gaussians.png`` (best detections of
    different images; not for a model without modulation) and ``curves.png``.

    Args:
        predictor (Predictor):
        dataset_dicts (list[dict]): in Detectron2's format; images are taken evenly from it.
        output_dir (str): is made if need be.
        metrics_file (str or None): without one, there are no curves.
        num_images (int): in ``validation.png``, at least 1.
        num_detections (int): in ``gaussians.png``; 0 leaves that picture out.
        confidence_threshold (float): of the detections in ``validation.png``. A focal loss
            leaves scores low after a short training.
        layer, scale: of the Gaussian maps, see :func:`modulation_maps`, :func:`draw_gaussians`.

    Returns:
        list[str]: paths of the pictures.

    Raises:
        UserError: see the functions above and `smca.data.read_image`.
    """
    os.makedirs(output_dir, exist_ok=True)
    chosen = evenly(dataset_dicts, num_images)
    figures = {}
    if chosen:
        figures["validation.png"] = _draw_validation(predictor, chosen, confidence_threshold)
    if chosen and num_detections:
        try:
            figures["gaussians.png"] = _draw_best_gaussians(
                predictor, chosen, num_detections, layer, scale
            )
        except NoModulationError as error:
            logger.warning("%s", error)
    if metrics_file is not None:
        figures["curves.png"] = draw_curves(read_metrics(metrics_file))
    paths = []
    for name, figure in figures.items():
        paths.append(os.path.join(output_dir, name))
        figure.savefig(paths[-1])
    return paths


def evenly(items, count):
    """`count` items (or all, if there are fewer) at equal distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]


def _draw_validation(predictor, dataset_dicts, threshold):
    pictures, captions = [], []
    for item in dataset_dicts:
        image = read_image(item["file_name"], item["height"], item["width"])
        truth, detections = truth_of(item), predictor(image)
        detections = detections[detections.scores >= threshold]
        pictures.append(
            draw_truth_and_detections(image, truth, detections, predictor.class_names)
        )
        captions.append(
            f"{os.path.basename(item['file_name'])}: truth ({len(truth)})  |  "
            f"detections from {100 * threshold:.0f}% ({len(detections)})"
        )
    return draw_contact_sheet(pictures, captions)


def _draw_best_gaussians(predictor, dataset_dicts, count, layer, scale):
    """The best detection of each of the images whose best detections are surest."""
    best = []
    for item in dataset_dicts:
        image = read_image(item["file_name"], item["height"], item["width"])
        best += modulation_maps(predictor, image, layer=layer)
    best.sort(key=lambda detection: -detection.score)
    return draw_gaussians(best[:count], predictor.class_names, scale)


# Helpers


def _resize(image, width, height):
    return Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC)


def _aspect(image):
    """Height by width, within what a page bears."""
    return min(max(image.shape[0] / image.shape[1], 0.2), 2.0)


def class_name(class_names, index):
    return class_names[index] if index < len(class_names) else str(index)


def _class_color(index):
    # Neighbours are far apart on the colour wheel, and all are bright.
    return hsv_to_rgb(((0.13 + 0.618 * index) % 1, 0.8, 1.0))
