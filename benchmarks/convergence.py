#!/usr/bin/env python
"""
Compare how fast configs learn. Each is trained under the same budget with several seeds; their AP
over steps and over time is a table and a picture:

    python benchmarks/convergence.py configs/convergence/shapes.yaml --jobs 2
    python benchmarks/convergence.py STUDY train.max_iter=500 --runs DETR SMCA
    python benchmarks/convergence.py STUDY --report-only

benchmarks/README.md says how a study is written. Every run trains in OUTPUT/NAME/seedN. Started
again, a study skips the trainings that are finished, and resumes those that were stopped. The
report, OUTPUT/STUDY.md and a picture of each comparison, is made of these folders' metrics.json.
"""

import argparse
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Set

from smca.analysis import read_metrics
from smca.config import load_config, quoted
from smca.errors import UserError, at_least, command_line, did_you_mean, exit_code

import numpy as np
import torch
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from scipy.stats import ttest_ind
from yaml import YAMLError

try:
    import pandas as pd
except ImportError:
    sys.exit("Error: Studies need pandas: run \"pip install 'pandas>=2'\".")

ROOT = Path(__file__).resolve().parents[1]
POLL_SECONDS = 2.0


# ---- The study


@dataclass
class RunSpec:
    """A run in the YAML file."""

    config: str
    overrides: List[str] = field(default_factory=list)
    seeds: Optional[List[int]] = None
    stop_at_ap: Optional[float] = None


@dataclass
class ClaimSpec:
    """A claim in the YAML file."""

    runs: List[str]
    published: Optional[List[float]] = None


@dataclass
class Study:
    """The YAML file."""

    runs: Dict[str, RunSpec]
    seeds: List[int] = field(default_factory=lambda: [0])
    overrides: List[str] = field(default_factory=list)
    target_ap: Optional[float] = None
    comparisons: Dict[str, List[str]] = field(default_factory=dict)
    claims: Dict[str, ClaimSpec] = field(default_factory=dict)


def read_study(path: str) -> Study:
    """Read a study. A UserError says what of it cannot be used."""
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Study), OmegaConf.load(path))
        study: Any = OmegaConf.to_object(merged)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        words = " ".join(line.strip() for line in str(error).splitlines() if "_type=" not in line)
        raise UserError(f"{path} is no study: {words}") from error
    study.comparisons = study.comparisons or {"all": list(study.runs)}
    for names in [*study.comparisons.values(), *(c.runs for c in study.claims.values())]:
        check_names(names, study, path)
    return study


def check_names(names: Sequence[str], study: Study, path: str) -> None:
    """Raise a UserError if the study has no run of such a name."""
    for name in names:
        if name not in study.runs:
            raise UserError(f"{path} has no run {name}{did_you_mean(name, study.runs)}")


class Training(NamedTuple):
    """One run of a study with one seed.

    Attributes:
        command: options of the training script.
        max_iter: its budget in steps.
        stop_at_ap: an AP in % that ends it.
    """

    name: str
    seed: int
    folder: Path
    command: List[str]
    max_iter: int
    stop_at_ap: Optional[float]

    def evaluations(self) -> pd.DataFrame:
        """Read what the training has reached.

        Returns:
            A row for each evaluation: ``iteration`` (steps completed), ``seconds``, ``AP`` and
            ``AP50`` in %. Seconds are those of training steps alone: of the logged times of a step
            the one that nine tenths exceed, since the machine may do other things as well.
        """
        try:
            metrics = read_metrics(str(self.folder / "metrics.json"))
        except UserError:  # it has not begun
            metrics = {}
        numbers, ap = metrics.get("bbox/AP", ([], []))
        # Detectron2 numbers an evaluation like the last iteration, the final one like the next.
        rows = pd.DataFrame({"iteration": [min(n + 1, self.max_iter) for n in numbers]}, dtype=int)
        times = metrics.get("time", ([], []))[1]
        rows["seconds"] = rows["iteration"] * (np.quantile(times, 0.1) if times else math.nan)
        # AP is nan where a model detects nothing at all.
        rows["AP"] = np.nan_to_num(ap)
        rows["AP50"] = np.nan_to_num(metrics.get("bbox/AP50", ([], []))[1])
        return rows.assign(name=self.name, seed=self.seed, max_iter=self.max_iter)

    def is_finished(self) -> bool:
        """Whether it was evaluated after its last step, or has the AP that ends it."""
        rows = self.evaluations()
        target = math.inf if self.stop_at_ap is None else self.stop_at_ap
        return bool((rows["iteration"] == self.max_iter).any() or (rows["AP"] >= target).any())


def make_trainings(path: str, study: Study, output: Path, opts: Sequence[str]) -> List[Training]:
    """Make the trainings of a study: all runs with the first seed, then all with the next.

    Raises:
        UserError: a config or an override cannot be used, or a folder holds another training.
    """
    trainings = []
    for name, run in study.runs.items():
        config = os.path.normpath(os.path.join(os.path.dirname(path), run.config))
        for seed in study.seeds if run.seeds is None else run.seeds:
            folder = output / name / f"seed{seed}"
            overrides = [*study.overrides, *run.overrides, *opts, f"train.seed={seed}"]
            overrides.append(f"train.output_dir={quoted(str(folder))}")
            train = load_config(config, overrides).train
            for key in ("max_iter", "eval_period"):
                if not isinstance(train[key], int) or train[key] < 1:
                    raise UserError(f"The run {name} needs a number of steps: give train.{key}=N.")
            command = ["--config-file", config, *overrides]
            file = folder / "command.txt"
            if file.is_file() and file.read_text() != shlex.join(command):
                raise UserError(
                    f"{folder} holds a training with other settings (see command.txt there): "
                    "remove it, or choose another --output."
                )
            trainings.append(Training(name, seed, folder, command, train.max_iter, run.stop_at_ap))
    return sorted(trainings, key=lambda training: training.seed)


# ---- Training


def train(trainings: Sequence[Training], jobs: int) -> int:
    """Train what is not finished, `jobs` trainings at a time, and give the number of failures.
    Each training has a process of its own. Whatever ends this ends the processes as well, which
    save where they stand."""
    waiting = [training for training in trainings if not training.is_finished()]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are finished.")
    by_folder = {training.folder: training for training in waiting}
    active: Dict[Path, subprocess.Popen] = {}
    stopped: Set[Path] = set()
    failures = 0
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                training = waiting.pop(0)
                print(f"{training.folder}: started", flush=True)
                active[training.folder] = launch(training, jobs)
            time.sleep(POLL_SECONDS)
            for folder, process in list(active.items()):
                has_ended = process.poll() is not None  # asked before its last evaluation is read
                is_finished = by_folder[folder].is_finished()
                if has_ended:
                    del active[folder]
                    failures += not is_finished
                    end = "finished" if is_finished else "failed, see console.txt there"
                    print(f"{folder}: {end}", flush=True)
                elif is_finished and by_folder[folder].stop_at_ap and folder not in stopped:
                    stopped.add(folder)
                    process.terminate()
    finally:
        for folder in active.keys() - stopped:  # a second signal would break off the saving
            active[folder].terminate()
        for process in active.values():
            process.wait()
    return failures


def launch(training: Training, jobs: int) -> subprocess.Popen:
    """Start the training script, which resumes a training that was stopped."""
    training.folder.mkdir(parents=True, exist_ok=True)
    (training.folder / "command.txt").write_text(shlex.join(training.command))
    threads = str(max(1, torch.get_num_threads() // jobs))
    with open(training.folder / "console.txt", "a") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train_net.py"), "--resume", *training.command],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            # Ctrl-C reaches this process alone, which passes it on, once.
            start_new_session=True,
        )


# ---- Report


def write_report(name: str, study: Study, trainings: Sequence[Training], output: Path) -> str:
    """Write the tables and pictures of a study, and give the tables in Markdown."""
    output.mkdir(parents=True, exist_ok=True)
    parts, rows = [f"# Convergence: {name}"], common_evaluations(trainings)
    for comparison, names in study.comparisons.items():
        begun = [run for run in names if (rows["name"] == run).any()]
        if begun:
            picture = f"{name}_{comparison}.png"
            draw(rows, begun).savefig(output / picture)
            table = markdown(make_table(rows, begun, study.target_ap))
            parts += [f"## {comparison}", table, f"![AP over steps and over time]({picture})"]
    if study.claims:
        parts += ["## Claims", markdown(make_claims(study.claims, trainings))]
    text = "\n\n".join(parts) + "\n"
    (output / f"{name}.md").write_text(text)
    return text


def markdown(table: pd.DataFrame) -> str:
    """A table of texts in Markdown."""
    return table.to_markdown(index=False, tablefmt="github", disable_numparse=True)


def common_evaluations(trainings: Sequence[Training]) -> pd.DataFrame:
    """The evaluations that all seeds of a run have, of those that have begun."""
    rows = pd.concat([training.evaluations() for training in trainings], ignore_index=True)
    num_seeds = rows.groupby("name")["seed"].transform("nunique")
    return rows[rows.groupby(["name", "iteration"])["seed"].transform("nunique") == num_seeds]


def make_table(rows: pd.DataFrame, names: Sequence[str], target: Optional[float]) -> pd.DataFrame:
    """Means over the seeds, with the lowest and the highest in brackets.

    Args:
        rows: those of :func:`common_evaluations`.
        names: runs that have some.
        target: AP in % to which the steps and minutes of the mean are counted, linear between
            evaluations. An AP that the first evaluation has is counted there.

    Returns:
        A row of texts for each run. "half" is the last evaluation within half of the steps.
    """
    table = []
    for name in names:
        run = rows[rows["name"] == name]
        steps, mean = run["iteration"].max(), run.groupby("iteration")[["seconds", "AP"]].mean()
        last, half = run[run["iteration"] == steps], run[run["iteration"] <= run["max_iter"] / 2]
        row = {"run": name, "seeds": f"{run['seed'].nunique()}", "steps": f"{steps}"}
        row.update({metric: mean_and_range(last[metric]) for metric in ("AP", "AP50")})
        row["AP, half"] = mean_and_range(half[half["iteration"] == half["iteration"].max()]["AP"])
        row["s/step"] = or_dash(last["seconds"].mean() / steps, 3)
        if target is not None:
            minutes = mean["seconds"] / 60
            row[f"steps to AP {target:g}"] = or_dash(reach(mean.index, mean["AP"], target), 0)
            row[f"minutes to AP {target:g}"] = or_dash(reach(minutes, mean["AP"], target), 1)
        table.append(row)
    return pd.DataFrame(table)


def make_claims(claims: Mapping[str, ClaimSpec], trainings: Sequence[Training]) -> pd.DataFrame:
    """Say of each claim that one run is better than another what was published, and what came out
    of the finished trainings.

    The difference of the means has its standard error. The verdict is "yes" or "no" where Welch's
    t-test gives equal runs a chance of less than 5 % to differ as much.
    """
    table = []
    finished = [training for training in trainings if training.is_finished()]
    for claim, content in claims.items():
        finals = [
            [t.evaluations()["AP"].iloc[-1] for t in finished if t.name == name]
            for name in content.runs
        ]
        published = " over ".join(map(str, content.published or [])) or "-"
        here, difference, verdict = "not trained", "-", "undecided"
        if all(finals):
            better, worse = map(np.mean, finals)
            here, difference = f"{better:.1f} over {worse:.1f}", f"{better - worse:+.1f}"
            if min(map(len, finals)) > 1:
                error = math.sqrt(sum(np.var(values, ddof=1) / len(values) for values in finals))
                difference += f" ± {error:.1f}"
                if ttest_ind(*finals, equal_var=False).pvalue < 0.05:
                    verdict = "yes" if better > worse else "no"
        seeds = " and ".join(str(len(values)) for values in finals)
        row = dict(claim=claim, published=published, here=here, difference=difference)
        table.append({**row, "seeds": seeds, "verdict": verdict})
    return pd.DataFrame(table)


def reach(x: Any, ap: Any, target: float) -> float:
    """Where AP first is `target` over x, linear between the points; nan if it never is."""
    x, ap = np.asarray(x, dtype=float), np.asarray(ap)
    above = np.flatnonzero(ap >= target)
    if not len(above):
        return math.nan
    around = [max(above[0] - 1, 0), above[0]]
    return float(np.interp(target, ap[around], x[around]))


def mean_and_range(values: pd.Series) -> str:
    """The mean, and of several values the lowest and the highest."""
    text = f" ({values.min():.1f} to {values.max():.1f})" if len(values) > 1 else ""
    return or_dash(values.mean(), 1) + text


def or_dash(value: float, digits: int) -> str:
    """A number, or a dash for nan."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "-"


def draw(rows: pd.DataFrame, names: Sequence[str]) -> Figure:
    """Draw AP over steps and over minutes, the means over the seeds and their range, with the
    arguments of :func:`make_table`."""
    figure = Figure(figsize=(11, 4.5), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for index, name in enumerate(names):
        by_step = rows[rows["name"] == name].groupby("iteration")[["seconds", "AP"]]
        mean, low, high = by_step.mean(), by_step.min()["AP"], by_step.max()["AP"]
        for axes, x in ((left, mean.index), (right, mean["seconds"] / 60)):
            axes.plot(x, mean["AP"], "o-", color=f"C{index}", markersize=3, label=name)
            axes.fill_between(x, low, high, color=f"C{index}", alpha=0.2)
            axes.grid(alpha=0.3)
    left.set(xlabel="steps", ylabel="AP (%)", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="minutes of training", xlim=(0, None))
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)))
    return figure


# ---- Command line


def run(args: argparse.Namespace) -> int:
    """The command's work; gives the exit code, 1 if a training failed."""
    study, name = read_study(args.study), Path(args.study).stem
    check_names(args.runs or [], study, args.study)
    output = args.output or Path("output", "convergence", name)
    trainings = make_trainings(args.study, study, output, args.opts)
    chosen = [t for t in trainings if t.name in (args.runs or study.runs)]
    failures = 0 if args.report_only else train(chosen, args.jobs)
    print(write_report(name, study, trainings, output))
    return int(failures > 0)


def main(argv: Optional[Sequence[str]] = None) -> int:
    """The command; gives its exit code."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("study", metavar="STUDY", help="a YAML file")
    add("--output", metavar="DIR", type=Path, help="default: output/convergence/STUDY")
    add("--runs", nargs="+", metavar="NAME", help="train these only")
    jobs = "trainings at a time, which share the CPU's threads; default: %(default)s"
    add("--jobs", type=at_least(1), default=1, metavar="N", help=jobs)
    add("--report-only", action="store_true", help="train nothing")
    add("opts", nargs="*", metavar="key=value", help="overrides of all runs")
    return exit_code(run, parser.parse_intermixed_args(argv))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
