#!/usr/bin/env python3
"""Time and peak memory of the models and their parts.

    python benchmarks/benchmark.py                                       # all, the main models
    python benchmarks/benchmark.py inference train_step --config configs/smca_conv_r50_50ep.py
    python benchmarks/benchmark.py inference --device cuda --dtype bf16 --compile
    python benchmarks/benchmark.py train_step model.dropout=0 model.num_queries=100
    python benchmarks/benchmark.py inference --config configs/detr_r50_50ep.py --profile

Each measurement has a process of its own. "extra MiB" is the peak over what the process held before
the first call, with the model built. Models have random weights and images. GFLOP/s count a
multiply-add as two; the share is of the rate of a large matrix product of the same type, measured
by the same process. --profile prints the operators of PyTorch's profiler as well.
"""

import argparse
import copy
import functools
import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from smca.config import AMP_DTYPES, load_config
from smca.data import draw_scene
from smca.engine import Trainer
from smca.errors import UserError, at_least, exit_code
from smca.modeling import SMCA, SetCriterion
from smca.modeling.kernels import attend
from smca.modeling.matcher import Targets
from smca.modeling.weight_map import Gaussian

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.structures import BoxMode
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from PIL import Image
from torch.utils.benchmark import Timer
from tqdm import tqdm

from analyze_model import analyze, analyze_training
from measuring import (
    CONFIGS,
    DTYPES,
    MAIN_MODELS,
    Measurement,
    Options,
    Run,
    Size,
    add_options,
    in_fresh_process,
    measure,
    mebibytes,
    print_table,
    random_batch,
    random_images,
    tame,
    without_gradients,
)

COLUMNS = ["measurement", "config", "size", "s", "GFLOP/s", "share", "extra MiB", "peak MiB"]


class Job(NamedTuple):
    """What one process measures.

    Attributes:
        name, size: what the table calls it.
        build: makes the function to measure of the options and `arguments`.
        arguments: further arguments of `build`.
        config: the config file of the model, if there is one.
        cost: counts the multiply-adds of a call, given a config, height and width.
    """

    name: str
    size: str
    build: Callable[..., Run]
    arguments: Dict[str, Any]
    config: str = ""
    cost: Optional[Callable[[DictConfig, int, int], int]] = None


# ---- Parts of the models


def build_co_attention(options: Options, cells: Size, num_queries: int, backward: bool) -> Run:
    """Attention of 2 images with 8 heads of 32 channels, between the projections."""
    batch, heads, head_dim = 2, 8, 32
    dtype = AMP_DTYPES.get(options.dtype, torch.float32)
    make = functools.partial(torch.randn, device=options.device, dtype=dtype)
    query = make(batch, heads, num_queries, head_dim)
    key, value = (make(batch, heads, cells[0] * cells[1], head_dim) for _ in range(2))
    shape = (batch, heads, num_queries, 2)
    centers = torch.rand(shape, device=options.device) * torch.tensor(
        cells[::-1], device=options.device
    )
    spreads = 0.5 + torch.rand(shape, device=options.device)
    inputs = (query, key, value, centers, spreads)
    for tensor in inputs:
        tensor.requires_grad_(backward)
    attention = torch.compile(attend) if options.compile else attend
    output_gradient = torch.randn_like(query)

    def run() -> None:
        weight_map = Gaussian(centers, spreads, 1 / 8, cells)
        output = attention(query, key, value, weight_map=weight_map)
        if backward:
            torch.autograd.grad(output, inputs, output_gradient)

    return run


def co_attention_jobs(options: Options) -> Iterator[Job]:
    """A quarter of 50 x 84 cells to 16 times as many, and 100 to 900 queries."""
    cases = [((25 * n, 42 * n), 300) for n in (1, 2, 4, 8)] + [((50, 84), n) for n in (100, 900)]
    for backward, (cells, queries) in itertools.product((False, True), cases):
        name = "co_attention forward" + (" and backward" if backward else "")
        size = f"2 x {queries} queries, {cells[0]} x {cells[1]} cells"
        arguments = dict(cells=cells, num_queries=queries, backward=backward)
        yield Job(name, size, build_co_attention, arguments)


def build_criterion(options: Options, with_losses: bool) -> Run:
    """The matching of 16 images with 20 objects each in 6 decoder layers of 300 queries; perhaps
    the losses and their gradients as well."""
    random = functools.partial(torch.rand, device=options.device)
    logits, boxes = torch.randn_like(random(6, 16, 300, 80)) - 4, 0.1 + 0.4 * random(6, 16, 300, 4)
    targets = [
        Targets(torch.randint(80, (20,), device=options.device), 0.1 + 0.4 * random(20, 4))
        for _ in range(16)
    ]
    criterion = SetCriterion()
    if not with_losses:
        return lambda: criterion.matcher(logits, boxes, targets)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    if options.compile:
        criterion.compile()
    return lambda: torch.autograd.grad(sum(criterion(*inputs, targets).values()), inputs)


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
    return tame(instantiate(cfg.model)).to(options.device)  # type: ignore[return-value]


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


def build_train_mapper(options: Options, config: str, size: Size) -> Run:
    """Reading and augmenting eight images as in training: JPEG files with 10 boxes each."""
    height, width = size
    rng, folder = np.random.default_rng(0), tempfile.TemporaryDirectory()
    items = []
    for index in range(8):
        file = Path(folder.name) / f"{index}.jpg"
        Image.fromarray(draw_scene(rng).image).resize((width, height)).save(file, quality=90)
        corners = np.sort(rng.uniform(0, 1, (10, 2, 2)), axis=1) * (width, height)
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0, "iscrowd": 0}
            for box in corners.reshape(10, 4).tolist()
        ]
        item = dict(file_name=str(file), height=height, width=width, image_id=index)
        items.append({**item, "annotations": annotations})
    mapper = instantiate(load_config(config, options.overrides).dataloader.train.mapper)

    def run() -> None:
        assert folder  # keeps the files
        for item in items:
            mapper(copy.deepcopy(item))

    return run


def model_jobs(
    options: Options,
    name: str,
    build: Callable[..., Run],
    sizes: Sequence[Size],
    batch_size: int = 1,
    cost: Optional[Callable[[DictConfig, int, int], int]] = None,
) -> Iterator[Job]:
    """A job for each config and image size."""
    for config, size in itertools.product(options.config, sizes):
        text = f"{batch_size} x {size[0]} x {size[1]}"
        yield Job(name, text, build, dict(config=config, size=size), config, cost)


def inference_cost(cfg: DictConfig, height: int, width: int) -> int:
    """Multiply-adds of one image."""
    return analyze(cfg, height, width)[2]


def jobs_of(name: str, options: Options) -> Iterator[Job]:
    """The jobs of one of `MEASUREMENTS`."""
    if name == "co_attention":
        yield from co_attention_jobs(options)
    elif name == "encoder":
        yield from model_jobs(options, name, build_encoder, options.image_size)
    elif name == "matcher":
        yield Job(name, "16 images", build_criterion, dict(with_losses=False))
    elif name == "criterion":
        name = "criterion, matcher and backward"
        yield Job(name, "16 images", build_criterion, dict(with_losses=True))
    elif name == "inference":
        sizes = options.image_size
        yield from model_jobs(options, name, build_inference, sizes, cost=inference_cost)
    elif name == "train_step":
        sizes, batch = options.train_size, options.batch_size
        yield from model_jobs(options, name, build_train_step, sizes, batch, analyze_training)
    else:
        yield from model_jobs(options, name, build_train_mapper, [(480, 640)], 8)


MEASUREMENTS = [
    *("co_attention", "encoder", "matcher", "criterion", "inference", "train_step"),
    "train_mapper",
]


# ---- Measuring


def measure_job(job: Job, options: Options) -> Dict[str, Any]:
    """Measure a job in this process.

    Returns:
        Its :class:`Measurement`, and the rate of a large matrix product in GFLOP/s.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    run = job.build(options, **job.arguments)
    rate = matrix_product_rate(options) if job.cost else None
    found = measure(run, options)
    if options.profile:
        with torch.profiler.profile() as profile:
            run()
        order = f"self_{options.device}_time_total"
        table = profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50)
        print(table)
    return {"measurement": found, "rate": rate}


def matrix_product_rate(options: Options) -> float:
    """GFLOP/s of a large matrix product in the measurement's type."""
    dtype, size = AMP_DTYPES.get(options.dtype, torch.float32), 2048
    left, right = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    timer = Timer("left @ right", globals=locals(), num_threads=options.threads)
    return 2e-9 * size**3 / timer.blocked_autorange(min_run_time=0.5).median


def row_of(job: Job, options: Options) -> List[str]:
    """Measure a job in a process of its own.

    Returns:
        The row of `COLUMNS`.
    """
    speed = share = ""
    found = in_fresh_process(measure_job, job, options)
    measurement: Measurement = found["measurement"]
    if job.cost is not None:
        images = options.batch_size if job.name == "train_step" else 1
        cost = images * job.cost(load_config(job.config, options.overrides), *job.arguments["size"])
        gflops = 2e-9 * cost / measurement.seconds
        speed, share = f"{gflops:.0f}", f"{gflops / found['rate']:.0%}"
    memory = [mebibytes(n) for n in (measurement.extra_bytes, measurement.peak_bytes)]
    name = [job.name, Path(job.config).stem, job.size]
    return [*name, f"{measurement.seconds:.3g}", speed, share, *memory]


# ---- Command line


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = f"measurements ({', '.join(MEASUREMENTS)}; default: all), then overrides, key=value"
    parser.add_argument("what", nargs="*", help=what)
    parser.add_argument("--config", action="append", metavar="FILE", help="can be repeated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is measured")
    for name, whose in (("image", "inference and the encoder"), ("train", "the training step")):
        text = f"of {whose}, can be repeated"
        parser.add_argument(
            f"--{name}-size", type=int, nargs=2, action="append", metavar=("H", "W"), help=text
        )
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="of the training step")
    parser.add_argument("--profile", action="store_true", help="print the operators")
    add_options(parser)
    return parser


def parse_options(argv: Optional[Sequence[str]] = None) -> Options:
    """The command line, checked and completed."""
    options = get_parser().parse_intermixed_args(argv)
    options.overrides = [word for word in options.what if "=" in word]
    options.what = [word for word in options.what if "=" not in word] or MEASUREMENTS
    options.config = options.config or [str(CONFIGS / f"{name}.py") for name in MAIN_MODELS]
    options.image_size = [tuple(s) for s in options.image_size or [(800, 1066), (800, 1333)]]
    options.train_size = [tuple(s) for s in options.train_size or [(512, 672)]]
    for name in options.what:
        if name not in MEASUREMENTS:
            raise UserError(f"No measurement {name}: choose among {', '.join(MEASUREMENTS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("No GPU can be used here: take --device cpu.")
    for config in options.config:
        load_config(config, options.overrides)
    return options


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    options = parse_options(argv)
    jobs = [job for name in options.what for job in jobs_of(name, options)]
    rows = []
    for job in tqdm(jobs, unit="measurement", disable=None):
        rows.append(row_of(job, options))
        with tqdm.external_write_mode():
            print(" ".join(filter(None, rows[-1][:4])), "s", flush=True)
    print_table(COLUMNS, rows, options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
