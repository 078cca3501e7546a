#!/usr/bin/env python3
"""Speed and memory of this project's models beside what a user would take instead.

    python benchmarks/compare_peers.py --official DIR --dtypes float32
    python benchmarks/compare_peers.py --only multi faster_rcnn --tasks inference

DIR is a checkout of the official SMCA (https://github.com/gaopengcuhk/SMCA-DETR), of which nothing
is changed. A peer that cannot run here has a row that says why.

Models take turns: in each of the repeats every model runs in a process of its own, ours before its
peers. Times are medians over the repeats. A ratio is the median of the repeats' ratios of the peer
to ours. Memory is the peak over what the process held before it built the model. All models have
random weights and see the same images with ten objects each. A training step is forward, losses,
backward, clipping and the optimizer's step, as the peer's own recipe has it.
"""

import contextlib
import importlib
import itertools
import os
import statistics
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence
from unittest import mock

from smca.errors import UserError, at_least, command_line, exit_code

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import box_convert
from tqdm import tqdm

from benchmark import build_inference, build_train_step
from measuring import (
    CONFIGS,
    DTYPES,
    Options,
    Run,
    Size,
    add_options,
    autocast,
    in_fresh_process,
    measure,
    print_table,
    random_batch,
    random_images,
    resident_bytes,
    tame,
    without_gradients,
)

TASKS = {"inference": "inference", "train_step": "training step"}
COLUMNS = ["model", "task", "size", "type", "s", "MiB", "time, peer / ours", "memory, peer / ours"]

Build = Callable[[str, Size], Run]  # makes the function to measure, of a task and an image size
Record = Dict[str, Any]


class Model(NamedTuple):
    """
    Attributes:
        label: what the table calls it.
        load: imports what the model needs and gives the function that builds it.
        ours: the name of our model that a peer is compared with.
    """

    label: str
    load: Callable[[Options], Build]
    ours: Optional[str] = None


def ours(config: str) -> Callable[[Options], Build]:
    """A config's model, as benchmark.py measures it."""

    def load(options: Options) -> Build:
        builders = {"inference": build_inference, "train_step": build_train_step}
        path = str(CONFIGS / f"{config}.py")
        return lambda task, size: builders[task](options, path, size)

    return load


# ---- What peers have in common


def normalized(image: Tensor) -> Tensor:
    """A (3, H, W) image of bytes as DETR's training gets it."""
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    return (image - mean[:, None, None]) / std[:, None, None]


def detr_target(item: Dict[str, Any]) -> Dict[str, Tensor]:
    """Classes, and boxes as centers, widths and heights in parts of the image's."""
    height, width = item["image"].shape[1:]
    boxes = box_convert(item["instances"].gt_boxes.tensor, "xyxy", "cxcywh")
    return {
        "labels": item["instances"].gt_classes,
        "boxes": boxes / torch.tensor([width, height] * 2),
        "size": torch.tensor([height, width]),
    }


def detr_optimizer(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW with a tenth of the rate for the backbone, as DETR and its heirs train."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups: List[Dict[str, Any]] = [
        {"params": [p for name, p in named if "backbone" not in name]},
        {"params": [p for name, p in named if "backbone" in name], "lr": 1e-5},
    ]
    return torch.optim.AdamW(groups, lr=1e-4, weight_decay=1e-4)


def train_step(
    options: Options,
    model: nn.Module,
    loss: Callable[[], Tensor],
    optimizer: torch.optim.Optimizer,
    max_norm: Optional[float] = 0.1,
) -> Run:
    """The body of the usual loop, with mixed precision in forward and losses alone."""

    def run() -> None:
        with autocast(options):
            total = loss()
        optimizer.zero_grad()
        total.backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        optimizer.step()

    return run


def total(losses: Iterable[Tensor]) -> Tensor:
    """The sum of losses."""
    return torch.stack([loss.squeeze() for loss in losses]).sum()


# ---- The official code


def import_official(checkout: Path) -> Any:
    """Import the official repository's ``main``, as it is. A torchvision whose version it can
    compare, and no download of a backbone, are arranged from outside.

    Raises:
        UserError: the folder that the user names has no such code.
    """
    if not (checkout / "models").is_dir():
        raise UserError(f"{checkout} has no official SMCA: name a checkout of the official code.")
    sys.path.insert(0, str(checkout))
    with (
        mock.patch.object(torchvision, "__version__", "0.9.0"),
        contextlib.redirect_stdout(sys.stderr),
    ):
        main: Any = importlib.import_module("main")
        backbone: Any = importlib.import_module("models.backbone")
    backbone.is_main_process = lambda: False  # it would download weights
    return main


def official(words: str) -> Callable[[Options], Build]:
    """The official model that an official command line trains."""

    def load(options: Options) -> Build:
        if options.official is None:
            raise UserError("Not given: --official names a checkout of the official code.")
        main = import_official(Path(options.official))
        misc: Any = sys.modules["util.misc"]

        def build(task: str, size: Size) -> Run:
            args = main.get_args_parser().parse_args(["--device", "cpu", *words.split()])
            model, criterion, postprocessors = main.build_model(args)
            tame(model)
            if task == "inference":
                model.eval()
                images = [normalized(item["image"]) for item in random_images(1, size)]
                sizes = [{"size": torch.tensor(size)}]

                def infer() -> None:
                    samples = misc.nested_tensor_from_tensor_list(images)
                    postprocessors["bbox"](model([samples, sizes]), torch.tensor([size]))

                return without_gradients(options, infer)
            batch = random_batch(options.batch_size, size)
            images = [normalized(item["image"]) for item in batch]
            targets = [detr_target(item) for item in batch]
            model.train()
            weights = criterion.weight_dict

            def loss() -> Tensor:
                samples = misc.nested_tensor_from_tensor_list(images)
                losses = criterion(model([samples, targets]), targets)
                return total(value * weights[k] for k, value in losses.items() if k in weights)

            return train_step(options, model, loss, detr_optimizer(model))

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
        model = tame(build_model(cfg))
        if task == "inference":
            model.eval()
            images = random_images(1, size)
            return without_gradients(options, lambda: model(images))
        batch, storage = random_batch(options.batch_size, size), EventStorage()
        model.train()

        def loss() -> Tensor:
            with storage:
                return total(model(batch).values())

        return train_step(options, model, loss, build_optimizer(cfg, model), max_norm=None)

    return build


SINGLE_SCALE = "--num_queries 300 --dynamic_scale type3"
# Each of ours comes before the peers that are compared with it.
MODELS: Dict[str, Model] = {
    "single": Model("SMCA single scale, ours", ours("smca_single_scale_r50_50ep")),
    "official_single": Model("SMCA single scale, official", official(SINGLE_SCALE), "single"),
    "multi": Model("SMCA, three scales, ours", ours("smca_r50_50ep")),
    "faster_rcnn": Model("Faster R-CNN R50-FPN, Detectron2", faster_rcnn, "multi"),
}


# ---- Measuring


def measure_model(name: str, task: str, options: Options) -> Record:
    """Measure the ``seconds`` and ``bytes`` of a model in this process, or say why it is
    ``missing``."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    try:
        build = MODELS[name].load(options)
        before = resident_bytes("VmRSS")
        found = measure(build(task, options.sizes[task]), options)
    except UserError as error:
        return {"missing": str(error)}
    except Exception as error:  # of code that is not ours, with whatever it finds here
        return {"missing": f"It fails here: {type(error).__name__}: {error}".splitlines()[0]}
    return {"seconds": found.seconds, "bytes": found.peak_bytes - before}


def measure_all(task: str, options: Options) -> List[List[str]]:
    """Measure all models in turns; gives the rows of `COLUMNS`."""
    found: Dict[str, List[Record]] = {name: [] for name in options.only}
    turns = list(itertools.product(range(options.repeats), options.only))
    for _, name in tqdm(turns, desc=f"{task}, {options.dtype}", unit="run", disable=None):
        if any("missing" in record for record in found[name]):
            continue
        try:
            found[name].append(in_fresh_process(measure_model, name, task, options))
        except UserError as error:  # the process was killed
            found[name].append({"missing": str(error)})
    images = options.batch_size if task == "train_step" else 1
    size = " x ".join(map(str, (images, *options.sizes[task])))
    return [
        [MODELS[name].label, TASKS[task], size, options.dtype, *cells(found, name)]
        for name in options.only
    ]


def cells(found: Dict[str, List[Record]], name: str) -> List[str]:
    """Seconds, memory and both ratios of a model, given the records of all repeats by model."""
    if "missing" in found[name][-1]:
        return ["", "", found[name][-1]["missing"], ""]
    seconds = statistics.median(record["seconds"] for record in found[name])
    memory = statistics.median(record["bytes"] for record in found[name])
    texts = [f"{seconds:.2f}", f"{memory / 2**20:.0f}"]
    others = found.get(MODELS[name].ours or "", [])
    for key in ("seconds", "bytes"):
        ratios = [a[key] / b[key] for a, b in zip(found[name], others) if key in b]
        texts.append(f"{statistics.median(ratios):.2f}" if ratios else "")
    return texts


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--official", metavar="DIR", help="a checkout of the official SMCA")
    among = f"among {', '.join(MODELS)}"
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=among)
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    add("--dtypes", nargs="+", choices=DTYPES, default=["float32", "bf16"], help="of autocast")
    add("--image-size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    add("--train-size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"))
    add("--batch-size", type=at_least(1), default=2, help="of the training step")
    add("--repeats", type=at_least(1), default=5, help="turns of all models")
    add_options(parser)
    options = parser.parse_args(argv)
    options.sizes = dict(zip(TASKS, (tuple(options.image_size), tuple(options.train_size))))
    options.device, options.compile, options.overrides = "cpu", False, []
    if options.official is not None and not Path(options.official).is_dir():
        raise UserError(f"--official {options.official} is no folder.")
    options.only = [name for name in MODELS if name in options.only]
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of others' code, in each process
    rows: List[List[str]] = []
    for task, dtype in itertools.product(options.tasks, options.dtypes):
        options.dtype = dtype
        rows += measure_all(task, options)
    print_table(COLUMNS, rows, options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
