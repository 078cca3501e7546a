"""Curves of a training: losses and AP over the iterations."""

import json
import math
from typing import Dict, List, Tuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from smca.analysis.detections import DPI
from smca.errors import UserError

__all__ = ["draw_curves", "read_metrics"]

# Of each metric its iterations and values.
Metrics = Dict[str, Tuple[List[int], List[float]]]

_LOSSES = {
    "total_loss": "total (all layers)",
    "loss_ce": "class, last layer",
    "loss_bbox": "L1, last layer",
    "loss_giou": "GIoU, last layer",
}
_RESULTS = {"bbox/AP": "AP", "bbox/AP50": "AP50", "bbox/AP75": "AP75"}


def read_metrics(path: str) -> Metrics:
    """Read the ``metrics.json`` of a training.

    Lines that are no JSON, as a run leaves that was stopped while it wrote, or have no iteration
    are skipped. Where a metric goes back to an earlier iteration, a resumed run replaces what the
    run before wrote from there on.

    Args:
        path: of a file with one JSON object with ``iteration`` a line, as Detectron2's JSONWriter
            writes.

    Returns:
        Iterations and values of each metric.

    Raises:
        UserError: there is no such file, or there is nothing in it.
    """
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            lines = file.read().splitlines()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    found: Dict[str, Dict[int, float]] = {}  # iterations ascend
    for line in lines:
        try:
            row = json.loads(line)
            iteration = row.pop("iteration")
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
        if not isinstance(iteration, int):
            continue
        values = {name: v for name, v in row.items() if isinstance(v, (int, float))}
        # A row of an earlier iteration alone is no sign of a resumed run, for JSONWriter writes an
        # evaluation after the log step that follows it; a metric that goes back is one.
        if any(iteration < next(reversed(found.get(name, {})), -1) for name in values):
            found = {
                name: {i: v for i, v in before.items() if i <= iteration}
                for name, before in found.items()
            }
        for name, value in values.items():
            found.setdefault(name, {})[iteration] = value
    metrics = {name: (list(v), list(v.values())) for name, v in found.items() if v}
    if not metrics:
        raise UserError(f"{path} holds no metrics.")
    return metrics


def draw_curves(metrics: Metrics) -> Figure:
    """Losses, and AP where there was an evaluation, over the iterations.

    Args:
        metrics: as of `read_metrics`; what is absent is left out.

    Raises:
        UserError: there is nothing to draw.
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


def _draw_losses(axes: Axes, metrics: Metrics) -> None:
    for index, (name, label) in enumerate(_LOSSES.items()):
        if name in metrics:
            color, linewidth = ("black", 1.8) if index == 0 else (f"C{index}", 1.3)
            axes.plot(*metrics[name], label=label, color=color, linewidth=linewidth)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title("Training losses (weighted)")


def _draw_results(axes: Axes, metrics: Metrics) -> None:
    highest = 0.0
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
