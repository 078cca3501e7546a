#!/usr/bin/env python
"""Draw what a trained detector sees.

That is validation images with truth and detections, the Gaussian map of each head for some
detections, and the curves of the training (from the metrics.json beside the weights, if there is
one):

    draw.py --weights output/demo/model_best.pth --output pictures
    draw.py --config-file CONFIG --weights FILE --layer 0 --scale 1 --output pictures
"""

import argparse
import functools
import os
import sys
from typing import List

from smca.analysis import write_pictures
from smca.errors import at_least, command_line, exit_code
from smca.inference import (
    add_predictor_arguments,
    add_threshold,
    load_test_dataset,
    make_folder,
    predictor_of,
)

from tqdm import tqdm


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_line(__doc__)
    add_predictor_arguments(parser)
    parser.add_argument("--output", default="output/pictures", metavar="DIR")
    parser.add_argument("--num-images", type=at_least(1), default=8, help="in validation.png")
    parser.add_argument("--num-detections", type=at_least(1), default=4, help="in gaussians.png")
    add_threshold(parser, "in validation.png; default: %(default)s", default=0.3)
    parser.add_argument("--layer", type=int, default=-1, help="of the decoder, -1 is the last")
    parser.add_argument("--scale", type=int, help="of the maps, 0 is the finest; default: all")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> List[str]:
    """The command's work; gives the paths of the pictures."""
    predictor = predictor_of(args)
    metrics_file = os.path.join(os.path.dirname(args.weights or ""), "metrics.json")
    dataset_dicts = load_test_dataset(predictor.cfg)
    make_folder(args.output)
    return write_pictures(
        predictor,
        dataset_dicts,
        args.output,
        metrics_file if os.path.isfile(metrics_file) else None,
        num_images=args.num_images,
        num_detections=args.num_detections,
        confidence_threshold=args.confidence_threshold,
        layer=args.layer,
        scale=args.scale,
        progress=functools.partial(tqdm, unit="image", disable=None),
    )


def main() -> None:
    """Run the command line."""
    print("Written:", *run(get_parser().parse_args()), sep="\n  ")


if __name__ == "__main__":
    sys.exit(exit_code(main))
