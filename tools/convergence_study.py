"""
How fast trainings learn: what each has reached after how many steps, epochs and minutes, and a
report that compares them: JSON, a table and pictures. ``tools/compare_convergence.py`` trains.
"""

import json
import math
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import smca.configs
import torch
from detectron2.config import LazyConfig, instantiate
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from smca.analysis import read_metrics
from smca.errors import UserError

__all__ = [
    "Curve",
    "Study",
    "Training",
    "draw",
    "make_report",
    "make_table",
    "reach",
    "read_report",
    "write_report",
]

_MIN_TARGET_AP = 1.0  # %; steps to less than this compare noise
# What config.yaml says of the place, of the machine and of what is kept: nothing that is learnt.
_LOCAL_SETTINGS = ("train.output_dir", "train.device", "train.checkpointer.")
_COLUMNS = ("iteration", "epoch", "seconds", "AP", "AP50")


@dataclass(frozen=True, eq=False)
class Training:
    """
    One run of a study with one seed.

    Attributes:
        name: of the run.
        own_overrides: those of this run alone. overrides: all, as the training script gets them.
        stop_at_ap: in %: the first evaluation with this AP ends the training.
        cfg: the config with all overrides.
    """

    name: str
    seed: int
    folder: str
    config_file: str
    own_overrides: Tuple[str, ...]
    overrides: Tuple[str, ...]
    stop_at_ap: Optional[float]
    cfg: DictConfig

    def __str__(self):
        return f"{self.name}, seed {self.seed}"

    @property
    def max_iter(self) -> int:
        return self.cfg.train.max_iter

    @cached_property
    def settings(self) -> Dict[str, Any]:
        """The config as config.yaml in a training's folder says it, flat."""
        with tempfile.TemporaryDirectory() as folder:
            file = os.path.join(folder, "config.yaml")
            LazyConfig.save(self.cfg, file)
            return _read_settings(file)

    def evaluations(self) -> List[List[float]]:
        """Rows of (iteration, AP, AP50) in %; iterations are those completed."""
        metrics = self._metrics()
        # Detectron2 numbers an evaluation like the last iteration, the final one like the next.
        rows = zip(*metrics.get("bbox/AP", ([], [])), metrics.get("bbox/AP50", ([], []))[1])
        return [[min(i + 1, self.max_iter), _or_zero(ap), _or_zero(ap50)] for i, ap, ap50 in rows]

    def seconds(self, iterations) -> List[Optional[float]]:
        """
        Time in training steps up to each of `iterations`, without evaluations, checkpoints and
        starting up: of the times of a step that the training logged, the one that nine tenths
        exceed, so that what else the machine did meanwhile does not count. None if there are none
        (the first two steps have no times).
        """
        _, step_seconds = self._metrics().get("time", ([], []))
        if not step_seconds:
            return [None] * len(iterations)
        seconds_per_step = float(np.quantile(step_seconds, 0.1))
        return [round(iteration * seconds_per_step, 2) for iteration in iterations]

    def _metrics(self):
        try:
            return read_metrics(os.path.join(self.folder, "metrics.json"))
        except UserError:  # it has not begun
            return {}

    def is_finished(self) -> bool:
        last = [iteration for iteration, _, _ in self.evaluations()[-1:]]
        return last == [self.max_iter] or self.has_stopped_early()

    def has_stopped_early(self) -> bool:
        target = math.inf if self.stop_at_ap is None else self.stop_at_ap
        return any(ap >= target for _, ap, _ in self.evaluations())

    def check_folder(self):
        """
        Raises:
            UserError: the folder holds a training with other settings.
        """
        file = os.path.join(self.folder, "config.yaml")
        here = self.settings
        there = _read_settings(file) if os.path.isfile(file) else here
        for key in [*there, *here]:
            if not key.startswith(_LOCAL_SETTINGS) and there.get(key) != here.get(key):
                raise UserError(
                    f"{self.folder} holds a training with other settings ({key} is "
                    f"{there.get(key)} there, {here.get(key)} now): remove it, or choose another "
                    "--output."
                )


@dataclass(frozen=True)
class Study:
    """
    Attributes:
        overrides: those of all runs. target_ap: in %, or None.
        comparisons: names of runs by the name of the comparison, the baseline first.
    """

    name: str
    output_dir: str
    overrides: Tuple[str, ...]
    target_ap: Optional[float]
    trainings: List[Training]
    comparisons: Dict[str, List[str]]


def _read_settings(file):
    """{"train.seed": 0, ...}; references to other keys stay as they are."""
    return _flat(OmegaConf.to_container(LazyConfig.load(file), resolve=False))


def _flat(section, prefix=""):
    values = {}
    for name, value in section.items():
        if isinstance(value, dict) and value:
            values.update(_flat(value, f"{prefix}{name}."))
        else:
            values[f"{prefix}{name}"] = value
    return values


# The report: plain data from which table and pictures are made


def make_report(study):
    """
    Returns:
        dict: the study and, of each training, what it is and its evaluations.

    Raises:
        UserError: the data are missing.
    """
    loader = study.trainings[0].cfg.dataloader.train  # the same for all runs
    iterations_per_epoch = len(instantiate(loader.dataset)) / loader.total_batch_size
    cfgs = {training.name: training.cfg for training in study.trainings}
    num_parameters = {name: _num_parameters(cfg) for name, cfg in cfgs.items()}
    runs = []
    for training in study.trainings:
        evaluations = training.evaluations()
        seconds = training.seconds([row[0] for row in evaluations])
        rows = [
            [iteration, round(iteration / iterations_per_epoch, 3), spent, ap, ap50]
            for (iteration, ap, ap50), spent in zip(evaluations, seconds)
        ]
        runs.append(
            {
                "name": training.name,
                "config": _display_path(training.config_file),
                "overrides": list(training.own_overrides),
                "seed": training.seed,
                "num_parameters": num_parameters[training.name],
                "max_iter": training.max_iter,
                "evaluations": rows,
                "final": dict(zip(_COLUMNS, rows[-1])) if training.is_finished() else None,
            }
        )
    return {
        "study": study.name,
        # Without those that say where the data lie here.
        "overrides": [text for text in study.overrides if not text.startswith("data.")],
        "target_ap": study.target_ap,
        "comparisons": study.comparisons,
        "iterations_per_epoch": iterations_per_epoch,
        "evaluation_columns": list(_COLUMNS),
        "runs": runs,
    }


def _num_parameters(cfg):
    with torch.device("meta"):
        model = instantiate(cfg.model)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _display_path(path):
    """Without the place of the repository; of other files the name alone."""
    path, root = Path(path).resolve(), Path(smca.configs.__file__).resolve().parents[1]
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name


def _or_zero(value):
    """Detectron2's AP is nan where a model detects nothing at all."""
    return 0.0 if math.isnan(value) else round(value, 3)


def read_report(path):
    """
    Raises:
        UserError: it is missing or no report.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The report {path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON file ({error}).") from error
    if not isinstance(report, dict) or "evaluation_columns" not in report:
        raise UserError(f"{path} is no report of a study.")
    return report


def write_report(report, folder):
    """
    Write STUDY.json, STUDY.md, and for each comparison STUDY_COMPARISON.png, from the report
    alone. A comparison whose baseline has not been trained is left out.

    Returns:
        list[str]: their paths.
    """
    os.makedirs(folder or ".", exist_ok=True)
    start = os.path.join(folder, report["study"])
    paths = [f"{start}.json", f"{start}.md"]
    Path(paths[0]).write_text(_to_json(report))
    sections = [f"# Convergence: {report['study']}"]
    for name, run_names in report["comparisons"].items():
        baseline, *others = [Curve.of(report, run_name) for run_name in run_names]
        if baseline is None:  # there is nothing to compare with yet
            continue
        curves = [baseline, *filter(None, others)]
        paths.append(f"{start}_{name}.png")
        draw(curves).savefig(paths[-1])
        picture = f"![AP over steps, epochs and time]({os.path.basename(paths[-1])})"
        sections += [f"## {name}", make_table(curves, report["target_ap"]), picture]
    sections.append(_describe_runs(report))
    Path(paths[1]).write_text("\n\n".join(sections) + "\n")
    return paths


def _to_json(report):
    """One run a line."""
    head = json.dumps({**report, "runs": []}, indent=1)
    runs = ",\n".join(json.dumps(run) for run in report["runs"])
    return head.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n"


def _describe_runs(report):
    lines = ["## Runs", ""]
    for name, run in {run["name"]: run for run in report["runs"]}.items():
        lines.append(f"- {name}: `{' '.join([run['config'], *run['overrides']])}`")
    if report["overrides"]:
        lines += ["", f"All runs: `{' '.join(report['overrides'])}`."]
    return "\n".join(lines)


@dataclass(frozen=True)
class Curve:
    """
    The evaluations of a run that all its seeds have.

    Attributes:
        max_iter: the budget in steps.
        iterations, epochs: (E,), of E evaluations.
        seconds, ap, ap50: (seeds, E), of training and in %.
    """

    name: str
    num_parameters: int
    max_iter: int
    iterations: np.ndarray
    epochs: np.ndarray
    seconds: np.ndarray
    ap: np.ndarray
    ap50: np.ndarray

    @classmethod
    def of(cls, report, name):
        """The run of this name, or None if no seed has been evaluated; seeds that have not been
        are left out."""
        runs = [run for run in report["runs"] if run["name"] == name and run["evaluations"]]
        if not runs:
            return None
        seeds = [{row[0]: row for row in run["evaluations"]} for run in runs]
        common = sorted(set.intersection(*map(set, seeds)))  # they are evaluated at equal steps
        rows = np.array([[rows[i] for i in common] for rows in seeds], dtype=float)
        iterations, epochs = rows[0, :, 0], rows[0, :, 1]
        about = (name, runs[0]["num_parameters"], runs[0]["max_iter"])
        return cls(*about, iterations, epochs, *rows[:, :, 2:].transpose(2, 0, 1))


# Table


def make_table(curves, target_ap=None):
    """
    Means over the seeds, lowest and highest in brackets. Half is the last evaluation within half
    of the run's steps. The steps to an AP are those of the mean over the seeds, linear between
    evaluations; an AP that the first evaluation has is counted there.

    Args:
        curves (list[Curve]): the first is the baseline.
        target_ap (float or None): in %. If the baseline does not reach it, or it is None, the
            steps to the baseline's last AP are counted, too.

    Returns:
        str: Markdown.
    """
    baseline = curves[0]
    last = baseline.ap.mean(0)[-1]
    columns = {
        "run": [curve.name for curve in curves],
        "parameters": [f"{curve.num_parameters / 1e6:.2f}M" for curve in curves],
        "seeds": [str(len(curve.ap)) for curve in curves],
        "steps": [f"{curve.iterations[-1]:.0f}" for curve in curves],
        "AP": [_mean_and_range(curve.ap[:, -1]) for curve in curves],
        "AP50": [_mean_and_range(curve.ap50[:, -1]) for curve in curves],
        "AP, half": [_at_half(curve, curve.ap) for curve in curves],
        "AP50, half": [_at_half(curve, curve.ap50) for curve in curves],
        "s/step": [_number(c.seconds[:, -1].mean() / c.iterations[-1], 3) for c in curves],
    }
    has_target = target_ap is not None and target_ap >= _MIN_TARGET_AP
    falls_short = target_ap is None or last < target_ap
    counts_last = falls_short and last >= _MIN_TARGET_AP
    if has_target:
        columns.update(_to_reach(target_ap, curves))
    parts = [_markdown(columns)]
    if counts_last:
        parts.append(_markdown({"run": columns["run"], **_to_reach(last, curves)}))
    elif falls_short:
        why = "too little to count the steps to it"
        parts.append(f"{baseline.name} stays at AP {last:.2f}: {why}.")
    if has_target or counts_last:
        parts.append(f"The ratios are of {baseline.name}'s steps and time to the run's.")
    return "\n\n".join(parts)


def _markdown(columns):
    rows = list(zip(*columns.values()))
    return tabulate(rows, headers=list(columns), tablefmt="github", disable_numparse=True)


def _to_reach(target, curves):
    """Columns with the steps and minutes to an AP."""
    steps = [(reach(c.iterations, c.ap.mean(0), target), c.iterations[-1]) for c in curves]
    minutes = [c.seconds.mean(0) / 60 for c in curves]
    minutes = [(reach(m, c.ap.mean(0), target), m[-1]) for m, c in zip(minutes, curves)]
    return {
        f"steps to AP {target:.1f}": [_number(reached, 0) for reached, _ in steps],
        "steps ratio": _ratios(steps),
        f"minutes to AP {target:.1f}": [_number(reached, 1) for reached, _ in minutes],
        "time ratio": _ratios(minutes),
    }


def reach(x, ap, target):
    """
    Args:
        x, ap (np.ndarray): (E,) each. target (float): of ap.

    Returns:
        float or None: x where `ap` first is `target`, None if it never is.
    """
    above = np.flatnonzero(ap >= target)
    if not len(above):
        return None
    first = above[0]
    before = max(first - 1, 0)
    return float(np.interp(target, ap[[before, first]], x[[before, first]]))


def _ratios(reached_and_last):
    """Of the first, the baseline, to each; a bound if the baseline ends before it is there."""
    baseline, last = reached_and_last[0]
    ratios = []
    for reached, _ in reached_and_last:
        if not reached or not math.isfinite(reached):
            ratios.append("-")
        elif baseline is None:
            ratios.append(f"> {last / reached:.1f}")
        else:
            ratios.append(f"{baseline / reached:.1f}")
    return ratios


def _at_half(curve, values):
    within = np.flatnonzero(curve.iterations <= curve.max_iter / 2)
    return _mean_and_range(values[:, within[-1]]) if len(within) else "-"


def _mean_and_range(values):
    text = _number(values.mean(), 1)
    return text if len(values) == 1 else f"{text} ({values.min():.1f} to {values.max():.1f})"


def _number(value, digits):
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


# Picture


def draw(curves):
    """
    AP and AP50 over steps, epochs and minutes: means over the seeds, from lowest to highest.

    Returns:
        matplotlib.figure.Figure
    """
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for index, curve in enumerate(curves):
        minutes = curve.seconds.mean(0) / 60
        for row, values in zip(grid, (curve.ap, curve.ap50)):
            for axes, x in zip(row, (curve.iterations, curve.epochs, minutes)):
                color = f"C{index}"
                axes.plot(x, values.mean(0), "o-", color=color, markersize=3, label=curve.name)
                low, high = values.min(0), values.max(0)
                axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for row, name in zip(grid, ("AP (%)", "AP50 (%)")):
        row[0].set_ylabel(name)
    for axes, name in zip(grid[1], ("steps", "epochs", "minutes of training")):
        axes.set_xlabel(name)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure
