"""Report how good trained detectors are: ``smca-evaluate``."""

import argparse
import itertools
import os
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from tabulate import tabulate

from smca.analysis import evenly
from smca.analysis.evaluation import Evaluation, detect, load_truth
from smca.analysis.report import write_report
from smca.config import AMP_DTYPES
from smca.data import as_list, image_ids, read_coco
from smca.errors import UserError, at_least, command_line, differing, exit_code, some, writing
from smca.inference import Predictor, load_test_dataset, make_folder, predictor_of
from smca.inference.command_line import add_threshold, add_weights_kind

_DESCRIPTION = """\
Report how good trained detectors are on the test data of the first one's config: average
precision, curves, confusions, the worst images, and speed. The report is one HTML
page that needs no other file, and JSON:

    %(prog)s --weights output/demo/model_best.pth --output report
    %(prog)s --weights a.pth b.pth --max-images 100 --output report train.device=cpu
    %(prog)s --weights a.pth --dtype fp32 --dtype bf16      # what mixed precision costs in AP
"""


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(_DESCRIPTION)
    parser.add_argument("--weights", nargs="+", required=True, metavar="FILE")
    parser.add_argument("--config-file", metavar="FILE", help="default: the config of the weights")
    parser.add_argument("--output", default="output/report", metavar="DIR")
    text = "for confusions, mistakes and pictures; default: each detector's with the best F1"
    add_threshold(parser, text, default=None)
    text = "pictures of the worst images of each detector; default: %(default)s"
    parser.add_argument("--num-worst", type=at_least(0), default=8, metavar="N", help=text)
    text = "take N images, evenly spread over the test data; default: all"
    parser.add_argument("--max-images", type=at_least(1), metavar="N", help=text)
    add_weights_kind(parser)
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: as the config says")
    text = "mixed precision; can be repeated, to have types side by side; default: fp32"
    parser.add_argument("--dtype", action="append", choices=("fp32", *AMP_DTYPES), help=text)
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> List[str]:
    """Evaluate, and write the report; gives its paths."""
    # Overrides that follow --weights are taken for files.
    overrides = [text for text in args.weights if "=" in text and not os.path.exists(text)]
    args.weights = [text for text in args.weights if text not in overrides]
    args.opts = [*args.opts, *overrides]
    if not args.weights:
        raise UserError("No checkpoint given: name one or several files after --weights.")
    # What is wrong with one of the files should not take the time to run the others.
    detectors = list(itertools.product(args.weights, args.dtype or ["fp32"]))
    predictors = [
        predictor_of(argparse.Namespace(**{**vars(args), "weights": weights, "dtype": dtype}))
        for weights, dtype in detectors
    ]
    cfg = predictors[0].cfg
    dataset_dicts = load_test_dataset(cfg)
    if args.max_images is not None:
        dataset_dicts = evenly(dataset_dicts, args.max_images)
    name, truth = load_test_truth(cfg, dataset_dicts)
    category_ids = [
        category_ids_of(weights, predictor, name, truth)
        for (weights, _), predictor in zip(detectors, predictors)
    ]
    make_folder(args.output)
    evaluations = []
    titles = column_names(args.weights, args.dtype)
    for title, predictor, ids in zip(titles, predictors, category_ids):
        detections, seconds = detect(predictor, dataset_dicts, ids, title)
        threshold = args.confidence_threshold
        numbers = (truth, detections, seconds, threshold, image_ids(name))
        evaluations.append(Evaluation(title, *numbers))
    print(summary(evaluations))
    with writing(args.output):
        return write_report(
            evaluations,
            dataset_dicts,
            args.output,
            dataset=name,
            device=device_name(predictors[0].model),
            num_worst=args.num_worst,
        )


def load_test_truth(cfg: Any, dataset_dicts: Sequence[Dict[str, Any]]) -> Tuple[str, COCO]:
    """The name of a config's test data, which have to be one set in COCO's format, and the truth of
    some of its images."""
    # A function that registers data, as in configs/custom_coco.py, gives their name again.
    names = as_list(instantiate(cfg.dataloader.test.dataset.names))
    if len(names) != 1:
        raise UserError(
            f"There are {len(names)} sets of test data, a report is on one: set data.val_json or "
            "dataloader.test.dataset.names to one of them."
        )
    json_file = MetadataCatalog.get(names[0]).get("json_file")
    if json_file is None:
        raise UserError(
            f"Data set '{names[0]}' has no annotation file in COCO's format, which a report needs: "
            "smca-train --eval-only evaluates it."
        )
    return names[0], load_truth(read_coco(json_file), [d["image_id"] for d in dataset_dicts])


def category_ids_of(weights: str, predictor: Predictor, dataset: str, truth: COCO) -> List[int]:
    """For each of the detector's classes the id that its name has in the data set; a detector
    without names has the data set's order. A UserError if its classes are known to be others."""
    expected = list(MetadataCatalog.get(dataset).get("thing_classes", []))
    count = getattr(predictor.model, "num_classes", len(expected))
    names = sorted(predictor.class_names)
    if (expected and count != len(expected)) or (names and names != sorted(expected)):
        found = f"it has {count}, the data {len(expected)} ({some(expected)})"
        if names:
            sides = {"only in the weights": set(names) - set(expected)}
            sides["only in the data"] = set(expected) - set(names)
            found = differing({side: sorted(only) for side, only in sides.items()}) or found
        raise UserError(
            f"{weights} has other classes than the data set '{dataset}', {found}: evaluate it on a "
            "data set with its own classes (dataloader.test.dataset.names or data.val_json)."
        )
    ids = sorted(truth.getCatIds())
    return [ids[expected.index(name)] for name in predictor.class_names] or ids


def column_names(paths: Sequence[str], dtypes: Optional[Sequence[str]] = None) -> List[str]:
    """Short and different names of files: the file's own, with as many of its folders as are needed
    to tell them apart. With `dtypes`, each name is given once for each type."""
    short = [f"{path} ({number})" for number, path in enumerate(paths, 1)]
    for count in range(1, max(len(Path(path).parts) for path in paths) + 1):
        names = [os.path.join(*Path(path).with_suffix("").parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            short = names
            break
    return [f"{name}, {dtype}" for name in short for dtype in dtypes] if dtypes else short


def device_name(model: torch.nn.Module) -> str:
    """The device that a model is on, for people."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, threads: {torch.get_num_threads()}"


def summary(evaluations: Sequence[Evaluation]) -> str:
    """The main numbers as a table."""
    rows = [
        [e.name, *(e.overall[key] for key in ("AP", "AP50", "AP75")), e.f1, e.threshold]
        + [e.milliseconds]
        for e in evaluations
    ]
    headers = ["", "AP", "AP50", "AP75", "F1", "threshold", "ms an image"]
    return tabulate(rows, headers, floatfmt=["", *[".1f"] * 4, ".3f", ".0f"])


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    args = get_parser().parse_intermixed_args(argv)
    return exit_code(lambda: print("Written:", *run(args), sep="\n  "))
