#!/usr/bin/env python3
"""Time and peak memory of the models and their parts.

    python tools/benchmark.py --output ours.json                     # everything, the main models
    python tools/benchmark.py co_attention co_attention_scaling
    python tools/benchmark.py inference train_step --config configs/smca_conv_r50_50ep.py
    python tools/benchmark.py inference --device cuda --dtype bf16 --compile
    python tools/benchmark.py train_step model.dropout=0 model.num_queries=100
    python tools/benchmark.py inference --config configs/detr_r50_50ep.py --profile
    python tools/benchmark.py --compare before.json after.json      # ratios, before over after

Measurements: {measurements}.

Each runs in a process of its own: warm-up, then the median of the repeats. "extra memory" is the
peak over what the process held before the first call, with the model built; on the CPU it is
resident memory, on a GPU what PyTorch allocated. Models have random weights and images.

GFLOP/s count a multiply-add as two. The share is of the rate of a large matrix product of the same
type, measured by the same process just before. (On a GPU, PyTorch's defaults let float32
convolutions, but not matrix products, use TF32.)
"""

import argparse
import contextlib
import ctypes
import gc
import itertools
import json
import os
import platform
import resource
import shlex
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Callable, Optional

import torch
from detectron2.config import instantiate
from detectron2.layers import FrozenBatchNorm2d
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from tabulate import tabulate

from analyze_model import analyze
from smca.engine import Trainer, load_config
from smca.engine.trainer import AMP_DTYPES
from smca.errors import UserError
from smca.modeling import HungarianMatcher, SetCriterion
from smca.modeling.attention import attend_modulated
from smca.modeling.matcher import Targets
from smca.modeling.modulation import Gaussians, cell_channels, query_channels

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN_MODELS = [
    "smca_single_scale_r50_50ep",
    "smca_r50_50ep",
    "smca_conv_r50_50ep",
    "detr_r50_50ep",
]
# Ends the name of a slow reference's measurement.
REFERENCE = ", reference"


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
    build: Callable
    arguments: dict = field(default_factory=dict)
    config: Optional[str] = None
    cost: Optional[Callable] = None


# ---- Co-attention


def slow_co_attention(query, key, value, gaussians, size):
    """The reference, as the official code has it: the squared distances of all cells from all
    centres, (B, H, Q, S, 2), then the (B, H, Q, S) map of log-weights, added to the logits."""
    y, x = (torch.arange(n, device=query.device) for n in size)
    cells = torch.stack([x.repeat(size[0]), y.repeat_interleave(size[1])], dim=-1)
    centres, precisions = (
        g[:, :, 0].transpose(1, 2)[..., None, :] for g in (gaussians.centres, gaussians.precisions)
    )
    log_weights = -((cells - centres).square() * precisions).sum(-1)
    logits = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5 + log_weights
    return logits.softmax(-1).to(value.dtype) @ value


def fast_co_attention(query, key, value, gaussians, size):
    queries = query_channels(gaussians, 0, size, query.shape[-1], query.dtype)
    cells = cell_channels(size, query.dtype, query.device)
    return attend_modulated(query, key, value, queries, cells)


def build_co_attention(options, cells, num_queries, reference=False, backward=False):
    """Attention of 2 images with 8 heads of 32 channels, between the projections."""
    batch, heads, head_dim = 2, 8, 32
    factory = dict(device=options.device, dtype=AMP_DTYPES.get(options.dtype, torch.float32))
    num_cells = cells[0] * cells[1]
    tokens = [torch.randn(batch, heads, n, head_dim, **factory) for n in (num_queries, num_cells)]
    tokens.append(torch.randn_like(tokens[1]))
    shape = (batch, num_queries, 1, heads, 2)
    centres = torch.rand(shape, device=options.device) * torch.tensor(
        cells[::-1], device=options.device
    )
    precisions = (0.5 + torch.rand(shape, device=options.device)).square() / 8
    inputs = [x.requires_grad_(backward) for x in (*tokens, centres, precisions)]
    attention = slow_co_attention if reference else fast_co_attention
    if options.compile:
        attention = torch.compile(attention)
    output_gradient = torch.randn_like(tokens[0])

    def run():
        output = attention(*inputs[:3], Gaussians(*inputs[3:]), cells)
        if backward:
            torch.autograd.grad(output, inputs, output_gradient)

    return run


def co_attention_job(cells, num_queries, backward, reference=False):
    name = "co_attention forward" + (" and backward" if backward else "")
    arguments = dict(cells=cells, num_queries=num_queries, backward=backward, reference=reference)
    size = f"2 x {num_queries} queries, {cells[0]} x {cells[1]} cells"
    return Job(name + (REFERENCE if reference else ""), size, build_co_attention, arguments)


def co_attention_jobs(options):
    for backward, reference in itertools.product((False, True), repeat=2):
        yield co_attention_job(options.cells, options.num_queries, backward, reference)


def co_attention_scaling_jobs(options):
    """A quarter of the cells to 16 times as many, and a third of the queries to 3 times."""
    (height, width), queries = options.cells, options.num_queries
    sizes = [((height * n // 2, width * n // 2), queries) for n in (1, 2, 4, 8)]
    sizes += [((height, width), queries * n // 3) for n in (1, 9)]
    for backward, (cells, num_queries) in itertools.product((False, True), sizes):
        yield co_attention_job(cells, num_queries, backward)


# ---- Parts of the models


def random_predictions(options, num_images=16, num_objects=20):
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


def build_matcher(options):
    matcher, predictions = HungarianMatcher(), random_predictions(options)
    return lambda: matcher(*predictions)


def build_criterion(options):
    criterion = SetCriterion(HungarianMatcher())
    logits, boxes, targets = random_predictions(options)
    inputs = [logits.requires_grad_(), boxes.requires_grad_()]
    if options.compile:
        criterion.compile()

    def run():
        losses = criterion(*inputs, targets)
        torch.autograd.grad(sum(losses.values()), inputs)

    return run


def build_encoder(options, config, size):
    model = build_model(options, load_config(config, options.overrides)).eval()
    encoder = model.encoder
    with torch.no_grad():
        scales = model.scales(model.preprocess(random_images(1, size)))
    if options.compile:
        encoder.compile()
    return without_gradients(options, lambda: encoder(scales))


# ---- Whole models


def build_model(options, cfg):
    model = instantiate(cfg.model)
    # Random weights between norms that do nothing would double the features in each block, and
    # logits that no trained model has would take another path through the attention.
    for module in model.backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.weight.fill_(0.5)
    return model.to(options.device)


def random_images(count, size):
    return [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for _ in range(count)]


def random_batch(count, size, num_classes, num_objects=10):
    """Images with 10 boxes each."""
    batch = random_images(count, size)
    for image in batch:
        corners = torch.rand(num_objects, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
        classes = torch.randint(num_classes, (num_objects,))
        image["instances"] = Instances(size, gt_boxes=Boxes(corners.flatten(1)), gt_classes=classes)
    return batch


def build_inference(options, config, size):
    model = build_model(options, load_config(config, options.overrides)).eval()
    images = random_images(1, size)
    if options.compile:
        model.compile()
    return without_gradients(options, lambda: model(images))


def build_train_step(options, config, size):
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
        model.compile()
    return trainer.run_step


def without_gradients(options, function):
    def run():
        with torch.no_grad(), autocast(options):
            function()

    return run


def autocast(options):
    dtype = AMP_DTYPES.get(options.dtype)
    return torch.autocast(options.device, dtype=dtype, enabled=dtype is not None)


def multiply_adds(options, config, size):
    return analyze(load_config(config, options.overrides), *size)[2]


def model_jobs(options, name, build, sizes, batch_size=1, cost=None):
    for config, size in itertools.product(options.config, sizes):
        text = f"{batch_size} x {size[0]} x {size[1]}"
        yield Job(name, text, build, dict(config=config, size=size), config, cost)


MEASUREMENTS = {
    "co_attention": co_attention_jobs,
    "co_attention_scaling": co_attention_scaling_jobs,
    "encoder": lambda o: model_jobs(o, "encoder", build_encoder, o.image_size[:1]),
    "matcher": lambda o: [Job("matcher", "16 images", build_matcher)],
    "criterion": lambda o: [Job("criterion, matcher and backward", "16 images", build_criterion)],
    "inference": lambda o: model_jobs(
        o, "inference", build_inference, o.image_size, cost=multiply_adds
    ),
    "train_step": lambda o: model_jobs(
        o, "train_step", build_train_step, [o.train_size], o.batch_size
    ),
}


# ---- Measuring


class PeakMemory:
    """Peak memory in bytes from here on, and how much of it came on top."""

    def __init__(self, device):
        self.on_gpu = device == "cuda"
        gc.collect()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return
        with contextlib.suppress(OSError, AttributeError):  # where it is not Linux with glibc
            ctypes.CDLL(None).malloc_trim(0)
            # Forgets the peak. Where it can't be done, the peak includes building the model.
            Path("/proc/self/clear_refs").write_text("5")
        self.start = resident_bytes("VmRSS")

    def read(self):
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes("VmHWM")
        return {"peak_bytes": peak, "extra_bytes": max(0, peak - self.start)}


def resident_bytes(key):
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def call_times(function, options, repeats):
    """Seconds of each call, after the warm-up."""
    times = []
    for _ in range(options.warmup + repeats):
        start = time.perf_counter()
        function()
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[options.warmup :]


def matmul_gflops(options):
    """The rate of a matrix product in the measurement's type, large enough to take 50 ms."""
    factory = dict(device=options.device, dtype=AMP_DTYPES.get(options.dtype, torch.float32))
    size, seconds = 128, 0
    while seconds < 0.05 and size < 8192:
        size *= 2
        left, right = (torch.randn(size, size, **factory) for _ in range(2))
        seconds = statistics.median(call_times(lambda: left @ right, options, repeats=5))
    return 2 * size**3 / seconds / 1e9


def measure(job, options, cost=None):
    """The record of a job; runs in the job's own process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record = {
        "name": job.name,
        "config": job.config and Path(job.config).stem,
        "size": job.size,
        "overrides": options.overrides,
        "dtype": options.dtype,
        "compiled": options.compile,
        "device": device_name(options.device),
        "threads": options.threads,
        "torch": torch.__version__,
    }
    run = job.build(options, **job.arguments)
    rate = matmul_gflops(options) if cost else None
    memory = PeakMemory(options.device)
    times = call_times(run, options, options.repeats)
    record.update(memory.read(), median_s=statistics.median(times), times_s=times)
    if cost:
        gflops = 2 * cost / record["median_s"] / 1e9
        record.update(gflops=gflops, matmul_gflops=rate, share=gflops / rate)
    if options.profile:
        print_profile(run, options)
    return record


def device_name(device):
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


def print_profile(function, options):
    with torch.profiler.profile() as profile:
        function()
    order = "self_cuda_time_total" if options.device == "cuda" else "self_cpu_time_total"
    print(profile.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=50))


def in_fresh_process(function, *args, **kwargs):
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        try:
            return executor.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise UserError(
                "The process that measures was killed, most likely for lack of memory: choose a "
                "smaller size or batch."
            ) from None


def run_job(job, options):
    cost = None
    if job.cost is not None:
        cost = in_fresh_process(job.cost, options, **job.arguments)
    return in_fresh_process(measure, job, options, cost)


# ---- Reporting


def key(record):
    return record["name"], record["config"], record["size"]


def print_table(headers, rows):
    print(tabulate(rows, headers, tablefmt="github", missingval="-", disable_numparse=True))


def print_records(records):
    headers = ["measurement", "config", "size", "ms", "extra MiB", "peak MiB", "GFLOP/s", "share"]
    rows = []
    for record in records:
        memory = [f"{record[name] / 2**20:.0f}" for name in ("extra_bytes", "peak_bytes")]
        speed = [f"{record['gflops']:.0f}", f"{record['share']:.0%}"] if "gflops" in record else []
        rows.append([*key(record), f"{record['median_s'] * 1e3:.1f}", *memory, *speed])
    print_table(headers, rows)


def print_ratios(pairs):
    """Of pairs of records, the first over the second."""
    headers = ["measurement", "config", "size", "A (ms)", "B (ms)"]
    headers += ["time A / B", "extra memory A / B", "peak memory A / B"]
    rows = []
    for a, b in pairs:
        times = [f"{record['median_s'] * 1e3:.1f}" for record in (a, b)]
        rows.append([*key(b), *times])
        for name in ("median_s", "extra_bytes", "peak_bytes"):
            rows[-1].append(f"{a[name] / b[name]:.2f}" if b[name] else None)
    print_table(headers, rows)


def print_gain_over_reference(records):
    found = {key(record): record for record in records}
    pairs = [
        (found[name + REFERENCE, *rest], record)
        for (name, *rest), record in found.items()
        if (name + REFERENCE, *rest) in found
    ]
    if pairs:
        print("\nThe slow reference (A) over ours (B)")
        print_ratios(pairs)


def read_records(path):
    names = ("name", "config", "size", "median_s", "extra_bytes", "peak_bytes")
    try:
        records = json.loads(Path(path).read_text())["records"]
        return {key(record): {name: record[name] for name in names} for record in records}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file that --output of this tool wrote.") from error


def compare(path_a, path_b):
    a, b = read_records(path_a), read_records(path_b)
    common = [name for name in a if name in b]
    if not common:
        raise UserError(f"{path_a} and {path_b} have no measurement in common.")
    print(f"A: {path_a}\nB: {path_b}")
    print_ratios([(a[name], b[name]) for name in common])


def write_records(path, records):
    header = {"command": shlex.join(sys.argv), "date": time.strftime("%Y-%m-%d %H:%M")}
    Path(path).write_text(json.dumps({**header, "records": records}, indent=2) + "\n")


# ---- Command line


def get_parser():
    parser = argparse.ArgumentParser(
        description=__doc__.format(measurements=", ".join(MEASUREMENTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="*", help="measurements, all if none is named; then overrides, key=value")
    add("--config", action="append", metavar="FILE", help="of a model, can be repeated")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", *AMP_DTYPES), help="autocast's")
    add("--compile", action="store_true", help="torch.compile what is measured")
    add("--threads", type=int, default=torch.get_num_threads(), help="of the CPU")
    add("--warmup", type=int, default=2, help="calls before those that count")
    add("--repeats", type=int, default=5)
    add("--cells", type=int, nargs=2, default=(50, 84), metavar=("H", "W"), help="co-attention's")
    add("--num-queries", type=int, default=300, help="co-attention's")
    add("--image-size", type=int, nargs=2, action="append", metavar=("H", "W"), help="inference's")
    add("--train-size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"))
    add("--batch-size", type=int, default=2, help="of the training step")
    add("--profile", action="store_true", help="print the operators of each measurement")
    add("--output", metavar="FILE", help="write the measurements as JSON")
    add("--compare", nargs=2, metavar=("A", "B"), help="only print the ratios of two such files")
    return parser


def parse_options(argv=None):
    options = get_parser().parse_intermixed_args(argv)
    options.overrides = [word for word in options.what if "=" in word]
    options.what = [word for word in options.what if "=" not in word] or list(MEASUREMENTS)
    options.config = options.config or [str(CONFIGS / f"{name}.py") for name in MAIN_MODELS]
    options.image_size = [tuple(s) for s in options.image_size or [(800, 1066), (800, 1333)]]
    options.cells, options.train_size = tuple(options.cells), tuple(options.train_size)
    unknown = [name for name in options.what if name not in MEASUREMENTS]
    if unknown:
        raise UserError(f"No measurement {unknown[0]}: choose among {', '.join(MEASUREMENTS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("No GPU can be used here: take --device cpu.")
    for config in options.config:
        load_config(config, options.overrides)
    return options


def main(argv=None):
    options = parse_options(argv)
    if options.compare:
        return compare(*options.compare)
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")  # of imports, in each process
    records = []
    for job in itertools.chain.from_iterable(MEASUREMENTS[name](options) for name in options.what):
        print(f"{job.name} {Path(job.config or '').stem} {job.size}", flush=True)
        records.append(run_job(job, options))
        if options.output:  # after each, so that a long run that is stopped leaves its results
            write_records(options.output, records)
    print_records(records)
    print_gain_over_reference(records)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"Error: {error}")
