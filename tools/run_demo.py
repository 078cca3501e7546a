#!/usr/bin/env python
"""Train the demo model on the embedded data set, evaluate it, and draw what it sees:

    run_demo.py --output-dir output/demo
    run_demo.py --output-dir output/detr --config-file configs/detr_shapes.py train.max_iter=500

A run that was stopped goes on, and one that is finished is only evaluated and drawn again.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

from smca.analysis import evenly
from smca.checkpoint.files import find_checkpoints
from smca.config import load_config, quoted
from smca.engine import main
from smca.errors import UserError, command_line, exit_code
from smca.inference import load_test_dataset

from detectron2.engine import default_argument_parser

import draw

ROOT = Path(__file__).resolve().parents[1]


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__)
    parser.add_argument("--output-dir", default="output/demo", metavar="DIR")
    parser.add_argument(
        "--config-file", default=str(ROOT / "configs" / "smca_plus_shapes.py"), metavar="FILE"
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
    if os.path.isfile(weights):
        print(f"{run_dir} holds a finished training: it is evaluated and drawn again.")

    resume = ["--resume"] if find_checkpoints(run_dir) else []
    arguments = ["--config-file", args.config_file, *resume, *overrides]
    results = main(default_argument_parser().parse_args(arguments))
    metrics_file = os.path.join(run_dir, "metrics.json")
    command = ["--config-file", args.config_file, "--weights", weights, *overrides]
    command += ["--output", os.path.join(run_dir, "pictures")]
    pictures = draw.run(draw.get_parser().parse_intermixed_args(command))
    examples = os.path.join(run_dir, "examples")
    os.makedirs(examples, exist_ok=True)
    for item in evenly(load_test_dataset(cfg), 12):
        shutil.copy(item["file_name"], examples)
    files = [weights, metrics_file, os.path.join(run_dir, "log.txt"), *pictures, examples]
    lines = [""]
    for task, metrics in results.items():  # nan where there is nothing to find
        lines.append(f"{task}: AP {metrics['AP']:.1f}, AP50 {metrics['AP50']:.1f}")
    lines += ["Written:", *(f"  {path}" for path in files if os.path.exists(path)), ""]
    minutes, seconds = divmod(round(time.perf_counter() - start), 60)
    lines.append(f"Total time {minutes} min {seconds} s ({os.cpu_count()} CPU cores)")
    best = os.path.join(run_dir, "model_best.pth")  # without an AP there is none
    weights = best if os.path.isfile(best) else weights
    lines += [
        "\nTry next, after 'source .venv/bin/activate':",
        f"  smca-predict --weights {weights} --input {examples} --output {run_dir}/detections",
        f"  smca-serve --weights {weights} --examples {examples}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(exit_code(lambda: print(run(get_parser().parse_args()))))
