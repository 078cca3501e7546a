#!/usr/bin/env python
"""
Convert a checkpoint of another origin into one that the configs of this project can load:

    convert_checkpoint.py --input official.pth --output smca.pth
    convert_checkpoint.py --input official.pth --output smca.pth --classes keep

It takes the official SMCA models, DETR's as an initialization for the detr configs, and
torchvision's ResNets as a backbone, finds out which model it is, and says with which config to use
it.
"""

import argparse
import sys
from typing import Optional, Sequence

from smca.checkpoint.conversion import CLASS_CHOICES, convert_file
from smca.errors import command_line, exit_code


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="checkpoint to read")
    parser.add_argument("--output", required=True, metavar="FILE", help=".pth file to write")
    parser.add_argument(
        "--classes",
        choices=CLASS_CHOICES,
        default="coco80",
        help="coco80: the outputs of COCO's 80 classes, in Detectron2's order (default); "
        "keep: all outputs, which are COCO's category ids",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    conversion = convert_file(args.input, args.output, args.classes)
    print(f"{args.input} is {conversion.description}.")
    for note in conversion.notes:
        print(note)
    print(f"Written: {args.output}")
    config = f"--config-file configs/{conversion.config or 'NAME'}.py"
    weights = f"train.init_checkpoint={args.output}"
    print("Use it with", " ".join([config, weights, *conversion.overrides]))


def main(argv: Optional[Sequence[str]] = None) -> int:
    return exit_code(run, get_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
