"""The models that benchmarks/compare_peers.py measures: ours, and what a user would take instead.

Each `Model` has two stages, so that memory can be told apart: `load` imports what it needs, and
gives what builds the function to measure. All have random weights and see the same images, with
ten objects each. A training step is forward, losses, backward, clipping and the optimizer's step,
as the peer's own recipe has it.
"""

import contextlib
import importlib
import pdb
import shutil
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence
from unittest import mock

from smca.errors import UserError

import torch
import torchvision
from detectron2.structures import Boxes
from torch import Tensor, nn
from torchvision.ops import box_convert

from benchmark_cases import (
    Options,
    Run,
    Size,
    autocast,
    build_inference,
    build_train_step,
    random_batch,
    random_images,
    without_gradients,
)

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
TASKS = ("inference", "train_step")
NUM_CLASSES = 80
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

# Builds the function to measure: of a task, for images of a size.
Build = Callable[[str, Size], Run]


@dataclass(frozen=True)
class Model:
    """
    Attributes:
        label: in the table.
        load: imports what the model needs and gives what builds it.
        counterpart: of a peer, the name of our model that it is compared with.
    """

    label: str
    load: Callable[[Options], Build]
    counterpart: Optional[str] = None


# ---- Ours


def ours(config: str) -> Callable[[Options], Build]:
    """A config's model, as benchmarks/benchmark.py measures it."""

    def load(options: Options) -> Build:
        path = str(CONFIGS / f"{config}.py")
        builders = dict(zip(TASKS, (build_inference, build_train_step)))
        return lambda task, size: builders[task](options, path, size)

    return load


# ---- What peers have in common


def calm(model: nn.Module) -> nn.Module:
    """A model whose frozen norms halve what they get: random weights between norms that do
    nothing would double the features in each block."""
    for module in model.modules():
        if "FrozenBatchNorm" in type(module).__name__:
            module.weight.fill_(0.5)  # type: ignore[operator,union-attr]
    return model


def normalized(image: Tensor) -> Tensor:
    """A (3, h, w) image of bytes as DETR's training gets it."""
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    return (image - mean) / std


def relative_boxes(boxes: Boxes, size: Size) -> Tensor:
    """(N, 4) centers, widths and heights in parts of the image's."""
    height, width = size
    return box_convert(boxes.tensor, "xyxy", "cxcywh") / torch.tensor([width, height] * 2)


def train_step(
    options: Options,
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    max_norm: Optional[float] = 0.1,
) -> Run:
    """The usual loop's body; mixed precision in forward and losses alone."""

    def run() -> None:
        with autocast(options):
            total = loss()
        optimizer.zero_grad()
        total.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()

    return run


def detr_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a tenth of the rate for the backbone, as DETR and its heirs train."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: List[Dict[str, Any]] = [
        {"params": [p for name, p in named if "backbone" not in name]},
        {"params": [p for name, p in named if "backbone" in name], "lr": 1e-5},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)


# ---- The official code


class OfficialCode:
    """A checkout of the official repository, in which nothing is changed.

    Its Python files are copied to a temporary folder, and imported from there as they are. What
    they find around them is arranged from outside: a torchvision whose version they can compare,
    no debugger, and no download of a backbone.

    Args:
        checkout: the folder that the user names.
        multi_scale: the later multi-scale code, a folder in it or the archive that it comes in.

    Raises:
        UserError: the folder has no such code.
    """

    def __init__(self, checkout: Path, multi_scale: bool):
        self.folder = tempfile.TemporaryDirectory()
        target = Path(self.folder.name)
        if multi_scale:
            self._copy_multi_scale(checkout, target)
        elif (checkout / "models" / "attention_layer.py").is_file():
            copy_python(checkout, target)
        else:
            raise UserError(f"{checkout} is no checkout of the official SMCA.")
        sys.path.insert(0, str(target))
        with mock.patch.object(torchvision, "__version__", "0.9.0"):
            # The command line's defaults are those of the models.
            self.main: Any = importlib.import_module("main")
        backbone: Any = importlib.import_module("models.backbone")
        backbone.is_main_process = lambda: False  # it would download weights
        pdb.set_trace = lambda *args, **kwargs: None  # left in the multi-scale code

    @staticmethod
    def _copy_multi_scale(checkout: Path, target: Path) -> None:
        with tempfile.TemporaryDirectory() as name:
            unpacked = Path(name)
            for archive in checkout.glob("*.zip"):
                with zipfile.ZipFile(archive) as content:
                    content.extractall(unpacked)
            candidates = [*checkout.glob("*/main.py"), *unpacked.glob("*/main.py")]
            for path in candidates:
                if (path.parent / "models" / "transformer_44_dot_4.py").is_file():
                    copy_python(path.parent, target)
                    # The model whose log says 44.4 AP: shared convolutions of kernel 7.
                    models = target / "models"
                    shutil.copy(models / "transformer_44_dot_4.py", models / "transformer.py")
                    return
        raise UserError(f"{checkout} has no multi-scale code (Multi_scale_SMCA.zip).")

    def build(self, words: Sequence[str]) -> Any:
        """Model, criterion and post-processing for options of its command line."""
        args = self.main.get_args_parser().parse_args(["--device", "cpu", *words])
        model, criterion, postprocessors = self.main.build_model(args)
        return calm(model), criterion, postprocessors["bbox"]


def copy_python(source: Path, target: Path) -> None:
    """Copy the Python files of a folder, with their folders."""
    for path in source.rglob("*.py"):
        copy = target / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)


def official(words: str, multi_scale: bool = False) -> Callable[[Options], Build]:
    """The official model that an official command line trains."""

    def load(options: Options) -> Build:
        if options.official is None:
            raise UserError("Not given: --official names a checkout of the official code.")
        with contextlib.redirect_stdout(sys.stderr):
            code = OfficialCode(Path(options.official), multi_scale)
        misc: Any = importlib.import_module("util.misc")

        def build(task: str, size: Size) -> Run:
            model, criterion, postprocess = code.build(words.split())
            if task == "inference":
                model.eval()
                images = [normalized(item["image"]) for item in random_images(1, size)]
                sizes = [{"size": torch.tensor(size)}]

                def infer() -> None:
                    samples = misc.nested_tensor_from_tensor_list(images)
                    postprocess(model([samples, sizes]), torch.tensor([size]))

                return without_gradients(options, infer)
            batch = random_batch(options.batch_size, size, NUM_CLASSES)
            images = [normalized(item["image"]) for item in batch]
            targets = [
                {
                    "labels": item["instances"].gt_classes,
                    "boxes": relative_boxes(item["instances"].gt_boxes, size),
                    "size": torch.tensor(size),
                }
                for item in batch
            ]
            model.train()
            weights = criterion.weight_dict

            def loss() -> Tensor:
                samples = misc.nested_tensor_from_tensor_list(images)
                losses = criterion(model([samples, targets]), targets)
                return total(value * weights[k] for k, value in losses.items() if k in weights)

            return train_step(options, model, loss, detr_optimizer(model))

        return build

    return load


def total(losses: Iterable[Tensor]) -> Tensor:
    """Their sum."""
    return torch.stack([loss.squeeze() for loss in losses]).sum()


# ---- Hugging Face


def hugging_face(name: str, **settings: Any) -> Callable[[Options], Build]:
    """A model of transformers with its own settings, such as its number of queries."""

    def load(options: Options) -> Build:
        try:
            import transformers
        except ImportError as error:
            raise UserError(
                "transformers is not installed: run pip install transformers (or install the "
                "extra 'plug_in')."
            ) from error

        def build(task: str, size: Size) -> Run:
            config = getattr(transformers, f"{name}Config")(
                backbone_config=transformers.ResNetConfig(
                    **{"out_features": ["stage4"], **settings.get("backbone", {})}
                ),
                use_timm_backbone=False,
                auxiliary_loss=True,
                num_labels=NUM_CLASSES,
                **{key: value for key, value in settings.items() if key != "backbone"},
            )
            model = calm(getattr(transformers, f"{name}ForObjectDetection")(config))
            for key, parameter in model.named_parameters():
                # As DETR trains; by its names of layers it would freeze all of this ResNet.
                is_stem = "embedder" in key or ".stages.0." in key
                parameter.requires_grad_(not ("backbone" in key and is_stem))
            batch = random_batch(
                options.batch_size if task == "train_step" else 1, size, NUM_CLASSES
            )
            inputs = {
                "pixel_values": torch.stack([normalized(item["image"]) for item in batch]),
                "pixel_mask": torch.ones(len(batch), *size, dtype=torch.int64),
            }
            if task == "inference":
                model.eval()
                processor = getattr(transformers, f"{name}ImageProcessor")()

                def infer() -> None:
                    processor.post_process_object_detection(
                        model(**inputs), threshold=0.0, target_sizes=[size]
                    )

                return without_gradients(options, infer)
            labels = [
                {
                    "class_labels": item["instances"].gt_classes,
                    "boxes": relative_boxes(item["instances"].gt_boxes, size),
                }
                for item in batch
            ]
            model.train()
            optimizer = detr_optimizer(model)
            return train_step(
                options, model, lambda: model(**inputs, labels=labels).loss, optimizer
            )

        return build

    return load


# ---- Detectron2


def faster_rcnn(options: Options) -> Build:
    """Detectron2's Faster R-CNN with its own settings."""
    from detectron2 import model_zoo
    from detectron2.modeling import build_model
    from detectron2.solver import build_optimizer
    from detectron2.utils.events import EventStorage

    def build(task: str, size: Size) -> Run:
        cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_3x.yaml")
        cfg.MODEL.DEVICE = "cpu"
        model = calm(build_model(cfg))
        if task == "inference":
            model.eval()
            images = random_images(1, size)
            return without_gradients(options, lambda: model(images))
        batch = random_batch(options.batch_size, size, NUM_CLASSES)
        model.train()
        storage = EventStorage()

        def loss() -> Tensor:
            with storage:
                return total(model(batch).values())

        return train_step(options, model, loss, build_optimizer(cfg, model), max_norm=None)

    return build


# ---- All


MULTI_SCALE = "--num_queries 300 --dynamic_scale type3 --enc_layers 6 --dim_feedforward 1024"
# Each of ours before the peers that are compared with it.
MODELS: Dict[str, Model] = {
    "single": Model("SMCA single scale, ours", ours("smca_single_scale_r50_50ep")),
    "official_single": Model(
        "SMCA single scale, official", official("--num_queries 300 --dynamic_scale type3"), "single"
    ),
    "hf_detr": Model("DETR, Hugging Face, 100 queries", hugging_face("Detr"), "single"),
    "hf_conditional_detr": Model(
        "Conditional DETR, Hugging Face, 300 queries", hugging_face("ConditionalDetr"), "single"
    ),
    "conv": Model("SMCA conv, ours", ours("smca_conv_r50_50ep")),
    "official_conv": Model("SMCA conv, official", official(MULTI_SCALE, multi_scale=True), "conv"),
    "multi": Model("SMCA, three scales, ours", ours("smca_r50_50ep")),
    "faster_rcnn": Model("Faster R-CNN R50-FPN, Detectron2", faster_rcnn, "multi"),
}
