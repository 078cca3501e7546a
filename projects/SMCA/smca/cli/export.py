"""Write a trained detector as ONNX or pt2: ``smca-export``."""

import argparse
import os
from typing import Optional, Sequence

from smca.errors import command_line, exit_code
from smca.inference import add_predictor_arguments, add_threshold, make_folder, predictor_of
from smca.inference.export import check_export, export_detector

_DESCRIPTION = """\
Write a trained detector as one file that runs without this package:

    %(prog)s --weights output/demo/model_best.pth --format onnx --output model.onnx
    %(prog)s --weights FILE --format pt2 --output model.pt2

onnx is for onnxruntime, OpenVINO, or TensorRT. pt2 is PyTorch's own (torch.export.load),
for images of at least two of the coarsest cells a side (65 pixels). The graph takes `images`
(B, 3, H, W) float32 RGB, 0 to 255, padded at the right and bottom, and `image_sizes` (B, 2) int64,
the height and width of each image without padding. It gives `boxes` (B, K, 4), x0, y0, x1, y1 in
pixels of the image, `scores` (B, K) and `labels` (B, K), best first. Class names, the size to
resize to and the threshold are in the file's metadata.
"""


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(_DESCRIPTION)
    add_predictor_arguments(parser, device=False)
    parser.set_defaults(device="cpu", dtype="fp32")
    parser.add_argument("--format", default="onnx", help="onnx (default) or pt2")
    parser.add_argument("--output", required=True, metavar="FILE", help="file to write")
    add_threshold(parser, "for the metadata; the graph gives all detections; default: %(default)s")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def run(args: argparse.Namespace) -> None:
    check_export(args.output, args.format)
    predictor = predictor_of(args)
    make_folder(os.path.dirname(args.output) or ".")
    # A call of PyTorch's, which does not say how far it is.
    print("PyTorch traces the model, which takes a minute or so.", flush=True)
    export_detector(predictor, args.output, args.format, args.confidence_threshold)
    print(f"Written: {args.output} ({os.path.getsize(args.output) / 1e6:.1f} MB)")


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    return exit_code(run, get_parser().parse_args(argv))
