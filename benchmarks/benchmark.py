#!/usr/bin/env python3
"""Time and peak memory of the models and of their co-attention.

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

import itertools
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence

from smca.config import AMP_DTYPES, load_config
from smca.engine import Trainer
from smca.errors import UserError, at_least, command_line, exit_code
from smca.modeling import SMCA
from smca.modeling.kernels import attend
from smca.modeling.weight_map import Gaussian

import torch
from detectron2.config import instantiate
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor
from torch.profiler import ProfilerActivity
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
    print_table,
    random_batch,
    random_images,
    tame,
    without_gradients,
)

BETA = 8.0  # divides the squared distances
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


# ---- Co-attention


def reference_attention(
    query: Tensor, key: Tensor, value: Tensor, centers: Tensor, spreads: Tensor, size: Size
) -> Tensor:
    """Co-attention as the official code has it: the squared distances of all cells from all
    centers, (B, H, Q, S, 2), then the (B, H, Q, S) map of log-weights, added to the logits."""
    y, x = (torch.arange(n, device=query.device) for n in size)
    cells = torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=-1)
    precisions = spreads.square()[..., None, :] / BETA
    log_weights = -((cells - centers[..., None, :]).square() * precisions).sum(-1)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + log_weights
    return logits.softmax(-1).to(value.dtype) @ value


def co_attention(
    query: Tensor, key: Tensor, value: Tensor, centers: Tensor, spreads: Tensor, size: Size
) -> Tensor:
    """What the decoder computes for one scale, with the arguments of the reference."""
    return attend(query, key, value, weight_map=Gaussian(centers, spreads, 1 / BETA, size))


def build_co_attention(options: Options, cells: Size, backward: bool, reference: bool) -> Run:
    """Attention of 2 images with 8 heads of 32 channels and 300 queries, without projections."""
    dtype, device = AMP_DTYPES.get(options.dtype, torch.float32), options.device
    query, key, value = (
        torch.randn(2, 8, n, 32, device=device, dtype=dtype)
        for n in (300, cells[0] * cells[1], cells[0] * cells[1])
    )
    random = torch.rand(2, 2, 8, 300, 2, device=device)
    centers = random[0] * torch.tensor(cells[::-1], device=device)
    inputs = [x.requires_grad_(backward) for x in (query, key, value, centers, 0.5 + random[1])]
    attention: Callable[..., Tensor] = reference_attention if reference else co_attention
    if options.compile:
        attention = torch.compile(attention)
    output_gradient = torch.randn_like(query)

    def run() -> None:
        output = attention(*inputs, cells)
        if backward:
            torch.autograd.grad(output, inputs, output_gradient)

    return run


def co_attention_jobs(cells: Size = (50, 84)) -> Iterator[Job]:
    """Forward, and forward and backward, each of ours and of the reference."""
    for backward, reference in itertools.product((False, True), repeat=2):
        name = "co_attention forward" + " and backward" * backward + ", reference" * reference
        arguments = dict(cells=cells, backward=backward, reference=reference)
        size = f"2 x 300 queries, {cells[0]} x {cells[1]} cells"
        yield Job(name, size, build_co_attention, arguments)


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
        yield from co_attention_jobs()
    elif name == "inference":
        sizes = options.image_size
        yield from model_jobs(options, name, build_inference, sizes, cost=inference_cost)
    else:
        sizes, batch = options.train_size, options.batch_size
        yield from model_jobs(options, name, build_train_step, sizes, batch, analyze_training)


MEASUREMENTS = ["co_attention", "inference", "train_step"]


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
        # On a GPU its kernels alone: operators would have the same times once more.
        activity = {"cpu": ProfilerActivity.CPU, "cuda": ProfilerActivity.CUDA}[options.device]
        with torch.profiler.profile(activities=[activity]) as profile:
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
    memory = [f"{n / 2**20:.0f}" for n in (measurement.extra_bytes, measurement.peak_bytes)]
    name = [job.name, Path(job.config).stem, job.size]
    return [*name, f"{measurement.seconds:.3g}", speed, share, *memory]


# ---- Command line


def parse_options(argv: Optional[Sequence[str]] = None) -> Options:
    """The command line, checked and completed."""
    parser = command_line(__doc__)
    what = f"measurements ({', '.join(MEASUREMENTS)}; default: all), then overrides, key=value"
    parser.add_argument("what", nargs="*", help=what)
    parser.add_argument("--config", action="append", metavar="FILE", help="can be repeated")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=DTYPES, help="of autocast")
    parser.add_argument("--compile", action="store_true", help="torch.compile what is measured")
    for name, whose in (("image", "inference"), ("train", "the training step")):
        text = f"of {whose}, can be repeated"
        parser.add_argument(
            f"--{name}-size", type=int, nargs=2, action="append", metavar=("H", "W"), help=text
        )
    parser.add_argument("--batch-size", type=at_least(1), default=2, help="of the training step")
    parser.add_argument("--profile", action="store_true", help="print the operators")
    add_options(parser)
    options = parser.parse_intermixed_args(argv)
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
