"""What the benchmarks share: time and peak memory of a function, a process of its own for each
measurement, random images, and tables."""

import argparse
import contextlib
import ctypes
import gc
import platform
import resource
import shlex
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Callable, ContextManager, Dict, List, NamedTuple, Sequence, Tuple

from smca.config import AMP_DTYPES
from smca.errors import UserError, at_least

import torch
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import nn
from torch.utils.benchmark import Timer

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
MAIN_MODELS = [
    "smca_single_scale_r50_50ep",
    "smca_r50_50ep",
    "smca_conv_r50_50ep",
    "detr_r50_50ep",
]
DTYPES = ["float32", *AMP_DTYPES]

Options = argparse.Namespace
Run = Callable[[], Any]  # what is measured
Size = Tuple[int, int]  # (height, width)


class Measurement(NamedTuple):
    """
    Attributes:
        seconds: the median of the calls.
        peak_bytes: the peak memory of the process. On a GPU it is what PyTorch allocated.
        extra_bytes: the peak over what the process held before the first call.
    """

    seconds: float
    peak_bytes: int
    extra_bytes: int


def measure(run: Run, options: Options) -> Measurement:
    """Measure time and peak memory of a function, after one call that warms up.

    Args:
        run: the function.
        options: those of :func:`add_options`.
    """
    on_gpu = options.device == "cuda"
    gc.collect()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        forget_peak()
        before = resident_bytes("VmRSS")
    run()
    timer = Timer("run()", globals={"run": run}, num_threads=options.threads)
    seconds = timer.blocked_autorange(min_run_time=options.seconds).median
    peak = torch.cuda.max_memory_allocated() if on_gpu else resident_bytes("VmHWM")
    return Measurement(seconds, peak, max(0, peak - before))


def forget_peak() -> None:
    """Let Linux count the peak of the resident memory from here on. Elsewhere the peak includes
    building the model."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes(key: str) -> int:
    """Linux's VmRSS (now) or VmHWM (peak) of this process, elsewhere the peak."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def in_fresh_process(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a process of its own and give what it returns.

    Raises:
        UserError: the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        try:
            return executor.submit(function, *args).result()
        except BrokenProcessPool:
            raise UserError(
                "The process that measures was killed, most likely for lack of memory: choose a "
                "smaller size or batch."
            ) from None


# ---- Models and images


def tame(model: nn.Module) -> nn.Module:
    """Let the frozen norms of a model with random weights halve what they get. Norms that do
    nothing would double the features in each block."""
    for module in model.modules():
        if "FrozenBatchNorm" in type(module).__name__:
            module.weight.fill_(0.5)  # type: ignore[operator,union-attr]
    return model


def random_images(count: int, size: Size) -> List[Dict[str, Any]]:
    """Images of noise in Detectron2's format."""
    return [{"image": torch.randint(256, (3, *size), dtype=torch.uint8)} for _ in range(count)]


def random_batch(count: int, size: Size, num_classes: int = 80) -> List[Dict[str, Any]]:
    """Images of noise with ten boxes each."""
    batch = random_images(count, size)
    for image in batch:
        corners = torch.rand(10, 2, 2).sort(dim=1).values * torch.tensor(size[::-1])
        classes = torch.randint(num_classes, (10,))
        image["instances"] = Instances(size, gt_boxes=Boxes(corners.flatten(1)), gt_classes=classes)
    return batch


def autocast(options: Options) -> ContextManager[None]:
    """The context of --dtype."""
    dtype = AMP_DTYPES.get(options.dtype)
    return torch.autocast(options.device, dtype=dtype, enabled=dtype is not None)


def without_gradients(options: Options, function: Run) -> Run:
    """The function without gradients, in the type of --dtype."""

    def run() -> None:
        with torch.no_grad(), autocast(options):
            function()

    return run


# ---- Command lines


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of all benchmarks."""
    threads = "threads of the CPU; default: %(default)s"
    parser.add_argument(
        "--threads", type=at_least(1), default=torch.get_num_threads(), help=threads
    )
    seconds = "how long to call each function for at least; default: %(default)s"
    parser.add_argument("--seconds", type=float, default=10.0, help=seconds)
    parser.add_argument("--format", choices=("text", "markdown"), default="text", help="of tables")


def print_table(headers: Sequence[str], rows: Sequence[Sequence[str]], options: Options) -> None:
    """Print a table in the format of --format, with the command, the machine and the date."""
    tablefmt = "github" if options.format == "markdown" else "simple"
    print(f"\n{provenance(options)}\n")
    print(tabulate(rows, headers, tablefmt=tablefmt, disable_numparse=True))


def provenance(options: Options) -> str:
    """The command, the machine and the date of a table, in one line."""
    command = shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    machine = f"{device_name(options.device)}, {options.threads} threads"
    return f"`{command}`, {machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"


def device_name(device: str) -> str:
    """The model of the GPU or CPU."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
