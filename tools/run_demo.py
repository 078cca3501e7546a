#!/usr/bin/env python
"""Train the demo model on the embedded data set, evaluate it, and draw what it sees:

    run_demo.py --output-dir output/demo
    run_demo.py --output-dir output/demo --restart
    run_demo.py --output-dir output/detr --config-file configs/detr_shapes.py train.max_iter=500

A run that was stopped goes on, and one that is finished is only evaluated and drawn again.
"""

import argparse
import math
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Dict, List, Mapping, Optional

from smca import Predictor
from smca.analysis import evenly, write_pictures
from smca.config import load_config, quoted
from smca.engine import main
from smca.errors import UserError, exit_code
from smca.inference import load_test_dataset

from detectron2.engine import default_argument_parser
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", default="output/demo", metavar="DIR")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "smca_plus_shapes.py"), metavar="FILE"
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="train from the start; the former run moves to DIR/previous_1 and so on",
    )
    parser.add_argument("opts", nargs="*", metavar="key=value", help="LazyConfig overrides")
    return parser


def run(args: argparse.Namespace) -> str:
    """The command's work; gives what there is to tell at the end."""
    start = time.perf_counter()
    if any(text.lstrip("+").startswith("train.output_dir=") for text in args.opts):
        raise UserError("train.output_dir cannot be overridden: it follows from --output-dir.")
    overrides = args.opts + [f"train.output_dir={quoted(args.output_dir)}"]
    cfg = load_config(args.config_file, overrides)
    run_dir = args.output_dir
    if cfg.train.fast_dev_run:  # which is kept apart from the real run
        run_dir = os.path.join(run_dir, "fast_dev_run")
    weights = os.path.join(run_dir, "model_final.pth")
    _tell_state(run_dir, weights, args.restart)

    resume = [] if args.restart else ["--resume"]
    arguments = ["--config-file", args.config_file, *resume, *overrides]
    results = main(default_argument_parser().parse_args(arguments))
    trained = time.perf_counter()

    predictor = Predictor(weights, config_file=args.config_file, overrides=overrides)
    dataset_dicts = load_test_dataset(predictor.cfg)
    metrics_file = os.path.join(run_dir, "metrics.json")
    pictures = write_pictures(
        predictor, dataset_dicts, os.path.join(run_dir, "pictures"), metrics_file
    )
    examples = os.path.join(run_dir, "examples")
    os.makedirs(examples, exist_ok=True)
    for item in evenly(dataset_dicts, 12):
        shutil.copy(item["file_name"], examples)
    files = [weights, metrics_file, os.path.join(run_dir, "log.txt"), *pictures, examples]
    times = (trained - start, time.perf_counter() - start)
    return _summary(args.config_file, results, files, *times) + (
        "\n\nTry next, after 'source .venv/bin/activate':\n"
        f"  smca-predict --weights {weights} --input {examples} --output {run_dir}/detections\n"
        f"  smca-serve --weights {weights} --examples {examples}"
    )


def _tell_state(run_dir: str, weights: str, restart: bool) -> None:
    """Say what becomes of a training that is there already."""
    if restart or not os.path.isdir(run_dir):
        return
    if os.path.isfile(weights):
        print(f"{run_dir} holds a finished training: it is evaluated and drawn again, and trained")
        print("on only if train.max_iter has grown. --restart trains from the start.")
    elif os.path.isfile(os.path.join(run_dir, "last_checkpoint")):
        print(f"{run_dir} holds a training that was stopped: it goes on. --restart starts over.")


Metrics = Dict[str, float]


def _summary(
    config_file: str,
    results: Mapping[str, Metrics],
    files: List[str],
    training_time: float,
    total_time: float,
) -> str:
    """A table of the results, those of each class, the files that were written, the times in
    seconds."""
    lines = ["", f"SMCA demo, {os.path.basename(config_file)}: box AP in %"]
    overall = {task: _without_classes(metrics) for task, metrics in results.items()}
    columns = list(dict.fromkeys(name for metrics in overall.values() for name in metrics))
    rows = [
        [task] + [_or_dash(metrics.get(name)) for name in columns]
        for task, metrics in overall.items()
    ]
    lines.append(tabulate(rows, ["", *columns], tablefmt="simple", disable_numparse=True))
    for task, metrics in results.items():
        per_class = {k[len("AP-") :]: v for k, v in metrics.items() if k.startswith("AP-")}
        if per_class:
            text = ", ".join(f"{name} {_or_dash(value)}" for name, value in per_class.items())
            lines.append(f"{task} by class: {text}")
    lines += ["", "Written:"] + [f"  {path}" for path in files if os.path.exists(path)]
    lines += [
        "",
        f"Total time {_duration(total_time)}, of which training and evaluation "
        f"{_duration(training_time)} ({os.cpu_count()} CPU cores).",
    ]
    return "\n".join(lines)


def _without_classes(metrics: Metrics) -> Metrics:
    return {name: value for name, value in metrics.items() if not name.startswith("AP-")}


def _or_dash(value: Optional[float]) -> str:
    """AP is nan where there is nothing to find, such as large objects in small images."""
    return "-" if value is None or math.isnan(value) else f"{value:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(run(get_parser().parse_args()))))
