"""Curves of a training: losses and AP over the iterations."""

import json
from typing import Dict, List, Tuple

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from smca.analysis.detections import DPI
from smca.errors import UserError

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
    """Iterations and values of each metric of a training's ``metrics.json``, which Detectron2's
    JSONWriter writes.

    Lines that are no JSON, as a run leaves that was stopped while it wrote, or have no iteration
    are skipped. Where a metric goes back to an earlier iteration, a resumed run replaces what the
    run before wrote from there on. No such file, or nothing in it, is a UserError.
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
    """Losses, and AP where there was an evaluation, over the iterations; a UserError where there is
    neither."""
    losses = {label: metrics[name] for name, label in _LOSSES.items() if name in metrics}
    results = {
        label + suffix: metrics[prefix + name]
        for prefix, suffix in (("", ""), ("ema/", ", averaged weights"))
        for name, label in _RESULTS.items()
        if prefix + name in metrics
    }
    panels = [panel for panel in (losses, results) if panel]
    if not panels:
        raise UserError("There are neither losses nor AP among the metrics.")
    figure = Figure(figsize=(6.5 * len(panels), 4.2), dpi=DPI, layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels):
        for label, columns in panel.items():
            is_line = panel is losses and len(columns[0]) > 1
            style = "s--" if label.endswith("weights") else "-" if is_line else "o-"
            axes.plot(*columns, style, label=label, markersize=4)
        if panel is losses:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.set_title("Training losses (weighted)")
        else:
            axes.set_ylim(bottom=0)
            axes.set_title("Box AP on the validation data (%)")
        axes.set_xlabel("iteration")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9)
    return figure
