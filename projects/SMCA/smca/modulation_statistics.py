"""
What training does to the spatial modulation: where the queries of known objects look, how far and
on which scales, over the checkpoints of a training. ``tools/draw_training.py`` is the command.

Queries are matched to the true objects as in training, so that a detector which detects nothing
yet can be looked at too. M objects, H' heads (1 if they share their map), L scales. Pixels are
those of the original images.
"""

import warnings
from dataclasses import dataclass
from typing import List, Optional

import numpy as np
import torch
from detectron2.structures import Instances
from matplotlib.figure import Figure
from scipy.stats import ConstantInputWarning, spearmanr
from torchvision.ops import box_convert

from smca.data import read_image
from smca.errors import UserError
from smca.modeling.matcher import HungarianMatcher, Targets
from smca.recorder import Recorder
from smca.visualization import (
    DPI,
    class_name,
    dimmed,
    draw_box,
    draw_centre,
    maps_of,
    number_heads,
    overlay_map,
    show_image,
    truth_of,
)

__all__ = [
    "ModulationStatistics",
    "collect",
    "collect_examples",
    "draw_examples",
    "draw_training",
    "summarize",
]

SIZES = ("small", "medium", "large")  # thirds of the objects
_SIZE_COLORS = dict(zip(SIZES, ("#e3a72f", "#d1495b", "#5b3a8c")))
_HEADS_COLOR, _CENTRE_COLOR = "#1f77b4", "#222222"
_MAX_COLUMNS = 6  # of examples


# Statistics


@dataclass
class ModulationStatistics:
    """
    True objects and where the queries matched to them look, in one decoder layer.

    Where there are several scales, heads' centres and 1 / radius^2, of Gaussians the precision,
    are means over them, weighted with the query's scale weights.

    Attributes:
        strides: L pixels (of the model's input) a cell.
        boxes: (M, 4) the objects' true boxes, XYXY in pixels.
        centres: (M, 2) predicted centres (x, y), the same for all heads, in pixels.
        head_centres: (M, H', 2) in pixels.
        head_radii: (M, H', 2) in pixels, how far along x and y from a head's centre its
            log-weight is -1/2: the standard deviation of a Gaussian.
        scale_weights: (M, L), adding up to 1; None where the model does not select scales.
    """

    strides: List[int]
    boxes: np.ndarray
    centres: np.ndarray
    head_centres: np.ndarray
    head_radii: np.ndarray
    scale_weights: Optional[np.ndarray] = None

    @classmethod
    def of_image(cls, record, queries, boxes, size):
        """
        Args:
            record (LayerRecord): of one image.
            queries (Tensor): (M,) indices. boxes (Tensor): (M, 4), XYXY in pixels.
            size (tuple): (height, width) of the image in pixels.
        """
        shares = record.scale_shares(queries)[..., None, None]  # (M, L, 1, 1)
        head_centres = record.head_centres_in_pixels(queries, size)
        radii = record.radii_in_pixels(queries, size)
        selects = record.scale_weights is not None
        return cls(
            record.strides,
            boxes.cpu().numpy(),
            record.centres_in_pixels(queries, size).cpu().numpy(),
            (shares * head_centres).sum(dim=1).cpu().numpy(),
            (shares * radii.pow(-2)).sum(dim=1).rsqrt().cpu().numpy(),
            record.scale_shares(queries).cpu().numpy() if selects else None,
        )

    @classmethod
    def join(cls, parts):
        """Those of several images (at least one) as one."""
        names = ("boxes", "centres", "head_centres", "head_radii", "scale_weights")
        columns = [[getattr(part, name) for part in parts] for name in names]
        joined = [None if c[0] is None else np.concatenate(c) for c in columns]
        return cls(parts[0].strides, *joined)

    @property
    def half_sizes(self):
        """(M, 2) half width and half height of the boxes in pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]) / 2

    @property
    def sqrt_areas(self):
        """(M,) in pixels."""
        return 2 * np.sqrt(self.half_sizes.prod(axis=1))

    @property
    def centre_distances(self):
        """(M,) from the box's centre in half boxes, of the axis where it is greater: inside the
        box it is less than 1."""
        return self._distances(self.centres[:, None])[:, 0]

    @property
    def head_distances(self):
        """(M, H') of the heads' centres, as `centre_distances`."""
        return self._distances(self.head_centres)

    def _distances(self, points):
        offsets = points - (self.boxes[:, None, :2] + self.boxes[:, None, 2:]) / 2
        return np.abs(offsets / self.half_sizes[:, None]).max(axis=2)

    @property
    def head_deviations(self):
        """(M,) root mean square distance of the heads' centres from their mean, in widths and
        heights of the box."""
        offsets = self.head_centres - self.head_centres.mean(axis=1, keepdims=True)
        relative = offsets / (2 * self.half_sizes[:, None])
        return np.sqrt(np.square(relative).sum(axis=2).mean(axis=1))

    @property
    def radii(self):
        """(M, 2) median over the heads in pixels, along x and y."""
        return np.median(self.head_radii, axis=1)

    @property
    def radius_correlation(self):
        """Spearman's rank correlation of `radii` and `half_sizes`, x and y together; nan where
        either is constant."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConstantInputWarning)
            return float(spearmanr(self.radii.ravel(), self.half_sizes.ravel())[0])


def collect(predictor, dataset_dicts, layer=-1):
    """
    Args:
        predictor (Predictor):
        dataset_dicts (list[dict]): in Detectron2's format. Crowds and boxes without area are not
            objects.
        layer (int): of the decoder, -1 is the last. Objects are matched to the queries by the
            predictions of the last layer all the same.

    Returns:
        ModulationStatistics: of all objects that have a query.

    Raises:
        NoModulationError: the model has no modulation.
        UserError: it has no such layer or class, there are no objects, or an image cannot be read.
    """
    parts = []
    for item in dataset_dicts:
        if len(_objects_of(item)):
            matched, record, _ = _match(predictor, item, layer)
            found = (matched.query_indices, matched.pred_boxes.tensor, matched.image_size)
            parts.append(ModulationStatistics.of_image(record, *found))
    if not parts:
        raise UserError("There are no objects in the images to look at.")
    return ModulationStatistics.join(parts)


def collect_examples(predictor, dataset_dicts, layer=-1, num_objects=3):
    """
    Where the queries of the largest objects of an image look: of the first one that has
    `num_objects`, else of the one that has most.

    Returns:
        list[DetectionMaps]: with the true box and class, and the score that the query gives it.
    """
    item = max(dataset_dicts, key=lambda item: min(len(_objects_of(item)), num_objects))
    matched, record, image = _match(predictor, item, layer)
    largest = matched.pred_boxes.area().argsort(descending=True, stable=True)[:num_objects]
    return maps_of(matched[largest], record, image)


def _objects_of(item):
    """Instances: truth, but for crowds and boxes without area."""
    truth = truth_of(item)
    return truth[truth.gt_boxes.nonempty() & ~truth.gt_crowd]


@torch.no_grad()
def _match(predictor, item, layer):
    """
    Returns:
        (Instances, LayerRecord, np.ndarray): an image's objects, in the fields of detections
        (their scores are those of their classes), with ``query_indices``; where queries look; and
        the image.
    """
    model, truth = predictor.model, _objects_of(item)
    image = read_image(item["file_name"], item["height"], item["width"])
    with Recorder(model) as recorder:
        predictor(image)
    record = recorder.layer(layer)
    logits, boxes_cxcywh = model.predict(recorder.decoded)
    if truth.gt_classes.max() >= logits.shape[-1]:
        raise UserError(
            f"The data have a class {truth.gt_classes.max()}, the model has {logits.shape[-1]}: "
            "these data are not the ones that it was trained for."
        )
    height, width = truth.image_size
    boxes = truth.gt_boxes.tensor / torch.tensor([width, height] * 2)
    targets = Targets(truth.gt_classes, box_convert(boxes, "xyxy", "cxcywh"))
    matcher = model.criterion.matcher if model.criterion else HungarianMatcher()
    logits = logits.cpu()
    matching = matcher(logits, boxes_cxcywh.cpu(), [targets])
    truth = truth[matching.targets]
    matched = Instances(
        truth.image_size,
        pred_boxes=truth.gt_boxes,
        pred_classes=truth.gt_classes,
        scores=logits[-1, 0, matching.queries, truth.gt_classes].sigmoid(),
        query_indices=matching.queries,
    )
    return matched, record, image


# Numbers


def summarize(statistics):
    """
    The numbers that :func:`draw_training` draws. Distances are in half boxes, deviations in boxes,
    other lengths in pixels; of three numbers the second is the median, the others the quartiles.

    Returns:
        dict: without ``head_deviation`` where heads share their map, and without
        ``scale_weights`` (means by stride) where the model does not select scales. What cannot
        be said is None.
    """
    summary = {
        "num_objects": len(statistics.boxes),
        "centre_distance": _quartiles(statistics.centre_distances),
        "head_centre_distance": _quartiles(statistics.head_distances),
        "head_centres_inside": _number((statistics.head_distances < 1).mean()),
        "radius_correlation": _number(statistics.radius_correlation),
        "sizes": {},
    }
    if statistics.head_centres.shape[1] > 1:
        summary["head_deviation"] = _quartiles(statistics.head_deviations)
    thirds = np.array_split(statistics.sqrt_areas.argsort(kind="stable"), len(SIZES))
    for name, third in zip(SIZES, thirds):
        if len(third):
            summary["sizes"][name] = _summarize_size(statistics, third)
    return summary


def _summarize_size(statistics, third):
    sqrt_areas = statistics.sqrt_areas[third]
    summary = {
        "sqrt_area": [_number(sqrt_areas.min()), _number(sqrt_areas.max())],
        "half_size": _number(np.median(statistics.half_sizes[third])),
        "radius": _number(np.median(statistics.radii[third])),
    }
    if statistics.scale_weights is not None:
        weights = statistics.scale_weights[third].mean(axis=0)
        summary["scale_weights"] = dict(zip(map(str, statistics.strides), map(_number, weights)))
    return summary


def _quartiles(values):
    return [_number(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def _number(value):
    return round(float(value), 4) if np.isfinite(value) else None


# Pictures


def draw_training(statistics_by_iteration):
    """
    Distances of centres from their objects, how far heads lie apart, radii beside the objects'
    sizes, and scale weights by the objects' size, over a training. What a model does not have,
    several heads or a selection of scales, has no panel.

    Args:
        statistics_by_iteration (dict[int, ModulationStatistics]): by the steps done, ascending.

    Returns:
        matplotlib.figure.Figure
    """
    steps = list(statistics_by_iteration)
    summaries = [summarize(statistics) for statistics in statistics_by_iteration.values()]
    panels = [_draw_distances, _draw_radii]
    if "head_deviation" in summaries[-1]:
        panels.insert(1, _draw_deviations)
    if "scale_weights" in summaries[-1]["sizes"]["small"]:
        panels.append(_draw_scale_weights)
    num_columns = 2 if len(panels) == 4 else len(panels)
    num_rows = len(panels) // num_columns
    size = ((4.8 if num_rows == 1 else 5.6) * num_columns, 4.6 * num_rows)
    figure = Figure(size, dpi=DPI, layout="constrained")
    subfigures = figure.subfigures(num_rows, num_columns, squeeze=False, wspace=0.03, hspace=0.03)
    for subfigure, draw in zip(subfigures.flat, panels):
        draw(subfigure, steps, summaries)
        for axes in subfigure.axes:
            axes.grid(alpha=0.3)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_xlim(0, 1.02 * steps[-1])
    return figure


def _draw_distances(figure, steps, summaries):
    figure.suptitle("Do centres settle on their objects?")
    distances, inside = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    for key, color, label in (
        ("head_centre_distance", _HEADS_COLOR, "heads' centres"),
        ("centre_distance", _CENTRE_COLOR, "shared centre"),
    ):
        _plot_quartiles(distances, steps, [s[key] for s in summaries], color, label)
    _mark(distances, 1, "edge of the box")
    distances.set_ylim(bottom=0)
    distances.set_ylabel("distance from the box's centre\n(half boxes; median, quartiles)")
    _put_legend_above(distances)
    percent = [100 * s["head_centres_inside"] for s in summaries]
    inside.plot(steps, percent, "o-", color=_HEADS_COLOR, markersize=4)
    inside.set_ylim(0, 105)
    inside.set_ylabel("heads' centres\nin the box (%)")
    inside.set_xlabel("steps")


def _draw_deviations(figure, steps, summaries):
    figure.suptitle("Do heads differ?")
    axes = figure.subplots()
    deviations = [s["head_deviation"] for s in summaries]
    _plot_quartiles(axes, steps, deviations, _HEADS_COLOR, "heads' centres")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rms distance of heads' centres from their mean\n(boxes; median, quartiles)")
    axes.set_xlabel("steps")


def _draw_radii(figure, steps, summaries):
    figure.suptitle("Do maps fit the objects' sizes?")
    radii, correlation = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    for name, color in _SIZE_COLORS.items():
        sizes = [s["sizes"].get(name, {}) for s in summaries]
        label = _describe_size(name, sizes[-1])
        values = [_or_nan(size.get("radius")) for size in sizes]
        radii.plot(steps, values, "o-", color=color, markersize=4, label=label)
        radii.axhline(_or_nan(sizes[-1].get("half_size")), color=color, linestyle=":")
    radii.plot([], [], ":", color="grey", label="half the box")
    radii.set_ylim(bottom=0)
    radii.set_ylabel("radius of the map, log-weight -1/2\n(pixels; median)")
    _put_legend_above(radii)
    values = [_or_nan(s["radius_correlation"]) for s in summaries]
    correlation.plot(steps, values, "o-", color=_HEADS_COLOR, markersize=4)
    correlation.axhline(0, color="grey", linewidth=0.8)
    correlation.set_ylim(min(0, 1.1 * np.nanmin([0, *values])), 1.05)
    correlation.set_ylabel("rank corr.\nwith the box")
    correlation.set_xlabel("steps")


def _draw_scale_weights(figure, steps, summaries):
    figure.suptitle("Which scales do objects read?")
    columns = figure.subplots(1, len(SIZES), sharey=True)
    for axes, name in zip(columns, SIZES):
        sizes = [s["sizes"].get(name, {}) for s in summaries]
        for index, stride in enumerate(summaries[-1]["sizes"]["small"]["scale_weights"]):
            weights = [_or_nan(size.get("scale_weights", {}).get(stride)) for size in sizes]
            label = f"stride {stride}"
            axes.plot(steps, weights, "o-", color=f"C{index}", markersize=4, label=label)
        axes.set_title(_describe_size(name, sizes[-1]).replace(" (", " objects\n("), fontsize=9)
        axes.set_xlabel("steps")
    columns[0].set_ylim(0, 1)
    columns[0].set_ylabel("scale weight (mean)")
    handles, labels = columns[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=9
    )


def _plot_quartiles(axes, steps, quartiles, color, label):
    low, median, high = np.array(quartiles, dtype=float).T
    axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, median, "o-", color=color, markersize=4, label=label)


def _mark(axes, y, text):
    axes.axhline(y, color="grey", linestyle="--", linewidth=1)
    axes.annotate(
        text, (0, y), xycoords=("axes fraction", "data"), xytext=(4, 3),
        textcoords="offset points", fontsize=8, color="grey",
    )


def _put_legend_above(axes):
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)


def _describe_size(name, size):
    if not size:
        return name
    low, high = size["sqrt_area"]
    return f"{name} ({low:.0f} to {high:.0f} px)"


def _or_nan(value):
    return np.nan if value is None else value


def draw_examples(examples_by_iteration, class_names=()):
    """
    Objects of an image in rows, a training's steps in columns: the true box, the shared centre
    (+) and the heads' centres (numbered) of the query that is matched to it, and the maps of all
    heads over the image, of each place the greatest.

    Args:
        examples_by_iteration (dict[int, list[DetectionMaps]]): by the steps done, ascending, as
            of :func:`collect_examples`. Of many, some are drawn, the first and the last always.
        class_names (sequence of str):

    Returns:
        matplotlib.figure.Figure
    """
    steps = list(examples_by_iteration)
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_COLUMNS)).round().astype(int)
    columns = {steps[index]: examples_by_iteration[steps[index]] for index in chosen}
    num_rows = len(columns[steps[-1]])
    aspect = np.divide(*columns[steps[-1]][0].image.shape[:2])
    width = 2.6  # inches of a column
    size = (width * len(columns), (width * aspect + 0.2) * num_rows + 0.25)
    figure = Figure(size, dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for axes_of_step, (step, examples) in zip(grid.T, columns.items()):
        for row, (axes, example) in enumerate(zip(axes_of_step, examples)):
            name = class_name(class_names, example.class_index)
            title = f"{name} {100 * example.score:.0f}%"
            show_image(axes, dimmed(example.image), f"{step} steps\n{title}" if row == 0 else title)
            overlay_map(axes, example.combined().max(axis=0))
            draw_box(axes, example)
            number_heads(axes, example.mean_head_centres())
            draw_centre(axes, example)
    return figure
