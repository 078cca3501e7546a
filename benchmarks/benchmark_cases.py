"""What benchmarks/benchmark.py measures: each `Job` builds a function to call again and again."""

import argparse
import copy
import itertools
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import (
    Any,
    Callable,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Optional,
    Sequence,
    Tuple,
)

from smca.analysis.metrics import COCOeval_faster, average_precision, load_truth
from smca.config import AMP_DTYPES, load_config
from smca.data import draw_scene
from smca.engine import Trainer
from smca.modeling import SMCA, SetCriterion
from smca.modeling.kernels import attend
from smca.modeling.matcher import Targets
from smca.modeling.weight_map import Gaussian

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from PIL import Image
from torch import Tensor

from analyze_model import analyze, analyze_training

Options = argparse.Namespace  # of benchmarks/benchmark.py
Size = Tuple[int, int]  # (height, width)
Run = Callable[[], Any]  # what is measured

# Ends the name of a slow reference's measurement.
REFERENCE = ", reference"
BETA = 8.0  # divides the squared distances


@dataclass
class Job:
    """What one process measures.

    Attributes:
        name, size: name it in the table and in the file; so does the config, if it has one.
        build: called with the options and `arguments`, gives the function to measure.
        cost: called likewise, gives the multiply-adds of a call, where these are reported.
    """

    name: str
    size: str
    build: Callable[..., Run]
    arguments: Dict[str, Any] = field(default_factory=dict)
    config: Optional[str] = None
    cost: Optional[Callable[..., int]] = None


# ---- Co-attention


def slow_co_attention(
    query: Tensor, key: Tensor, value: Tensor, centers: Tensor, spreads: Tensor, size: Size
) -> Tensor:
    """The reference, as the official code has it: the squared distances of all cells from all
    centers, (B, H, Q, S, 2), then the (B, H, Q, S) map of log-weights, added to the logits."""
    y, x = (torch.arange(n, device=query.device) for n in size)
    cells = torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=-1)
    precisions = spreads.square()[..., None, :] / BETA
    log_weights = -((cells - centers[..., None, :]).square() * precisions).sum(-1)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + log_weights
    return logits.softmax(-1).to(value.dtype) @ value


def fast_co_attention(
    query: Tensor, key: Tensor, value: Tensor, centers: Tensor, spreads: Tensor, size: Size
) -> Tensor:
    """What the decoder computes for one scale; arguments as of the reference."""
    return attend(query, key, value, weight_map=Gaussian(centers, spreads, 1 / BETA, size))


def build_co_attention(
    options: Options, cells: Size, num_queries: int, reference: bool = False, backward: bool = False
) -> Run:
    """Attention of 2 images with 8 heads of 32 channels, between the projections."""
    batch, heads, head_dim = 2, 8, 32
    device, dtype = options.device, AMP_DTYPES.get(options.dtype, torch.float32)
    tokens = [
        torch.randn(batch, heads, n, head_dim, device=device, dtype=dtype)
        for n in (num_queries, cells[0] * cells[1])
    ]
    tokens.append(torch.randn_like(tokens[1]))
    shape = (batch, heads, num_queries, 2)
    centers = torch.rand(shape, device=device) * torch.tensor(cells[::-1], device=device)
    spreads = 0.5 + torch.rand(shape, device=device)
    inputs = [x.requires_grad_(backward) for x in (*tokens, centers, spreads)]
    attention: Callable[..., Tensor] = slow_co_attention if reference else fast_co_attention
    if options.compile:
        attention = torch.compile(attention)
    output_gradient = torch.randn_like(tokens[0])

    def run() -> None:
        output = attention(*inputs, cells)
        if backward:
            torch.autograd.grad(output, inputs, output_gradient)

    return run


def co_attention_job(cells: Size, num_queries: int, backward: bool, reference: bool = False) -> Job:
    """Co-attention of 2 images, ours or the slow reference."""
    name = "co_attention forward" + (" and backward" if backward else "")
    arguments = dict(cells=cells, num_queries=num_queries, backward=backward, reference=reference)
    size = f"2 x {num_queries} queries, {cells[0]} x {cells[1]} cells"
    return Job(name + (REFERENCE if reference else ""), size, build_co_attention, arguments)


def co_attention_jobs(options: Options) -> Iterator[Job]:
    """Forward, and forward and backward, each of ours and of the reference."""
    for backward, reference in itertools.product((False, True), repeat=2):
        yield co_attention_job(options.cells, options.num_queries, backward, reference)


def co_attention_scaling_jobs(options: Options) -> Iterator[Job]:
    """A quarter of the cells to 16 times as many, and a third of the queries to 3 times."""
    (height, width), queries = options.cells, options.num_queries
    sizes = [((height * n // 2, width * n // 2), queries) for n in (1, 2, 4, 8)]
    sizes += [((height, width), queries * n // 3) for n in (1, 9)]
    for backward, (cells, num_queries) in itertools.product((False, True), sizes):
        yield co_attention_job(cells, num_queries, backward)


# ---- Parts of the models


def random_predictions(
    options: Options, num_images: int = 16, num_objects: int = 20
) -> Tuple[Tensor, Tensor, List[Targets]]:
    """Logits and boxes of 6 layers, 300 queries and 80 classes, and the images' targets."""
    shape, device = (6, num_images, 300), options.device
    targets = [
        Targets(
            torch.randint(80, (num_objects,), device=device),
            0.1 + 0.4 * torch.rand(num_objects, 4, device=device),
        )
        for _ in range(num_images)
    ]
    logits = torch.randn(*shape, 80, device=device) - 4
    return logits, 0.1 + 0.4 * torch.rand(*shape, 4, device=device), targets


def build_matcher(options: Options) -> Run:
    """The matching of 16 images in 6 decoder layers."""
    matcher, predictions = SetCriterion().matcher, random_predictions(options)
    return lambda: matcher(*predictions)


def build_criterion(options: Options) -> Run:
    """Losses of 16 images, matching included, and their gradients."""
    criterion = SetCriterion()
    logits, boxes, targets = random_predictions(options)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    if options.compile:
        criterion.compile()

    def run() -> None:
        losses = criterion(*inputs, targets)
        torch.autograd.grad(sum(losses.values()), inputs)

    return run


def build_encoder(options: Options, config: str, size: Size) -> Run:
    """The encoder of one image, without gradients."""
    model = build_model(options, load_config(config, options.overrides)).eval()
    encoder = model.encoder
    with torch.no_grad():
        scales = model.scales(model.preprocess(random_images(1, size)))
    if options.compile:
        encoder.compile()
    return without_gradients(options, lambda: encoder(scales))


# ---- Whole models


def build_model(options: Options, cfg: DictConfig) -> SMCA:
    """The config's model with random weights."""
    model = instantiate(cfg.model)
    # Random weights between norms that do nothing would double the features in each block, and
    # logits that no trained model has would take another path through the attention.
    for module in model.backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return model.to(options.device)


def random_images(count: int, size: Size) -> List[Dict[str, Any]]:
    """Images of (height, width) `size` in the model's input format."""
    return [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for _ in range(count)]


def random_batch(
    count: int, size: Size, num_classes: int, num_objects: int = 10
) -> List[Dict[str, Any]]:
    """Images with that many boxes each."""
    batch = random_images(count, size)
    for image in batch:
        corners = torch.rand(num_objects, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
        classes = torch.randint(num_classes, (num_objects,))
        image["instances"] = Instances(size, gt_boxes=Boxes(corners.flatten(1)), gt_classes=classes)
    return batch


def build_inference(options: Options, config: str, size: Size) -> Run:
    """The whole model on one image, without gradients."""
    model = build_model(options, load_config(config, options.overrides)).eval()
    images = random_images(1, size)
    if options.compile:
        model.compile_parts()
    return without_gradients(options, lambda: model(images))


def build_train_step(options: Options, config: str, size: Size) -> Run:
    """The trainer's own step: losses, gradients, clipping, AdamW."""
    cfg = load_config(config, options.overrides)
    model = build_model(options, cfg).train()
    cfg.optimizer.params.model = model
    batch = random_batch(options.batch_size, size, cfg.model.num_classes)
    trainer = Trainer(
        model,
        itertools.repeat(batch),
        instantiate(cfg.optimizer),
        amp_dtype=AMP_DTYPES.get(options.dtype),
        clip_grad_norm=cfg.train.clip_grad_norm,
    )
    trainer.iter, trainer.storage = 0, EventStorage()
    if options.compile:
        model.compile_parts()
    return trainer.run_step


def build_train_mapper(
    options: Options, config: str, num_images: int = 8, size: Size = (480, 640)
) -> Run:
    """Reading and augmenting images as in training: JPEG files and 10 boxes each."""
    height, width = size
    rng, folder = np.random.default_rng(0), tempfile.TemporaryDirectory()
    items = []
    for index in range(num_images):
        file = Path(folder.name) / f"{index}.jpg"
        Image.fromarray(draw_scene(rng).image).resize((width, height)).save(file, quality=90)
        corners = np.sort(rng.uniform(0, 1, (10, 2, 2)), axis=1) * (width, height)
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for box in corners.reshape(10, 4).tolist()
        ]
        items.append(dict(file_name=str(file), height=height, width=width, image_id=index))
        items[-1]["annotations"] = annotations
    mapper = instantiate(load_config(config, options.overrides).dataloader.train.mapper)

    def run() -> None:
        assert folder  # keeps the files
        for item in items:
            mapper(copy.deepcopy(item))

    return run


def train_mapper_jobs(options: Options) -> Iterator[Job]:
    """The training mapper of the first config."""
    config = options.config[0]
    yield Job("train_mapper", "8 x 480 x 640", build_train_mapper, dict(config=config), config)


def build_coco_ap(
    options: Options, fast: bool, num_images: int = 500, num_classes: int = 80
) -> Run:
    """COCO's average precision of 7 objects and 100 detections an image, seven of them near."""
    rng = np.random.default_rng(0)
    images = [{"id": i + 1, "height": 480, "width": 640} for i in range(num_images)]
    categories = [{"id": i + 1, "name": str(i)} for i in range(num_classes)]
    annotations: List[Dict[str, Any]] = []
    detections: List[Dict[str, Any]] = []
    for image in images:
        boxes = np.concatenate([rng.uniform(0, 300, (100, 2)), rng.uniform(8, 180, (100, 2))], 1)
        classes = rng.integers(num_classes, size=100) + 1
        for box, category in zip(boxes[:7].tolist(), classes.tolist()):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": category,
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        boxes[:7] += rng.normal(0, 0.08, (7, 4)) * boxes[:7, [2, 3, 2, 3]]
        scores = rng.uniform(size=100)
        for box, category, score in zip(boxes.tolist(), classes.tolist(), scores.tolist()):
            found = dict(image_id=image["id"], category_id=category, bbox=box, score=score)
            detections.append(found)
    truth = load_truth(dict(images=images, annotations=annotations, categories=categories))
    return lambda: average_precision(truth, detections, fast)


def coco_ap_jobs(options: Options) -> Iterator[Job]:
    """faster-coco-eval, where it is installed, and as the reference pycocotools."""
    size = "500 images"
    if COCOeval_faster is not None:
        yield Job("coco_ap", size, build_coco_ap, dict(fast=True))
    yield Job("coco_ap" + REFERENCE, size, build_coco_ap, dict(fast=False))


def without_gradients(options: Options, function: Run) -> Run:
    """`function` without gradients, in the type that --dtype names."""

    def run() -> None:
        with torch.no_grad(), autocast(options):
            function()

    return run


def autocast(options: Options) -> ContextManager[None]:
    """The context that --dtype names."""
    dtype = AMP_DTYPES.get(options.dtype)
    return torch.autocast(options.device, dtype=dtype, enabled=dtype is not None)


def multiply_adds(options: Options, config: str, size: Size) -> int:
    """Of one image through a config's model."""
    return analyze(load_config(config, options.overrides), *size)[2]


def training_multiply_adds(options: Options, config: str, size: Size) -> int:
    """Of a training step of a config's model."""
    one = analyze_training(load_config(config, options.overrides), *size)
    return options.batch_size * one


def model_jobs(
    options: Options,
    name: str,
    build: Callable[..., Run],
    sizes: Sequence[Size],
    batch_size: int = 1,
    cost: Optional[Callable[..., int]] = None,
) -> Iterator[Job]:
    """A job for each config and image size."""
    for config, size in itertools.product(options.config, sizes):
        text = f"{batch_size} x {size[0]} x {size[1]}"
        yield Job(name, text, build, dict(config=config, size=size), config, cost)


MEASUREMENTS: Dict[str, Callable[[Options], Iterable[Job]]] = {
    "co_attention": co_attention_jobs,
    "co_attention_scaling": co_attention_scaling_jobs,
    "encoder": lambda o: model_jobs(o, "encoder", build_encoder, o.image_size),
    "matcher": lambda o: [Job("matcher", "16 images", build_matcher)],
    "criterion": lambda o: [Job("criterion, matcher and backward", "16 images", build_criterion)],
    "inference": lambda o: model_jobs(
        o, "inference", build_inference, o.image_size, cost=multiply_adds
    ),
    "train_step": lambda o: model_jobs(
        o, "train_step", build_train_step, o.train_size, o.batch_size, training_multiply_adds
    ),
    "train_mapper": train_mapper_jobs,
    "coco_ap": coco_ap_jobs,
}
