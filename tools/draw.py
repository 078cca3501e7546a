#!/usr/bin/env python
"""Draw what a trained detector sees.

That is validation images with truth and detections (validation.png), the Gaussian map of each head
for the best detections of different images (gaussians.png; not for a model without modulation), and
the curves of the training (curves.png, from the metrics.json beside the weights, if there is one):

    draw.py --weights output/demo/model_best.pth --output pictures
    draw.py --config-file CONFIG --weights FILE --layer 0 --scale 1 --output pictures
"""

import argparse
import os
import sys
from typing import List

from smca.analysis import (
    DetectionMaps,
    detect_and_record,
    draw_contact_sheet,
    draw_curves,
    draw_gaussians,
    draw_truth_and_detections,
    evenly,
    maps_of,
    read_metrics,
    record_of,
    truth_of,
)
from smca.data import read_image
from smca.errors import at_least, command_line, exit_code, writing
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
    dataset_dicts = load_test_dataset(predictor.cfg)
    make_folder(args.output)
    pictures, captions = [], []
    best: List[DetectionMaps] = []
    for item in tqdm(evenly(dataset_dicts, args.num_images), unit="image", disable=None):
        image = read_image(item["file_name"], item["height"], item["width"])
        truth, (found, records) = truth_of(item), detect_and_record(predictor, image)
        detections = found[found.scores >= args.confidence_threshold]
        pictures.append(draw_truth_and_detections(image, truth, detections, predictor.class_names))
        captions.append(
            f"{os.path.basename(item['file_name'])}: truth ({len(truth)})  |  "
            f"detections from {100 * args.confidence_threshold:.0f}% ({len(detections)})"
        )
        if records:
            best += maps_of(found[[0]], record_of(records, args.layer), image)
    figures = {"validation.png": draw_contact_sheet(pictures, captions)}
    if best:
        best.sort(key=lambda detection: -detection.score)
        drawn = draw_gaussians(best[: args.num_detections], predictor.class_names, args.scale)
        figures["gaussians.png"] = drawn
    metrics_file = os.path.join(os.path.dirname(args.weights or ""), "metrics.json")
    if os.path.isfile(metrics_file):
        figures["curves.png"] = draw_curves(read_metrics(metrics_file))
    for name, figure in figures.items():
        with writing(os.path.join(args.output, name)):
            figure.savefig(os.path.join(args.output, name))
    return [os.path.join(args.output, name) for name in figures]


def main() -> None:
    """Run the command line."""
    print("Written:", *run(get_parser().parse_args()), sep="\n  ")


if __name__ == "__main__":
    sys.exit(exit_code(main))
