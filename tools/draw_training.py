#!/usr/bin/env python
"""Draw what training does to the spatial modulation, over the checkpoints of a training.

Whether centers settle on objects, whether heads differ, whether maps fit the objects' sizes, and
which scales objects of each size read. Writes modulation.json, modulation.png and examples.jpg:

    draw_training.py output/demo --output pictures
    draw_training.py output/demo/model_0000999.pth output/demo/model_final.pth --layer 0

A training writes a checkpoint every train.checkpointer.period iterations, and keeps the last
train.checkpointer.max_to_keep of them.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path
from typing import Dict, List, Sequence

from smca import Predictor
from smca.analysis import (
    DetectionMaps,
    ModulationStatistics,
    collect,
    collect_examples,
    draw_examples,
    draw_training,
    evenly,
    summarize,
)
from smca.checkpoint.files import steps_of
from smca.errors import CheckpointError, exit_code
from smca.inference import add_weights_kind, load_test_dataset, load_weights, make_folder

from tqdm import tqdm


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "inputs",
        nargs="+",
        metavar="PATH | key=value",
        help="a training's folder or checkpoints of one training; config overrides",
    )
    parser.add_argument("--config-file", metavar="FILE", help="not needed where the weights say it")
    add_weights_kind(parser)
    parser.add_argument("--output", default="output/pictures", metavar="DIR")
    parser.add_argument("--num-images", type=int, default=100, help="of the test data")
    parser.add_argument("--layer", type=int, default=-1, help="of the decoder, -1 is the last")
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: as the config says")
    return parser


def find_checkpoints(paths: Sequence[str]) -> List[str]:
    """The checkpoints that the command line names.

    Args:
        paths: files, or folders of trainings.

    Returns:
        Files; a folder's are those with an iteration in their name and the final one.

    Raises:
        CheckpointError: a folder holds none.
    """
    files: List[str] = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            names = filter(re.compile(r"model_(\d+|final)\.pth").fullmatch, os.listdir(path))
            found = [os.path.join(path, name) for name in sorted(names)]
        if not found:
            raise CheckpointError(
                f"{path} holds no checkpoints of a training (model_0004999.pth, model_final.pth)."
            )
        files += found
    return files


def run(args: argparse.Namespace) -> List[str]:
    """The command's work; gives the paths of what it wrote."""
    overrides = [text for text in args.inputs if "=" in text and not os.path.exists(text)]
    files = find_checkpoints([text for text in args.inputs if text not in overrides])
    if not files:
        raise CheckpointError("No checkpoint given: name a training's folder, or checkpoints.")
    predictor = Predictor(
        files[0],
        config_file=args.config_file,
        overrides=overrides,
        weights=args.weights_kind,
        device=args.device,
    )
    dataset_dicts = evenly(load_test_dataset(predictor.cfg), args.num_images)
    make_folder(args.output)
    max_iter = predictor.cfg.train.max_iter  # may be computed from training data, not needed here
    statistics: Dict[int, ModulationStatistics] = {}
    examples: Dict[int, List[DetectionMaps]] = {}
    for number, file in enumerate(files, 1):
        _, others = load_weights(predictor.model, file, args.weights_kind)
        steps = steps_of(others, max_iter if isinstance(max_iter, int) else None)
        if steps is None:
            raise CheckpointError(f"{file} does not say at which iteration it was written.")
        if steps not in statistics:
            title = f"checkpoint {number} of {len(files)}"
            images = tqdm(dataset_dicts, desc=title, unit="image", disable=None)
            statistics[steps] = collect(predictor, images, args.layer)
            examples[steps] = collect_examples(predictor, dataset_dicts, args.layer)
    statistics, examples = dict(sorted(statistics.items())), dict(sorted(examples.items()))

    names = ("modulation.json", "modulation.png", "examples.jpg")
    paths = [os.path.join(args.output, name) for name in names]
    lines = [f'"{step}": {json.dumps(summarize(s))}' for step, s in statistics.items()]
    Path(paths[0]).write_text("{\n" + ",\n".join(lines) + "\n}\n")
    draw_training(statistics).savefig(paths[1])
    draw_examples(examples, predictor.class_names).savefig(paths[2])
    return paths


def main() -> None:
    """Run the command line."""
    print("Written:", *run(get_parser().parse_intermixed_args()), sep="\n  ")


if __name__ == "__main__":
    sys.exit(exit_code(main))
