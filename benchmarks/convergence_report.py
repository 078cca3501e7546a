"""
The report of ``compare_convergence.py``: plain data (JSON) of what every training reached,
and from it alone a table and a picture for each comparison.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence

from smca.checkpoint.files import write_atomically
from smca.errors import UserError

import numpy as np
from matplotlib.figure import Figure
from scipy.stats import ttest_ind
from yaml import YAMLError

try:
    import pandas as pd
except ImportError as error:
    raise ImportError("Studies need pandas: run \"pip install 'pandas>=2'\".") from error

__all__ = ["COLUMNS", "Report", "draw", "evaluations", "join", "make_claims", "make_table", "reach"]
__all__ += ["read_file", "read_report", "write_report"]

_MIN_TARGET_AP = 1.0  # %; steps to less than this compare noise
_RUN_COLUMNS = ("name", "seed", "num_parameters", "max_iter")
_SAME_STUDY = ("overrides", "iterations_per_epoch", "evaluation_columns")
_SAME_TRAINING = (*_RUN_COLUMNS, "config", "overrides")
COLUMNS = ("iteration", "epoch", "seconds", "AP", "AP50")

Report = Dict[str, Any]


def read_file(path: str, parse: Callable[[str], Any], kind: str) -> Any:
    """The content of a file, `parse` of its text.

    Raises:
        UserError: it cannot be read or is not of its `kind`.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, YAMLError) as error:
        raise UserError(f"{path} is no {kind} file: {' '.join(str(error).split())}") from error


def read_report(path: str) -> Report:
    """
    Raises:
        UserError: it is missing or no report.
    """
    report = read_file(path, json.loads, "JSON")
    if not isinstance(report, dict) or "evaluation_columns" not in report:
        raise UserError(f"{path} is no report of a study.")
    return report


def join(report: Report, path: str) -> Report:
    """
    Args:
        path: of an earlier report of the study, perhaps of trainings on other machines. There need
            not be one.

    Returns:
        `report` with the earlier one's rows of the trainings that got further there.

    Raises:
        UserError: rows would be lost, of other settings (config, overrides, parameters, steps), of
            other data, or of runs that the study does not have.
    """
    if not os.path.isfile(path):
        return report
    former = read_report(path)
    rows = {_identity(former, run): run for run in former["runs"] if run["evaluations"]}
    identities = [_identity(report, run) for run in report["runs"]]
    num_lost = len(rows.keys() - set(identities))
    if num_lost:
        raise UserError(
            f"{path} has {num_lost} trainings of other settings or data, or of runs that the study "
            "does not have, which would be lost: choose another --report-dir."
        )
    pairs = zip(report["runs"], identities)
    runs = [max(run, rows.get(identity, run), key=_steps) for run, identity in pairs]
    return {**report, "runs": runs}


def _identity(report: Report, run: Dict[str, Any]) -> str:
    study = [report.get(key) for key in _SAME_STUDY]
    return json.dumps([*study, *(run[key] for key in _SAME_TRAINING)])


def _steps(run: Dict[str, Any]) -> int:
    return run["evaluations"][-1][0] if run["evaluations"] else 0


def write_report(report: Report, folder: str) -> List[str]:
    """
    Write STUDY.json, STUDY.md, and for each comparison STUDY_COMPARISON.png, from the report
    alone. A comparison whose baseline has not been trained is left out.

    Returns:
        Their paths.
    """
    start = os.path.join(folder, report["study"])
    paths = [f"{start}.json", f"{start}.md"]
    write_atomically(paths[0], lambda file: file.write(_to_json(report).encode()))
    sections = [f"# Convergence: {report['study']}"]
    rows = evaluations(report)
    for comparison, names in report["comparisons"].items():
        trained = [name for name in names if (rows["name"] == name).any()]
        if trained[:1] != names[:1]:  # there is nothing to compare with yet
            continue
        paths.append(f"{start}_{comparison}.png")
        draw(rows, trained).savefig(paths[-1])
        picture = f"![AP over steps, epochs and time]({os.path.basename(paths[-1])})"
        table = make_table(rows, trained, report["target_ap"])
        sections += [f"## {comparison}", table, picture]
    if report.get("claims"):
        sections += ["## Claims", _markdown(make_claims(report))]
    sections.append(_describe_runs(report))
    Path(paths[1]).write_text("\n\n".join(sections) + "\n")
    return paths


def _to_json(report: Report) -> str:
    """One run a line."""
    head = json.dumps({**report, "runs": []}, indent=1)
    runs = ",\n".join(json.dumps(run) for run in report["runs"])
    return head.replace('"runs": []', f'"runs": [\n{runs}\n]') + "\n"


def _describe_runs(report: Report) -> str:
    lines = ["## Runs", ""]
    for name, run in {run["name"]: run for run in report["runs"]}.items():
        lines.append(f"- {name}: `{' '.join([run['config'], *run['overrides']])}`")
    if report["overrides"]:
        lines += ["", f"All runs: `{' '.join(report['overrides'])}`."]
    return "\n".join(lines)


def evaluations(report: Report) -> pd.DataFrame:
    """
    Returns:
        A row for each evaluation that all seeds of a run have (those that have begun), with
        ``name``, ``seed``, ``num_parameters``, ``max_iter`` (the budget in steps), ``iteration``,
        ``epoch``, ``seconds`` of training, ``AP`` and ``AP50`` in %.
    """
    rows = [
        [*(run[column] for column in _RUN_COLUMNS), *row]
        for run in report["runs"]
        for row in run["evaluations"]
    ]
    frame = pd.DataFrame(rows, columns=[*_RUN_COLUMNS, *COLUMNS])
    frame["seconds"] = frame["seconds"].astype(float)  # None: nan
    num_seeds = frame.groupby("name")["seed"].transform("nunique")
    num_here = frame.groupby(["name", "iteration"])["seed"].transform("nunique")
    return frame[num_here == num_seeds]


def make_table(rows: pd.DataFrame, names: Sequence[str], target_ap: Optional[float] = None) -> str:
    """
    Means over the seeds, lowest and highest in brackets. Half is the last evaluation within half
    of the run's steps. The steps to an AP are those of the mean over the seeds, linear between
    evaluations; an AP that the first evaluation has is counted there.

    Args:
        rows: of :func:`evaluations`.
        names: of runs that have some, the baseline first.
        target_ap: in %. If the baseline does not reach it, or it is None, the steps to the
            baseline's last AP are counted, too.

    Returns:
        Markdown.
    """
    runs = [rows[rows["name"] == name] for name in names]
    means = [run.groupby("iteration")[["seconds", "AP"]].mean() for run in runs]
    table = pd.DataFrame([_describe(name, run) for name, run in zip(names, runs)])
    last = means[0]["AP"].iloc[-1]
    has_target = target_ap is not None and target_ap >= _MIN_TARGET_AP
    falls_short = target_ap is None or last < target_ap
    counts_last = falls_short and last >= _MIN_TARGET_AP
    if target_ap is not None and has_target:
        table = table.assign(**_to_reach(target_ap, means))
    parts = [_markdown(table)]
    if counts_last:
        parts.append(_markdown(table[["run"]].assign(**_to_reach(last, means))))
    elif falls_short:
        parts.append(f"{names[0]} stays at AP {last:.2f}: too little to count the steps to it.")
    if has_target or counts_last:
        parts.append(f"The ratios are of {names[0]}'s steps and time to the run's.")
    return "\n\n".join(parts)


def make_claims(report: Report) -> pd.DataFrame:
    """Of each claim that one run is better than another what was published, and what came out.

    Only finished trainings count. The difference of two means has its standard error, the root of
    the sum of the variances over the numbers of seeds; "yes" and "no" are said where Welch's t-test
    gives a chance of less than 5 % to so large a difference of equal runs, else "undecided".

    Returns:
        A row for each claim, of texts.
    """
    rows = []
    for claim, content in report["claims"].items():
        better, worse = (
            [run["final"]["AP"] for run in report["runs"] if run["name"] == name and run["final"]]
            for name in content["runs"]
        )
        published = " over ".join(map(str, content.get("published", ["-"])))
        row = {"claim": claim, "published": published}
        rows.append(row)
        if not better or not worse:
            row.update(here="not trained", difference="-", seeds="-", verdict="undecided")
            continue
        means = np.mean(better), np.mean(worse)
        difference, verdict = f"{means[0] - means[1]:+.1f}", "undecided"
        if min(len(better), len(worse)) > 1:
            variances = [np.var(values, ddof=1) / len(values) for values in (better, worse)]
            difference += f" ± {math.sqrt(sum(variances)):.1f}"
            if ttest_ind(better, worse, equal_var=False).pvalue < 0.05:
                verdict = "yes" if means[0] > means[1] else "no"
        row.update(
            here=f"{means[0]:.1f} over {means[1]:.1f}",
            difference=difference,
            seeds=f"{len(better)} and {len(worse)}",
            verdict=verdict,
        )
    return pd.DataFrame(rows)


def _describe(name: str, run: pd.DataFrame) -> Dict[str, str]:
    """A run's row in the table."""
    within = run[run["iteration"] <= run["max_iter"] / 2]
    last, half = (part[part["iteration"] == part["iteration"].max()] for part in (run, within))
    steps = run["iteration"].max()
    return {
        "run": name,
        "parameters": f"{run['num_parameters'].iloc[0] / 1e6:.2f}M",
        "seeds": f"{run['seed'].nunique()}",
        "steps": f"{steps}",
        "AP": _mean_and_range(last["AP"]),
        "AP50": _mean_and_range(last["AP50"]),
        "AP, half": _mean_and_range(half["AP"]),
        "AP50, half": _mean_and_range(half["AP50"]),
        "s/step": _or_dash(last["seconds"].mean() / steps, 3),
    }


def _markdown(table: pd.DataFrame) -> str:
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def _to_reach(target: float, means: Sequence[pd.DataFrame]) -> Dict[str, List[str]]:
    """Columns with the steps and minutes to an AP."""
    columns = {}
    for unit, ratio, digits in (("steps", "steps ratio", 0), ("minutes", "time ratio", 1)):
        xs = [m.index.to_numpy() if unit == "steps" else m["seconds"] / 60 for m in means]
        spent = [reach(x, mean["AP"], target) for x, mean in zip(xs, means)]
        columns[f"{unit} to AP {target:.1f}"] = [_or_dash(x, digits) for x in spent]
        columns[ratio] = _ratios(spent, baseline_end=np.asarray(xs[0])[-1])
    return columns


def reach(x: Iterable[float], ap: Iterable[float], target: float) -> Optional[float]:
    """
    Args:
        x, ap: (E,) each. target: of ap.

    Returns:
        x where `ap` first is `target`, None if it never is.
    """
    x, ap = np.asarray(x), np.asarray(ap)
    above = np.flatnonzero(ap >= target)
    if not len(above):
        return None
    around = [max(above[0] - 1, 0), above[0]]
    return float(np.interp(target, ap[around], x[around]))


def _ratios(spent: Sequence[Optional[float]], baseline_end: float) -> List[str]:
    """Of the first, the baseline, to each; a bound if the baseline ends before it is there."""
    baseline = spent[0]
    sign, baseline = ("> ", baseline_end) if baseline is None else ("", baseline)
    return [f"{sign}{baseline / x:.1f}" if x and math.isfinite(x) else "-" for x in spent]


def _mean_and_range(values: pd.Series) -> str:
    text = _or_dash(values.mean(), 1)
    return text if len(values) < 2 else f"{text} ({values.min():.1f} to {values.max():.1f})"


def _or_dash(value: Optional[float], digits: int) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def draw(rows: pd.DataFrame, names: Sequence[str]) -> Figure:
    """AP and AP50 over steps, epochs and minutes: means over the seeds, from lowest to highest.

    Args:
        rows, names: see :func:`make_table`.
    """
    figure = Figure(figsize=(13, 7.5), dpi=120, layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for index, name in enumerate(names):
        by_step = rows[rows["name"] == name].groupby("iteration")
        means, lows, highs = by_step.mean(numeric_only=True), by_step.min(), by_step.max()
        for axes_row, metric in zip(grid, ("AP", "AP50")):
            for axes, x in zip(axes_row, (means.index, means["epoch"], means["seconds"] / 60)):
                color, band = f"C{index}", (lows[metric], highs[metric])
                axes.plot(x, means[metric], "o-", color=color, markersize=3, label=name)
                axes.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
    for axes in grid.flat:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
    for axes_row, label in zip(grid, ("AP (%)", "AP50 (%)")):
        axes_row[0].set_ylabel(label)
    for axes, label in zip(grid[1], ("steps", "epochs", "minutes of training")):
        axes.set_xlabel(label)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure
