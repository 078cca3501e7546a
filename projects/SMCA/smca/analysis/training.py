"""Pictures of what training does to the weight maps: statistics and examples over the steps."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from smca.analysis.detections import DPI, aspect, class_name
from smca.analysis.statistics import SIZES, ModulationStatistics, summarize
from smca.analysis.weight_maps import (
    DetectionMaps,
    dimmed,
    draw_box,
    draw_center,
    number_heads,
    overlay_map,
    show_image,
)

__all__ = ["draw_examples", "draw_training"]

Summary = Dict[str, Any]  # as of `summarize`

_SIZE_COLORS = dict(zip(SIZES, ("#e3a72f", "#d1495b", "#5b3a8c")))
_HEADS_COLOR, _CENTER_COLOR = "#1f77b4", "#222222"
_MAX_COLUMNS = 6  # of examples


def draw_training(statistics_by_iteration: Mapping[int, ModulationStatistics]) -> Figure:
    """Distances of centers from their objects, how far heads lie apart, radii beside the objects'
    sizes, and scale weights by the objects' size, over a training.

    What a model does not have, several heads or a selection of scales, has no panel.

    Args:
        statistics_by_iteration: by the steps done, ascending.
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


def _draw_distances(figure: SubFigure, steps: List[int], summaries: List[Summary]) -> None:
    figure.suptitle("Do centers settle on their objects?")
    distances, inside = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    for key, color, label in (
        ("head_center_distance", _HEADS_COLOR, "heads' centers"),
        ("center_distance", _CENTER_COLOR, "shared center"),
    ):
        _plot_quartiles(distances, steps, [s[key] for s in summaries], color, label)
    _mark(distances, 1, "edge of the box")
    distances.set_ylim(bottom=0)
    distances.set_ylabel("distance from the box's center\n(half boxes; median, quartiles)")
    _put_legend_above(distances)
    percent = [100 * s["head_centers_inside"] for s in summaries]
    inside.plot(steps, percent, "o-", color=_HEADS_COLOR, markersize=4)
    inside.set_ylim(0, 105)
    inside.set_ylabel("heads' centers\nin the box (%)")
    inside.set_xlabel("steps")


def _draw_deviations(figure: SubFigure, steps: List[int], summaries: List[Summary]) -> None:
    figure.suptitle("Do heads differ?")
    axes = figure.subplots()
    deviations = [s["head_deviation"] for s in summaries]
    _plot_quartiles(axes, steps, deviations, _HEADS_COLOR, "heads' centers")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("rms distance of heads' centers from their mean\n(boxes; median, quartiles)")
    axes.set_xlabel("steps")


def _draw_radii(figure: SubFigure, steps: List[int], summaries: List[Summary]) -> None:
    figure.suptitle("Do maps fit the objects' sizes?")
    radii, correlation = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    for name, color in _SIZE_COLORS.items():
        sizes = [s["sizes"].get(name, {}) for s in summaries]
        label = _describe_size(name, sizes[-1])
        values = [_or_nan(size.get("radius")) for size in sizes]
        radii.plot(steps, values, "o-", color=color, markersize=4, label=label)
        radii.axhline(_or_nan(sizes[-1].get("half_size")), color=color, linestyle=":")
    radii.plot([], [], ":", color="gray", label="half the box")
    radii.set_ylim(bottom=0)
    radii.set_ylabel("radius of the map, log-weight -1/2\n(pixels; median)")
    _put_legend_above(radii)
    values = [_or_nan(s["radius_correlation"]) for s in summaries]
    correlation.plot(steps, values, "o-", color=_HEADS_COLOR, markersize=4)
    correlation.axhline(0, color="gray", linewidth=0.8)
    correlation.set_ylim(min(0, 1.1 * np.nanmin([0, *values])), 1.05)
    correlation.set_ylabel("rank corr.\nwith the box")
    correlation.set_xlabel("steps")


def _draw_scale_weights(figure: SubFigure, steps: List[int], summaries: List[Summary]) -> None:
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


def _plot_quartiles(
    axes: Axes, steps: List[int], quartiles: List[List[Optional[float]]], color: str, label: str
) -> None:
    low, median, high = np.array(quartiles, dtype=float).T
    axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
    axes.plot(steps, median, "o-", color=color, markersize=4, label=label)


def _mark(axes: Axes, y: float, text: str) -> None:
    axes.axhline(y, color="gray", linestyle="--", linewidth=1)
    axes.annotate(
        text,
        (0, y),
        xycoords=("axes fraction", "data"),
        xytext=(4, 3),
        textcoords="offset points",
        fontsize=8,
        color="gray",
    )


def _put_legend_above(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False, fontsize=9)


def _describe_size(name: str, size: Summary) -> str:
    if not size:
        return name
    low, high = size["sqrt_area"]
    return f"{name} ({low:.0f} to {high:.0f} px)"


def _or_nan(value: Optional[float]) -> float:
    return np.nan if value is None else value


def draw_examples(
    examples_by_iteration: Mapping[int, List[DetectionMaps]], class_names: Sequence[str] = ()
) -> Figure:
    """Objects of an image in rows, a training's steps in columns.

    Each panel shows the true box, the shared center (+) and the heads' centers (numbered) of the
    query that is matched to it, and at each place of the image the greatest of the heads' maps.

    Args:
        examples_by_iteration: by the steps done, ascending, as of `collect_examples`. Of many,
            some are drawn, the first and the last always.
        class_names: a class without a name is shown by its index.
    """
    steps = list(examples_by_iteration)
    chosen = np.linspace(0, len(steps) - 1, min(len(steps), _MAX_COLUMNS)).round().astype(int)
    columns = {steps[index]: examples_by_iteration[steps[index]] for index in chosen}
    num_rows = len(columns[steps[-1]])
    width = 2.6  # inches of a column
    height = width * aspect(columns[steps[-1]][0].image) + 0.2
    size = (width * len(columns), height * num_rows + 0.25)
    figure = Figure(size, dpi=DPI, layout="constrained")
    grid = figure.subplots(num_rows, len(columns), squeeze=False)
    for axes_of_step, (step, examples) in zip(grid.T, columns.items()):
        for row, (axes, example) in enumerate(zip(axes_of_step, examples)):
            name = class_name(class_names, example.class_index)
            title = f"{name} {100 * example.score:.0f}%"
            show_image(axes, dimmed(example.image), f"{step} steps\n{title}" if row == 0 else title)
            overlay_map(axes, example.combined().max(axis=0))
            draw_box(axes, example)
            number_heads(axes, example.mean_head_centers())
            draw_center(axes, example)
    return figure
