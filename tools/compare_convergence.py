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

Every run trains in OUTPUT/NAME/seedN. Started again, a study goes on where it was stopped, and
finished runs stay as they are. A report (.json) in place of the study is drawn again by itself.
"""

import argparse
import difflib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import yaml

from convergence_study import Study, Training, make_report, read_report, write_report
from smca.config import load_config, quoted
from smca.errors import UserError, exit_code

ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 2.0
# Keys of a study and of a run in it, and their kinds.
_AP = (int, float)
_STUDY_KEYS = {
    "seeds": list,
    "overrides": list,
    "target_ap": _AP,
    "runs": dict,
    "comparisons": dict,
}
_RUN_KEYS = {"config": str, "overrides": list, "seeds": list, "stop_at_ap": _AP}
_KINDS = {list: "a list", dict: "a section", str: "a text", _AP: "a number, an AP in %"}
# Settings that the runs of a study must have in common: the data and when to evaluate.
_SHARED_SETTINGS = ("data.", "dataloader.", "train.eval_period")


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", metavar="STUDY", help="a study (.yaml) or a report (.json)")
    parser.add_argument(
        "--output", metavar="DIR", help="of the trainings; default: output/convergence/STUDY"
    )
    parser.add_argument(
        "--report-dir", metavar="DIR", help="of JSON, table and pictures; default: OUTPUT"
    )
    parser.add_argument("--runs", nargs="+", metavar="NAME", help="train these only")
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="trainings at a time, which share the CPU's threads; default: %(default)s",
    )
    parser.add_argument("--report-only", action="store_true", help="train nothing")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of all runs")
    return parser


def main(argv=None):
    """
    Returns:
        int: the exit code, 1 if a training failed or something could not be read.
    """
    args = get_parser().parse_intermixed_args(argv)
    try:
        return exit_code(run, args)
    except KeyboardInterrupt:
        return 130


def run(args):
    if args.jobs < 1:
        raise UserError("--jobs has to be at least 1.")
    if args.study.endswith(".json"):
        if args.runs or args.opts or args.output:
            raise UserError(f"{args.study} is a report: to train, give the study's YAML file.")
        folder = args.report_dir or os.path.dirname(args.study)
        _print_paths(write_report(read_report(args.study), folder))
        return 0
    study = read_study(args.study, args.output, args.opts)

    def report():
        return write_report(make_report(study), args.report_dir or study.output_dir)

    failures = {}
    if not args.report_only:
        for training in study.trainings:
            training.check_folder()
        failures = train(select(study.trainings, args.runs), args.jobs, on_progress=report)
    _print_paths(report())
    for training, reason in failures.items():
        print(f"Error: {training} failed: {reason}", file=sys.stderr)
    return 1 if failures else 0


def _print_paths(paths):
    print("Written:", *paths, sep="\n  ")


# The study


def read_study(path, output_dir=None, opts=()):
    """
    Args:
        path (str): a YAML file as described at the top of this file.
        output_dir (str or None): for the trainings.
        opts (sequence of str): further overrides of all runs, which win over the study's.

    Returns:
        Study: its trainings are all runs with the first seed, then all with the next, and so on.

    Raises:
        UserError: names the file and the key that cannot be used.
    """
    content = _read_yaml(path)
    name = Path(path).stem
    output_dir = output_dir or os.path.join("output", "convergence", name)
    shared = content.get("overrides", [])
    trainings = []
    for run_name, spec in content["runs"].items():
        own = spec.get("overrides", [])
        overrides = [*shared, *own, *opts]
        _check_overrides(overrides)
        config_file = os.path.normpath(os.path.join(os.path.dirname(path), spec["config"]))
        for seed in spec.get("seeds") or content.get("seeds") or [0]:
            folder = os.path.join(output_dir, run_name, f"seed{seed}")
            place = [f"train.seed={seed}", f"train.output_dir={quoted(folder)}"]
            trainings.append(
                Training(
                    name=run_name,
                    seed=seed,
                    folder=folder,
                    config_file=config_file,
                    own_overrides=tuple(own),
                    overrides=(*overrides, *place),
                    stop_at_ap=spec.get("stop_at_ap"),
                    cfg=load_config(config_file, [*overrides, *place]),
                )
            )
    _check_same_budget(trainings)
    trainings.sort(key=lambda training: training.seed)  # stable: runs keep their order
    comparisons = content.get("comparisons", {"all": list(content["runs"])})
    overrides = (*shared, *opts)
    return Study(name, output_dir, overrides, content.get("target_ap"), trainings, comparisons)


def select(trainings, names):
    """The trainings of the runs with these names, or all if `names` is None."""
    if names is None:
        return trainings
    _check_names(names, [training.name for training in trainings], "the study")
    return [training for training in trainings if training.name in names]


def _read_yaml(path):
    """The content of a study, with keys of the right kinds; names of runs are texts."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"The study {path} cannot be read ({error.strerror}).") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is no YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not content.get("runs"):
        raise UserError(f"{path} is no study: add runs: {{NAME: {{config: FILE}}}}.")
    _check_section(content, _STUDY_KEYS, path)
    content["runs"] = {str(name): spec for name, spec in content["runs"].items()}
    for name, spec in content["runs"].items():
        where = f"{path}, run {name}"
        if not isinstance(spec, dict) or "config" not in spec:
            raise UserError(f"{where} has no config: add config: FILE.")
        _check_section(spec, _RUN_KEYS, where)
    comparisons = content.get("comparisons", {})
    _check_section(comparisons, dict.fromkeys(comparisons, list), f"{path}, comparisons")
    for names in comparisons.values():
        _check_names(names, content["runs"], path)
    return content


def _check_section(section, kinds, where):
    for key, value in section.items():
        if key not in kinds:
            raise UserError(f"{where} has the unknown key {key}{_hint(key, kinds)}")
        if not isinstance(value, kinds[key]):
            raise UserError(f"{where}: {key} has to be {_KINDS[kinds[key]]}, not {value!r}.")


def _check_names(names, known, where):
    for name in names:
        if name not in known:
            raise UserError(f"There is no run {name} in {where}{_hint(name, known)}")


def _hint(name, known):
    nearest = difflib.get_close_matches(str(name), known, n=1)
    return f", did you mean {nearest[0]}?" if nearest else f": there are {', '.join(known)}."


def _check_overrides(overrides):
    for text in overrides:
        key = text.lstrip("+").split("=")[0]
        if key in ("train.seed", "train.output_dir"):
            raise UserError(f"{key} cannot be overridden: it follows from seeds and --output.")


def _check_same_budget(trainings):
    first, by_name = trainings[0], {training.name: training for training in trainings}
    for training in by_name.values():
        eval_period, log_period = training.cfg.train.eval_period, training.cfg.train.log_period
        if eval_period < log_period:  # Detectron2 logs the last of several evaluations only
            raise UserError(
                f"The run {training.name} has train.eval_period={eval_period}: make it at least "
                f"train.log_period={log_period}."
            )
        one, other = first.settings, training.settings
        for key in [*one, *other]:
            if key.startswith(_SHARED_SETTINGS) and one.get(key) != other.get(key):
                raise UserError(
                    f"The runs {first.name} and {training.name} cannot be compared: {key} is "
                    f"{one.get(key)} and {other.get(key)}; make it the same."
                )


# Training


def train(trainings, jobs, on_progress):
    """
    Train what is not finished, each in a process of its own, `jobs` at a time. Whatever ends
    this ends the processes as well, which save where they stand.

    Args:
        on_progress (callable): called without arguments when one has ended and others have not.

    Returns:
        dict[Training, str]: those that failed, and why.
    """
    waiting = [training for training in trainings if not training.is_finished()]
    print(f"{len(trainings) - len(waiting)} of {len(trainings)} trainings are finished.")
    active, num_seen, failures, stopped = {}, {}, {}, set()
    try:
        while waiting or active:
            while waiting and len(active) < jobs:
                training = waiting.pop(0)
                num_seen[training] = len(training.evaluations())
                active[training] = launch(training, jobs)
                print(f"{training}: started", flush=True)
            time.sleep(_POLL_SECONDS)
            for training, process in list(active.items()):
                has_ended = process.poll() is not None  # asked before its last evaluation is read
                num_seen[training] = _print_news(training, num_seen[training])
                if has_ended:
                    del active[training]
                    if not training.is_finished():
                        failures[training] = _last_words(training, process.returncode)
                    if active or waiting:
                        on_progress()
                elif training.has_stopped_early() and training not in stopped:
                    stopped.add(training)
                    process.terminate()
    finally:
        for training, process in active.items():
            if training not in stopped:  # a second signal would break off the saving
                process.terminate()
        for process in active.values():
            process.wait()
    return failures


def launch(training, jobs=1):
    """
    Returns:
        subprocess.Popen: the training script, which goes on where the training was stopped.
    """
    command = [sys.executable, str(ROOT / "train_net.py"), "--config-file", training.config_file]
    environment = dict(os.environ, OMP_NUM_THREADS=str(max(1, torch.get_num_threads() // jobs)))
    os.makedirs(training.folder, exist_ok=True)
    with open(os.path.join(training.folder, "console.txt"), "a") as file:
        return subprocess.Popen(
            [*command, "--resume", *training.overrides],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=environment,
            # Ctrl-C reaches this process alone, which passes it on, once.
            start_new_session=True,
        )


def _print_news(training, num_seen):
    evaluations = training.evaluations()
    for iteration, ap, ap50 in evaluations[num_seen:]:
        of = f"{iteration} of {training.max_iter} steps"
        print(f"{training}: {of}, AP {ap:.1f}, AP50 {ap50:.1f}", flush=True)
    return len(evaluations)


def _last_words(training, return_code):
    path = os.path.join(training.folder, "console.txt")
    with open(path, encoding="utf-8", errors="replace") as file:
        lines = [line.strip() for line in file if line.strip()] or [f"exit code {return_code}"]
    errors = [line[len("Error: ") :] for line in lines if line.startswith("Error: ")]
    return f"{(errors or lines)[-1]} (see {path})"


def _exit_on_signal(number, frame):
    sys.exit(128 + number)


if __name__ == "__main__":
    for _number_of_signal in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(_number_of_signal, _exit_on_signal)
    sys.exit(main())
