"""Pictures of what training does to the weight maps: statistics and examples over the steps."""

from typing import Any, Dict, List, Mapping, NamedTuple, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from smca.analysis.detections import DPI, aspect, class_name
from smca.analysis.statistics import ModulationStatistics, summarize
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

_MAX_COLUMNS = 6  # of examples


class _Panel(NamedTuple):
    """Lines over the steps: values (N,), or quartiles (N, 3); and a dotted level for each."""

    title: str
    label: str
    lines: Dict[str, np.ndarray]
    levels: Sequence[float] = ()


def draw_training(statistics_by_iteration: Mapping[int, ModulationStatistics]) -> Figure:
    """Draw how far centers are from their objects and heads from one another, radii beside the
    objects' sizes, and scale weights by the objects' size, over a training.

    What a model does not have, several heads or a selection of scales, has no panel.

    Args:
        statistics_by_iteration: by the number of steps done, ascending.
    """
    steps = list(statistics_by_iteration)
    panels = _panels([summarize(statistics) for statistics in statistics_by_iteration.values()])
    num_rows = -(-len(panels) // 3)
    figure = Figure((15, 4 * num_rows), dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(num_rows, 3).flat, panels):
        for index, (name, values) in enumerate(panel.lines.items()):
            low, median, high = values.T if values.ndim == 2 else [values] * 3
            axes.fill_between(steps, low, high, color=f"C{index}", alpha=0.18, linewidth=0)
            axes.plot(steps, median, "o-", color=f"C{index}", markersize=4, label=name)
        for index, level in enumerate(panel.levels):
            axes.axhline(level, color=f"C{index}", linestyle=":")
        axes.set(title=panel.title, ylabel=panel.label, xlabel="steps")
        axes.set_xlim(0, 1.02 * steps[-1])
        low, high = axes.get_ylim()
        axes.set_ylim(min(0, low), high + 0.1 * (high - min(0, low)))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    return figure


def _panels(summaries: Sequence[Dict[str, Any]]) -> List[_Panel]:
    def column(key: str) -> np.ndarray:
        return np.array([summary[key] for summary in summaries], dtype=float)  # None becomes nan

    def sizes(name: str, key: str) -> np.ndarray:
        found = [summary["sizes"].get(name, {}).get(key) for summary in summaries]
        return np.array(found, dtype=float)

    last, titles = summaries[-1]["sizes"], {}
    for name, size in last.items():
        titles[name] = "{} ({:.0f} to {:.0f} pixels)".format(name, *size["sqrt_area"])
    centers = {"heads' centers": column("head_center_distance")}
    inside = {"heads' centers": 100 * column("head_centers_inside")}
    radii = {title: sizes(name, "radius") for name, title in titles.items()}
    half_boxes = [sizes(name, "half_size")[-1] for name in titles]
    panels = [
        _Panel("Do centers settle on their objects?", "distance in half boxes", centers, [1]),
        _Panel("Are they inside the boxes?", "share of the heads' centers (%)", inside),
        _Panel(
            "Do maps fit the objects?", "radius (pixels; dotted: half the box)", radii, half_boxes
        ),
    ]
    if "head_deviation" in summaries[-1]:
        lines = {"heads' centers": column("head_deviation")}
        panels.insert(2, _Panel("Do heads differ?", "rms distance from their mean (boxes)", lines))
    for name, title in titles.items():
        for stride in last[name].get("scale_weights", {}):
            weights = [s["sizes"].get(name, {}).get("scale_weights", {}) for s in summaries]
            values = np.array([each.get(stride) for each in weights], dtype=float)
            if panels[-1].title != title:
                panels.append(_Panel(title, "scale weight (mean)", {}))
            panels[-1].lines[f"stride {stride}"] = values
    return panels


def draw_examples(
    examples_by_iteration: Mapping[int, List[DetectionMaps]], class_names: Sequence[str] = ()
) -> Figure:
    """Objects of an image in rows, a training's steps in columns.

    Each panel shows the true box, the shared center (+) and the heads' centers (numbered) of the
    query that is matched to it, and at each place of the image the greatest of the heads' maps.

    Args:
        examples_by_iteration: by the number of steps done, ascending; from `collect_examples`. Of
            many, six are drawn, among them the first and the last.
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
            _draw_example(axes, example, f"{step} steps\n{title}" if row == 0 else title)
    return figure


def _draw_example(axes: Axes, example: DetectionMaps, title: str) -> None:
    show_image(axes, dimmed(example.image), title)
    overlay_map(axes, example.combined().max(axis=0))
    draw_box(axes, example)
    number_heads(axes, example.mean_head_centers())
    draw_center(axes, example)
