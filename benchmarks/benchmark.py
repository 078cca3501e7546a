#!/usr/bin/env python3
"""Time and peak memory of the models and their parts.

    python benchmarks/benchmark.py --output ours.json       # everything, the main models
    python benchmarks/benchmark.py co_attention co_attention_scaling
    python benchmarks/benchmark.py inference train_step --config configs/smca_conv_r50_50ep.py
    python benchmarks/benchmark.py inference --device cuda --dtype bf16 --compile
    python benchmarks/benchmark.py train_step model.dropout=0 model.num_queries=100
    python benchmarks/benchmark.py inference --config configs/detr_r50_50ep.py --profile
    python benchmarks/benchmark.py --compare before.json after.json      # ratios, before over after

Measurements: {measurements}.

Each runs in a process of its own: warm-up, then the median of the repeats. "extra memory" is the
peak over what the process held before the first call, with the model built; on the CPU it is
resident memory, on a GPU what PyTorch allocated. Models have random weights and images.

GFLOP/s count a multiply-add as two. The share is of the rate of a large matrix product of the same
type, measured by the same process just before. (On a GPU, PyTorch's defaults let float32
convolutions, but not matrix products, use TF32.) With --profile the table also says which part of
the time each group of operators took.
"""

import argparse
import contextlib
import cProfile
import ctypes
import functools
import gc
import itertools
import json
import platform
import pstats
import re
import resource
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from smca.config import AMP_DTYPES, load_config
from smca.errors import UserError, at_least, exit_code

import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmark_cases import MEASUREMENTS, REFERENCE, Job, Options
from figures import command_line, write_figures

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN_MODELS = [
    "smca_single_scale_r50_50ep",
    "smca_r50_50ep",
    "smca_conv_r50_50ep",
    "detr_r50_50ep",
]


Record = Dict[str, Any]  # of a measurement, as written by --output


# ---- Measuring


class PeakMemory:
    """Peak memory in bytes from here on, and how much of it came on top.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str):
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

    def read(self) -> Dict[str, int]:
        """``peak_bytes`` and ``extra_bytes``."""
        peak = torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes("VmHWM")
        return {"peak_bytes": peak, "extra_bytes": max(0, peak - self.start)}


def resident_bytes(key: str) -> int:
    """Linux's VmRSS (now) or VmHWM (peak) of this process; elsewhere the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def call_times(function: Callable[[], Any], options: Options, repeats: int) -> List[float]:
    """Seconds of each call, after the warm-up."""
    times = []
    for _ in range(options.warmup + repeats):
        start = time.perf_counter()
        function()
        if options.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[options.warmup :]


def matmul_gflops(options: Options) -> float:
    """The rate of a matrix product in the measurement's type, large enough to take 50 ms."""
    dtype = AMP_DTYPES.get(options.dtype, torch.float32)
    size, seconds = 128, 0.0
    while seconds < 0.05 and size < 8192:
        size *= 2
        left, right = (
            torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2)
        )
        seconds = statistics.median(
            call_times(functools.partial(torch.matmul, left, right), options, repeats=5)
        )
    return 2 * size**3 / seconds / 1e9


def measure(job: Job, options: Options, cost: Optional[int] = None) -> Record:
    """The record of a job; runs in the job's own process.

    Args:
        job: builds the function to measure.
        options: of the command line.
        cost: multiply-adds of a call; None: no speed is reported.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    record: Record = {
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
    rate = matmul_gflops(options) if cost else 0.0
    memory = PeakMemory(options.device)
    times = call_times(run, options, options.repeats)
    record.update(memory.read(), median_s=statistics.median(times), times_s=times)
    if cost:
        gflops = 2 * cost / record["median_s"] / 1e9
        record.update(gflops=gflops, matmul_gflops=rate, share=gflops / rate)
    if options.profile:
        record["profile"] = profile_of(run, options)
        if job.name == "train_mapper":
            print_python_profile(run)
    return record


def device_name(device: str) -> str:
    """The model of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()


# Of operators by their names; the first group that fits.
GROUPS = {
    "convolution": "conv",
    "attention": "scaled_dot_product|flash|attend",
    "optimizer": "Optimizer|adam|foreach",
    "matrix products": r"mm$|mm_|linear|matmul|bmm|dot",
    "norms": "norm",
    "dropout": "dropout|bernoulli|random|uniform",
    "softmax": "softmax",
    "pooling, resizing": "pool|upsample|interpolate",
    "copies": "copy|cat$|clone|contiguous|index|gather|scatter|fill|zero|pad|stack",
    "sums, ReLU and the like": "add|sub|mul|div|relu|threshold|sigmoid|exp|log|clamp|sum|pow|where",
}
REST = "the rest"


def group_of(operator: str) -> str:
    """The group of `GROUPS` that an operator's name is in."""
    for group, pattern in GROUPS.items():
        if re.search(pattern, operator):
            return group
    return REST


def profile_of(function: Callable[[], Any], options: Options) -> Dict[str, float]:
    """The share of each group of operators in the time of a call; prints PyTorch's table, too."""
    with torch.profiler.profile() as profile:
        function()
    on_gpu = options.device == "cuda"
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    averages = profile.key_averages()
    print(averages.table(sort_by=order, row_limit=25, max_name_column_width=50))
    times = dict.fromkeys([*GROUPS, REST], 0.0)
    for operator in averages:
        used = operator.self_device_time_total if on_gpu else operator.self_cpu_time_total
        times[group_of(operator.key)] += used
    total = sum(times.values())
    return {group: used / total for group, used in times.items()}


def print_python_profile(function: Callable[[], Any]) -> None:
    """Of what PyTorch's profiler does not see, such as decoding images."""
    profile = cProfile.Profile()
    profile.runcall(function)
    pstats.Stats(profile).sort_stats("tottime").print_stats(12)


def in_fresh_process(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `function` gives in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        try:
            return executor.submit(function, *args, **kwargs).result()
        except BrokenProcessPool:
            raise UserError(
                "The process that measures was killed, most likely for lack of memory: choose a "
                "smaller size or batch."
            ) from None


def run_job(job: Job, options: Options) -> Record:
    """The record of a job, measured in a process of its own."""
    cost = None
    if job.cost is not None:
        cost = in_fresh_process(job.cost, options, **job.arguments)
    return in_fresh_process(measure, job, options, cost)


# ---- Reporting


def key(record: Record) -> Tuple[str, Optional[str], str]:
    """What says which measurement it is."""
    return record["name"], record["config"], record["size"]


def print_table(headers: List[str], rows: List[List[Optional[str]]]) -> None:
    """Print a Markdown table, None as a dash."""
    print(tabulate(rows, headers, tablefmt="github", missingval="-", disable_numparse=True))


def table_of(records: Sequence[Record]) -> Tuple[List[str], List[List[Optional[str]]]]:
    """Columns and rows of all measurements. Where a slow reference was measured too, its time and
    memory over those here."""
    columns = ["measurement", "config", "size", "s", "extra MiB", "peak MiB", "GFLOP/s", "share"]
    columns += ["time, reference / here", "memory, reference / here"]
    groups = [g for g in [*GROUPS, REST] if any(g in r.get("profile", {}) for r in records)]
    found = {key(record): record for record in records}
    rows = []
    for record in records:
        row: List[Optional[str]] = [*key(record), f"{record['median_s']:.3g}"]
        row += [f"{record[name] / 2**20:.0f}" for name in ("extra_bytes", "peak_bytes")]
        has_speed = "gflops" in record
        row.append(f"{record['gflops']:.0f}" if has_speed else None)
        row.append(f"{record['share']:.0%}" if has_speed else None)
        name, config, size = key(record)
        reference = found.get((name + REFERENCE, config, size), {})
        row += [ratio(reference, record, quantity) for quantity in ("median_s", "extra_bytes")]
        profile = record.get("profile")
        row += [f"{profile[group]:.0%}" if profile else None for group in groups]
        rows.append(row)
    return columns + groups, rows


def ratio(a: Record, b: Record, name: str) -> Optional[str]:
    """a's number over b's; None if a has none or b's is 0."""
    return f"{a[name] / b[name]:.2f}" if a and b[name] else None


def print_ratios(pairs: Sequence[Tuple[Record, Record]]) -> None:
    """Of pairs of records, the first over the second."""
    headers = ["measurement", "config", "size", "A (ms)", "B (ms)"]
    headers += ["time A / B", "extra memory A / B", "peak memory A / B"]
    rows = []
    for a, b in pairs:
        times = [f"{record['median_s'] * 1e3:.1f}" for record in (a, b)]
        rows.append([*key(b), *times])
        rows[-1] += [ratio(a, b, name) for name in ("median_s", "extra_bytes", "peak_bytes")]
    print_table(headers, rows)


def read_records(path: str) -> Dict[Tuple[str, Optional[str], str], Record]:
    """The records of a file by their `key`, with what `print_ratios` needs."""
    names = ("name", "config", "size", "median_s", "extra_bytes", "peak_bytes")
    try:
        records = json.loads(Path(path).read_text())["records"]
        return {key(record): {name: record[name] for name in names} for record in records}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a file that --output of this tool wrote.") from error


def compare(path_a: str, path_b: str) -> None:
    """Print the ratios of what two files have in common."""
    a, b = read_records(path_a), read_records(path_b)
    common = [name for name in a if name in b]
    if not common:
        raise UserError(f"{path_a} and {path_b} have no measurement in common.")
    print(f"A: {path_a}\nB: {path_b}")
    print_ratios([(a[name], b[name]) for name in common])


def write_records(path: str, records: List[Record]) -> None:
    """The records and their table as JSON, with the command and the date."""
    command = command_line(__file__, sys.argv[1:])
    where = f"{records[0]['device']}, {records[0]['threads']} threads, torch {torch.__version__}"
    write_figures(path, command, *table_of(records), machine=where, records=records)


# ---- Command line


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(measurements=", ".join(MEASUREMENTS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("what", nargs="*", help="measurements, all if none is named; then overrides, key=value")
    add("--config", action="append", metavar="FILE", help="of a model, can be repeated")
    add("--device", default="cpu", choices=("cpu", "cuda"))
    add("--dtype", default="float32", choices=("float32", *AMP_DTYPES), help="autocast's")
    add("--compile", action="store_true", help="torch.compile what is measured")
    add("--threads", type=at_least(1), default=torch.get_num_threads(), help="of the CPU")
    add("--warmup", type=int, default=2, help="calls before those that count")
    add("--repeats", type=at_least(1), default=5)
    add("--cells", type=int, nargs=2, default=(50, 84), metavar=("H", "W"), help="co-attention's")
    add("--num-queries", type=int, default=300, help="co-attention's")
    sizes = {"--image-size": "inference's and the encoder's", "--train-size": "the training step's"}
    for name, whose in sizes.items():
        words = f"{whose}, can be repeated"
        add(name, type=int, nargs=2, action="append", metavar=("H", "W"), help=words)
    add("--batch-size", type=at_least(1), default=2, help="of the training step")
    add("--profile", action="store_true", help="print the operators of each measurement")
    add("--output", metavar="FILE", help="write the measurements as JSON")
    add("--compare", nargs=2, metavar=("A", "B"), help="only print the ratios of two such files")
    return parser


def parse_options(argv: Optional[Sequence[str]] = None) -> Options:
    """The command line, checked and completed."""
    options = get_parser().parse_intermixed_args(argv)
    options.overrides = [word for word in options.what if "=" in word]
    options.what = [word for word in options.what if "=" not in word] or list(MEASUREMENTS)
    options.config = options.config or [str(CONFIGS / f"{name}.py") for name in MAIN_MODELS]
    options.image_size = [tuple(s) for s in options.image_size or [(800, 1066), (800, 1333)]]
    options.train_size = [tuple(s) for s in options.train_size or [(512, 672)]]
    options.cells = tuple(options.cells)
    unknown = [name for name in options.what if name not in MEASUREMENTS]
    if unknown:
        raise UserError(f"No measurement {unknown[0]}: choose among {', '.join(MEASUREMENTS)}.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("No GPU can be used here: take --device cpu.")
    for config in options.config:
        load_config(config, options.overrides)
    return options


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    options = parse_options(argv)
    if options.compare:
        compare(*options.compare)
        return
    records: List[Record] = []
    jobs = list(itertools.chain.from_iterable(MEASUREMENTS[n](options) for n in options.what))
    for job in tqdm(jobs, unit="measurement", disable=None):
        with tqdm.external_write_mode():
            print(f"{job.name} {Path(job.config or '').stem} {job.size}", flush=True)
        records.append(run_job(job, options))
        if options.output:  # after each, so that a long run that is stopped leaves its results
            write_records(options.output, records)
    print_table(*table_of(records))


if __name__ == "__main__":
    sys.exit(exit_code(main))
