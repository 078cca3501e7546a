"""The options of command lines that take a trained detector."""

import argparse
import os
import tempfile

from smca.config import AMP_DTYPES
from smca.errors import UserError, writing
from smca.inference.build import WEIGHTS
from smca.inference.predictor import Predictor


def add_predictor_arguments(parser: argparse.ArgumentParser, device: bool = True) -> None:
    """Add ``--config-file``, ``--weights`` and ``--weights-kind``; and ``--device`` and ``--dtype``
    if `device` is true."""
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        help="LazyConfig, or the name of one that comes with the package; not needed where the "
        "weights say it",
    )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help="checkpoint of a trained detector, or a folder of tools/publish.py",
    )
    add_weights_kind(parser)
    if not device:
        return
    parser.add_argument("--device", help="auto, cpu, cuda, ...; default: as the config says")
    parser.add_argument(
        "--dtype",
        default="fp32",
        choices=("fp32", *AMP_DTYPES),
        help="bf16 or fp16: mixed precision; default: %(default)s",
    )


def add_weights_kind(parser: argparse.ArgumentParser) -> None:
    """Add ``--weights-kind`` alone."""
    parser.add_argument(
        "--weights-kind",
        choices=WEIGHTS,
        help="the trained weights or their average; default: the average if the checkpoint is the "
        "best one by it, else the trained weights",
    )


def score(text: str) -> float:
    """The type of an option that is a score."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"has to be a number in [0, 1], not {text}")
    return value


def make_folder(path: str) -> None:
    """Make a folder for a command's output if it is not there, and try to write into it.

    Raises:
        UserError: that cannot be done.
    """
    with writing(path):
        os.makedirs(path, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()


def predictor_of(args: argparse.Namespace) -> Predictor:
    """The predictor that the options name, and the overrides in ``args.opts``.

    Raises:
        UserError: see `Predictor`.
    """
    if args.weights and os.path.isdir(args.weights):
        if args.config_file or args.weights_kind or args.opts:
            raise UserError(
                f"{args.weights} is a folder, whose detector has its config and weights in it: "
                "leave out --config-file, --weights-kind and overrides."
            )
        return Predictor.from_pretrained(
            args.weights, device=args.device or "auto", dtype=args.dtype
        )
    return Predictor(
        args.weights,
        config_file=args.config_file,
        overrides=args.opts,
        weights=args.weights_kind,
        device=args.device,
        dtype=args.dtype,
    )
