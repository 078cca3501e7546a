"""The options of command lines that take a trained detector."""

import argparse
import os
import tempfile
from typing import Optional

from smca.config import AMP_DTYPES
from smca.errors import UserError, writing
from smca.inference.predictor import WEIGHTS, Predictor
from smca.inference.pretrained import WEIGHTS_NAME


def add_predictor_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add ``--config-file``, ``--weights`` and ``--weights-kind``; and ``--device`` and ``--dtype``
    if `device` is true."""
    text = "a file, or the name of a config of this package; default: the config of the weights"
    parser.add_argument("--config-file", metavar="FILE", help=text)
    text = "checkpoint of a trained detector, or a folder that tools/publish.py wrote"
    parser.add_argument("--weights", metavar="FILE", help=text)
    add_weights_kind(parser)
    if device:
        text = "auto, cpu, cuda, ...; default: as the config says"
        parser.add_argument("--device", help=text)
        text = "bf16 or fp16: mixed precision; default: %(default)s"
        parser.add_argument("--dtype", default="fp32", choices=("fp32", *AMP_DTYPES), help=text)


def add_weights_kind(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights-kind`` alone."""
    parser.add_argument(
        "--weights-kind",
        choices=WEIGHTS,
        help="the trained weights or their average; default: the average if it is what made this "
        "the best checkpoint (train.best_metric=ema/...), otherwise the trained weights",
    )


def add_threshold(
    parser: argparse.ArgumentParser, text: str, default: Optional[float] = 0.5
) -> None:
    """Add ``--confidence-threshold``, a score, with that help."""
    parser.add_argument(
        "--confidence-threshold", type=_score, default=default, metavar="SCORE", help=text
    )


def _score(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"has to be a number in [0, 1], not {text}")
    return value


def make_folder(path: str) -> None:
    """Make a folder for a command's output if it is not there, and try to write into it; a
    UserError says why that cannot be done."""
    with writing(path):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def predictor_of(args: argparse.Namespace) -> Predictor:
    """The predictor that the options name, and the overrides in ``args.opts``."""
    if os.path.basename(args.weights or "") == WEIGHTS_NAME:  # of a published folder
        args.weights = os.path.dirname(args.weights) or "."
    if not args.weights or not os.path.isdir(args.weights):
        return Predictor(
            args.weights,
            config_file=args.config_file,
            overrides=args.opts,
            weights=args.weights_kind,
            device=args.device,
            dtype=args.dtype,
        )
    if args.config_file or args.weights_kind or args.opts:
        raise UserError(
            f"{args.weights} is a folder, whose detector has its config and weights in it: leave "
            "out --config-file, --weights-kind and overrides."
        )
    return Predictor.from_pretrained(args.weights, device=args.device or "auto", dtype=args.dtype)
