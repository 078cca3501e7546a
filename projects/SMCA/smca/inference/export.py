"""A trained detector as one file that runs without this package: ONNX, or PyTorch's own .pt2.

The graph is the model's own forward pass, traced by `torch.export`, with normalization and the
choice of the best detections inside. Resizing is left to the caller; how to do it is said in the
file's metadata.
"""

import contextlib
import copy
import functools
import io
import json
import logging
import warnings
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from detectron2.data import transforms as T
from detectron2.structures import ImageList
from torch import Tensor, nn

from smca.checkpoint.files import write_atomically
from smca.errors import UserError, did_you_mean, writing
from smca.modeling import SMCA
from smca.modeling.backbone import FrozenNormConv2d
from smca.modeling.scales import padding_mask
from smca.version import __version__

from .predictor import Predictor
from .pretrained import need_extra

INPUTS = ("images", "image_sizes")
OUTPUTS = ("boxes", "scores", "labels")
# The oldest with all operators that the graph needs: what reads ONNX files reads this.
OPSET = 18
METADATA_NAME = "metadata.json"  # the file in a .pt2
# What makes and uses weight maps, which half types round too much.
_EXACT_MODULES = ("WeightMapPredictor", "CoAttention")
# The oldest PyTorch whose files were seen to be right (docs/testing.md): 2.6 fails at ONNX, and
# .pt2 files of 2.9 refuse sizes that they could compute.
OLDEST_TORCH = {"onnx": "2.9", "pt2": "2.14"}


class ExportableDetector(nn.Module):
    """A copy of a model, which takes images of that format, as a function of tensors alone, for
    batches and images of any size."""

    def __init__(self, model: SMCA, image_format: str = "RGB"):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.criterion = None
        for module in self.model.modules():
            if isinstance(module, FrozenNormConv2d):
                module.absorb_norm()
        self.reverse_channels = image_format == "BGR"

    def forward(self, images: Tensor, image_sizes: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: (B, 3, H, W) float32 RGB, 0 to 255, padded at the right and bottom with any
                numbers.
            image_sizes: (B, 2) int64, (height, width) of each image inside its padding.

        Returns:
            boxes (B, K, 4) xyxy in pixels of the image, not clipped to it; scores (B, K); labels
            (B, K) int64, class indices; best first.
        """
        model = self.model
        if self.reverse_channels:
            images = images.flip(1)
        size = images.shape[-2], images.shape[-1]
        padding = padding_mask(image_sizes, size, size)[:, None]
        images = ((images - model.pixel_mean) / model.pixel_std).masked_fill(padding, 0)
        output = model.forward_features(ImageList(images, image_sizes))
        boxes, scores, labels, _ = model.top_detections(model.forward_head(output))
        return boxes * image_sizes.flip(1).repeat(1, 2)[:, None], scores, labels


def check_export(output: str, format: str) -> None:
    """Raise the errors of `export_detector` that need no model."""
    if format not in FORMATS:
        raise UserError(f"There is no --format {format}{did_you_mean(format, list(FORMATS))}")
    if not output.endswith(f".{format}"):
        raise UserError(f"The output {output} needs a name that ends in .{format}.")
    if torch.__version__ < OLDEST_TORCH[format]:
        raise UserError(
            f"--format {format} needs PyTorch {OLDEST_TORCH[format]} or newer, this is "
            f"{torch.__version__}: the weights can be exported in an environment that has it."
        )
    if format == "onnx":
        for name in ("onnx", "onnxscript"):
            need_extra(name, "export")


def export_detector(
    predictor: Predictor, output: str, format: str = "onnx", threshold: float = 0.5
) -> None:
    """Write a detector on the CPU as one file, whole or not at all.

    Args:
        predictor: the detector.
        output: file to write, with the format, "onnx" or "pt2", as its suffix.
        threshold: lowest score for the metadata. The graph gives all K detections.

    Raises:
        UserError: the format, the file, the model, or its preprocessing is not possible.
    """
    check_export(output, format)
    if not isinstance(predictor.model, SMCA):
        kind = type(predictor.model).__name__
        raise UserError(f"Only an SMCA or DETR model of this package can be exported, not {kind}.")
    short_side, max_size = _resizing(predictor.augmentations.augs)
    metadata = {
        "class_names": predictor.class_names,
        "category_ids": [predictor.category_ids[index] for index in sorted(predictor.category_ids)],
        "short_side": short_side,
        "max_size": max_size,
        "threshold": threshold,
        "smca_version": __version__,
    }
    program = _trace(ExportableDetector(predictor.model, predictor.image_format))
    save = FORMATS[format](program, metadata)
    with writing(f"The output {output}"), _quiet():
        write_atomically(output, save)


def _resizing(augmentations: List[T.Augmentation]) -> Tuple[Optional[int], Optional[int]]:
    """Short side and greatest long side that the evaluation resizes to; None: it does not."""
    if not augmentations:
        return None, None
    resize, *others = augmentations
    if not others and isinstance(resize, T.ResizeShortestEdge):
        if len(set(resize.short_edge_length)) == 1:
            return int(resize.short_edge_length[0]), int(resize.max_size)
    raise UserError(
        "An exported file can only say one resizing of the short side: keep T.ResizeShortestEdge "
        "of one size in dataloader.test.mapper.augmentations."
    )


def _trace(detector: ExportableDetector) -> torch.export.ExportedProgram:
    """The graph, for any number and size of images."""
    dynamic = torch.export.Dim.DYNAMIC
    # Sizes without a common divisor: none is taken for another's multiple.
    height, width = 165, 203
    images = torch.zeros(2, 3, height, width)
    image_sizes = torch.tensor([[height, width - 50], [height - 50, width]])
    shapes = ({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic})
    with torch.no_grad(), _quiet():
        return torch.export.export(detector, (images, image_sizes), dynamic_shapes=shapes)


def _as_onnx(program: torch.export.ExportedProgram, metadata: Dict[str, Any]) -> Callable[..., Any]:
    with _quiet():
        onnx_program: Any = torch.onnx.export(
            program,
            input_names=INPUTS,
            output_names=OUTPUTS,
            dynamic_shapes=({0: "B", 2: "H", 3: "W"}, {0: "B"}),  # names only
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    float32_nodes = []
    for node in onnx_program.model.graph:
        modules = node.metadata_props.get("namespace", "")
        if any(name in modules for name in _EXACT_MODULES):
            float32_nodes.append(node.name)
        node.metadata_props.clear()  # the lines of Python that it comes from
    metadata = {**metadata, "float32_nodes": float32_nodes}
    values = {key: json.dumps(value) for key, value in metadata.items()}
    onnx_program.model.metadata_props.update(values)
    return lambda file: onnx_program.save(file.name, external_data=False)


def _as_pt2(program: torch.export.ExportedProgram, metadata: Dict[str, Any]) -> Callable[..., Any]:
    extra_files = {METADATA_NAME: json.dumps(metadata)}
    return functools.partial(torch.export.save, program, extra_files=extra_files)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters say of their own inner workings."""
    for name in ("onnxscript", "onnx_ir", "torch.onnx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# Of a graph and its metadata, what writes them into a binary file.
FORMATS: Dict[str, Callable[..., Callable[..., Any]]] = {"onnx": _as_onnx, "pt2": _as_pt2}
