#!/usr/bin/env python
"""
Compare how fast configs learn: train each under the same budget with several seeds, and write
their AP over steps, epochs and time as JSON, a table and pictures:

    compare_convergence.py configs/convergence/shapes.yaml --jobs 2
    compare_convergence.py STUDY train.max_iter=500 --runs DETR SMCA
    compare_convergence.py STUDY --report-only --report-dir docs/convergence
    compare_convergence.py docs/convergence/shapes.json

A study is a YAML file (relative paths start at its folder):

    seeds: [0, 1]
    overrides: [train.max_iter=2000, train.eval_period=200]     # of all runs
    target_ap: 20       # count the steps to this AP (in %); left out: the baseline's final AP
    runs:
      DETR: {config: ../detr_shapes.py}
      SMCA: {config: ../smca_shapes.py, overrides: [optimizer.lr=2.5e-4]}
      DETR, longer:
        config: ../detr_shapes.py
        overrides: [train.max_iter=20000]
        seeds: [0]
        stop_at_ap: 20  # ends at the first evaluation with this AP
    comparisons:        # a table and a picture each, the first run is the baseline;
      main: [DETR, SMCA]                                        # left out: one with all runs
      longer: ["DETR, longer", SMCA]
    claims:             # a table of what was published and what came out, the better run first
      modulation: {runs: [SMCA, DETR], published: [41.0, 34.8]}

Every run trains in OUTPUT/NAME/seedN. Started again, a study goes on where it was stopped, and
finished runs stay as they are, also those that --report-dir has a report of, from another machine.
A report (.json) in place of the study is drawn again by itself.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Set

from smca.errors import UserError, exit_code

import torch
from tqdm import tqdm

try:
    # It says what to do without pandas.
    from convergence_report import Report, join, read_report, write_report
    from convergence_study import Evaluation, Training, make_report, read_study, select
except ImportError as error:
    if __name__ != "__main__":
        raise
    sys.exit(f"Error: {error}")

ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 2.0


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("study", metavar="STUDY", help="a study (.yaml) or a report (.json)")
    add("--output", metavar="DIR", help="of the trainings; default: output/convergence/STUDY")
    add("--report-dir", metavar="DIR", help="of JSON, table and pictures; default: OUTPUT")
    add("--runs", nargs="+", metavar="NAME", help="train these only")
    jobs = "trainings at a time, which share the CPU's threads; default: %(default)s"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    add("--report-only", action="store_true", help="train nothing")
    add("opts", nargs="*", metavar="key=value", help="overrides of all runs")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """
    Returns:
        The exit code, 1 if a training failed or something could not be read.
    """
    return exit_code(run, get_parser().parse_intermixed_args(argv))


def run(args: argparse.Namespace) -> int:
    failures: Dict[Training, str] = {}
    if args.jobs < 1:
        raise UserError("--jobs has to be at least 1.")
    if args.study.endswith(".json"):
        if args.runs or args.opts or args.output:
            raise UserError(f"{args.study} is a report: to train, give the study's YAML file.")
        report, folder = read_report(args.study), args.report_dir or os.path.dirname(args.study)
    else:
        study = read_study(args.study, args.output, args.opts)
        file = os.path.join(args.report_dir, f"{study.name}.json") if args.report_dir else ""
        if not args.report_only:
            for training in study.trainings:
                training.check_folder()
            trainings = select(study.trainings, args.runs)
            if os.path.isfile(file):
                trainings = _not_finished(trainings, join(make_report(study), file), file)
            failures = train(trainings, args.jobs)
        report, folder = join(make_report(study), file), args.report_dir or study.output_dir
    print("Written:", *write_report(report, folder), sep="\n  ")
    for training, reason in failures.items():
        print(f"Error: {training} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _not_finished(trainings: Sequence[Training], report: Report, file: str) -> List[Training]:
    finished = {(run["name"], run["seed"]) for run in report["runs"] if run["final"]}
    left = [t for t in trainings if t.is_finished() or (t.name, t.seed) not in finished]
    if len(left) < len(trainings):
        print(f"{file} has {len(trainings) - len(left)} finished trainings that are not here.")
    return left


def train(trainings: Sequence[Training], jobs: int) -> Dict[Training, str]:
    """
    Train what is not finished, each in a process of its own, `jobs` at a time. Whatever ends
    this ends the processes as well, which save where they stand.

    Returns:
        Those that failed, and why.
    """
    waiting = [training for training in trainings if not training.is_finished()]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are finished.")
    active: Dict[Training, subprocess.Popen] = {}
    num_printed: Dict[Training, int] = {}
    starts: Dict[Training, int] = {}  # in the console's file, of this attempt
    num_done = {training: _steps_done(training.evaluations()) for training in waiting}
    total, before = sum(t.max_iter for t in waiting), sum(num_done.values())
    progress = tqdm(total=total, initial=before, unit="step", disable=None)
    stopped: Set[Training] = set()
    failures = {}
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                training = waiting.pop(0)
                num_printed[training] = len(training.evaluations())
                console = _console(training)
                starts[training] = console.stat().st_size if console.exists() else 0
                active[training] = launch(training, jobs)
                _say(f"{training}: started")
            time.sleep(_POLL_SECONDS)
            for training, process in list(active.items()):
                has_ended = process.poll() is not None  # asked before its last evaluation is read
                evaluations = training.evaluations()
                _print_evaluations(training, evaluations[num_printed[training] :])
                num_printed[training] = len(evaluations)
                steps = training.max_iter if has_ended else _steps_done(evaluations)
                progress.update(steps - num_done[training])
                num_done[training] = steps
                if has_ended:
                    del active[training]
                    if not training.is_finished():
                        last = _last_words(training, starts[training], process.returncode)
                        failures[training] = last
                elif training.stops_early(evaluations) and training not in stopped:
                    stopped.add(training)
                    process.terminate()
    finally:
        progress.close()
        for training, process in active.items():
            if training not in stopped:  # a second signal would break off the saving
                process.terminate()
        for process in active.values():
            process.wait()
    return failures


def launch(training: Training, jobs: int = 1) -> subprocess.Popen:
    """Start the training script, which goes on where the training was stopped."""
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", training.config_file]
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // jobs)))
    os.makedirs(training.folder, exist_ok=True)
    with open(_console(training), "a") as file:
        return subprocess.Popen(
            [*command, "--resume", *training.overrides],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches this process alone, which passes it on, once.
            start_new_session=True,
        )


def _print_evaluations(training: Training, evaluations: Sequence[Evaluation]) -> None:
    for iteration, _, ap, ap50 in evaluations:
        of = f"{iteration} of {training.max_iter} steps"
        _say(f"{training}: {of}, AP {ap:.1f}, AP50 {ap50:.1f}")


def _steps_done(evaluations: Sequence[Evaluation]) -> int:
    """Up to the last evaluation."""
    return evaluations[-1][0] if evaluations else 0


def _say(text: str) -> None:
    """A line above the progress bar."""
    with tqdm.external_write_mode():
        print(text, flush=True)


def _console(training: Training) -> Path:
    return Path(training.folder, "console.txt")


def _last_words(training: Training, start: int, return_code: int) -> str:
    """The last error on the console from `start` on, or else the last line."""
    path = _console(training)
    text = path.read_bytes()[start:].decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    lines = lines or [f"exit code {return_code}"]
    errors = [line[len("Error: ") :] for line in lines if line.startswith("Error: ")]
    return f"{(errors or lines)[-1]} (see {path})"


if __name__ == "__main__":
    for _signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_signal, lambda number, frame: sys.exit(128 + number))
    sys.exit(main())
