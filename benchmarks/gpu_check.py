#!/usr/bin/env python3
"""What only a GPU can show, as a report.

    python benchmarks/gpu_check.py --output gpu_report
    python benchmarks/gpu_check.py --device cpu --quick   # the same in miniature, to test this tool

Checks whether the GPU computes what the CPU does, waits, plans anew for each image size, and runs
all that trains and exports, on the main models with random weights and images. DIR/report.md is
written anew after each check.

Exit code: 0 if every check passed, 1 if one failed, 2 if there is no GPU, 3 if the time was over.
"""

import argparse
import functools
import gc
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple
from unittest import mock

from smca.cli.train import main as train
from smca.config import AMP_DTYPES, load_config
from smca.errors import at_least, command_line, exit_code, writing
from smca.inference import Predictor
from smca.inference.export import export_detector
from smca.modeling import kernels

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, multiprocessing, nn
from torch.export.passes import move_to_device_pass
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmark import build_model
from measuring import CONFIGS, MAIN_MODELS, Options, provenance, random_batch

# Relative differences of losses and of a part's gradient that rounding may make.
TOLERANCES = {"float32": (1e-4, 1e-2), "bf16": (5e-2, 0.5), "fp16": (2e-2, 0.2)}

# Overrides of --quick: the same models with few and narrow layers.
_TINY = ["model.embed_dim=16", "model.num_queries=6", "model.encoder.ffn_dim=16"]
_TINY += ["model.decoder.num_layers=2", "model.decoder.ffn_dim=16", "model.decoder.num_heads=2"]
_TINY += [f"+model.backbone.{x}" for x in ("depth=18", "num_blocks=[1,1,1,1]", "width=16")]

Result = Tuple[Optional[bool], str]  # whether a check passed (None: it did not run), and figures
Step = Dict[str, Tensor]  # the losses, and the gradient of each part, as vectors


# Here and in the processes that this one starts, a GPU does not round products to TF32.
torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


# ---- Models and steps


def make_model(config: str, options: Options, device: str, *overrides: str) -> Any:
    """The config's model without dropout and with random weights, the same on each device."""
    torch.manual_seed(0)
    encoder = ["model.encoder.pattern=I", "model.encoder.num_heads=2"]
    encoder = ["model.encoder.num_layers=1"] if "conv" in config else encoder
    quick = [*_TINY, *encoder] if options.quick else []
    overrides = ("model.dropout=0", *quick, *overrides)
    cfg = load_config(str(CONFIGS / f"{config}.py"), overrides)
    return build_model(argparse.Namespace(device=device), cfg)


def make_batch(options: Options, is_padded: bool = True) -> List[Dict[str, Any]]:
    """Two images, of different sizes if they are to be padded."""
    torch.manual_seed(1)
    height, width = options.size
    sizes = [(height, width)] * 2
    if is_padded:
        sizes = [(height, width * 3 // 4), (height * 3 // 4, width)]
    return [item for size in sizes for item in random_batch(1, size)]


def take_step(
    model: nn.Module, batch: List[Dict[str, Any]], dtype: str = "float32", seed: int = 2
) -> Step:
    """Compute losses and gradient, with the dropout of a seed. In float16 the loss is scaled, by
    less until the gradient is finite, as training finds its scale."""
    device = next(model.parameters()).device.type
    amp_dtype = AMP_DTYPES.get(dtype)
    for scale in [2.0**power for power in range(10, -15, -4)] if dtype == "fp16" else [1.0]:
        model.train().zero_grad()
        torch.manual_seed(seed)
        with torch.autocast(device, amp_dtype, enabled=amp_dtype is not None):
            losses = torch.stack(list(model(batch).values()))
        (scale * losses.sum()).backward()
        parts: Dict[str, List[Tensor]] = {}
        for name, parameter in model.named_parameters():
            part = name.removeprefix("module.").split(".")[0]
            if "modulation" in name:  # weight maps have small gradients
                part = "weight maps"
            if parameter.grad is not None:
                parts.setdefault(part, []).append(parameter.grad.flatten().cpu())
        step = {name: torch.cat(part).float() / scale for name, part in parts.items()}
        if all(gradient.isfinite().all() for gradient in step.values()):
            break
    return {"losses": losses.detach().float().cpu(), **step}


def compare(found: Step, expected: Step, dtype: str = "float32", name: str = "") -> Result:
    """Whether two steps are the same but for rounding, and how far apart they are: the relative
    difference of the losses, and the greatest of the parts' gradients. Infinity stands for nan."""
    loss, *gradients = (
        ((found[part] - value).norm() / value.norm()).nan_to_num(torch.inf, torch.inf)
        for part, value in expected.items()
    )
    gradient, (most_loss, most_gradient) = torch.stack(gradients).max(), TOLERANCES[dtype]
    text = f"{name or dtype}: losses {loss:.1e} (at most {most_loss:g}), gradient {gradient:.1e} "
    passed = bool(loss <= most_loss and gradient <= most_gradient)
    return passed, f"{text}(at most {most_gradient:g})"


def joined(results: Sequence[Result]) -> Result:
    """Several results as one."""
    return all(passed for passed, _ in results), "; ".join(text for _, text in results)


# ---- Checks of a model


def check_equality(config: str, options: Options) -> Result:
    """The device's step is the CPU's, also with weight maps as channels, which a GPU takes for
    large maps, and with maps that have no channels and then are computed in chunks."""
    batch, devices, results = make_batch(options), (options.device, "cpu"), []
    for name in ["", *(["independent", "covariance"] if not config.startswith("detr") else [])]:
        overrides = [f"model.decoder.modulation.map={name}"] if name else []
        with mock.patch.object(kernels, "_MAX_ADDED", 0 if name else kernels._MAX_ADDED):
            steps = [take_step(make_model(config, options, d, *overrides), batch) for d in devices]
        results.append(compare(steps[0], steps[1], name=name))
    return joined(results)


def check_amp(config: str, options: Options) -> Result:
    """The steps of mixed precision are near that of float32. Tells the kernels of attention."""
    batch, model = make_batch(options), make_model(config, options, options.device)
    expected, results = take_step(model, batch), []
    for dtype in AMP_DTYPES:
        with profile(activities=[ProfilerActivity.CPU]) as calls:
            step = take_step(model, batch, dtype)
        names = {event.key.removeprefix("aten::") for event in calls.key_averages()}
        kernel = ", ".join(n for n in sorted(names) if n.startswith("_scaled_dot_product"))
        passed, text = compare(step, expected, dtype)
        results.append((passed, f"{text}, {kernel}"))
    return joined(results)


def check_waits(config: str, options: Options) -> Result:
    """No forward pass waits for the GPU. (In training, the matcher does after it.)"""
    batch, model = make_batch(options), make_model(config, options, options.device)
    watch = torch.cuda.set_sync_debug_mode if options.device == "cuda" else str
    for mode in ("default", "error"):  # the first call makes what is kept
        watch(mode)
        with torch.autocast(options.device, torch.bfloat16):
            model.train().forward_head(model.forward_features(model.preprocess(batch)))
            model.eval()(batch)
    return True, "no wait"


def check_sizes(config: str, options: Options) -> Result:
    """The first image of each of 20 sizes takes little longer than the second: nothing is planned
    anew."""
    model, times = make_model(config, options, options.device).eval(), []
    for index in range(2 * 20):
        images = random_batch(1, (options.size[0] + 8 * (index // 2), options.size[1]))
        start = time.perf_counter()
        with torch.no_grad(), torch.autocast(options.device, torch.bfloat16):
            model(images)[0]["instances"].scores.cpu()
        times.append(time.perf_counter() - start)
    first, second = (statistics.median(times[start::2]) for start in (2, 3))
    return first < 10 * second, f"medians of all sizes: {first:.3f} s, then {second:.3f} s"


def check_checkpointing(config: str, options: Options) -> Result:
    """Layers that are computed again draw the same dropout, in half types too."""
    batch, results = make_batch(options), []
    model = make_model(config, options, options.device, "model.dropout=0.1")
    for dtype in TOLERANCES:
        steps = []
        for model.encoder.checkpointing in (True, False):
            steps.append(take_step(model, batch, dtype))
        results.append(compare(steps[0], steps[1], dtype))
    return joined(results)


def check_processes(
    config: str, options: Options, count: int = 2, is_compiled: bool = False
) -> Result:
    """Processes with a share of the batch each have the gradient of one process with all of it."""
    if options.device == "cuda" and torch.cuda.device_count() < count:
        return None, "not run: there is one GPU"
    with tempfile.TemporaryDirectory() as folder:
        arguments = (folder, config, options, count, is_compiled)
        multiprocessing.spawn(share_a_step, arguments, count, daemon=True)  # type: ignore[no-untyped-call]
        shares = [torch.load(f"{folder}/{rank}") for rank in range(count)]
    # Without padding: the convolutions see it, and an image alone has none.
    batch = make_batch(options, is_padded=False)
    expected = take_step(make_model(config, options, options.device), batch)
    losses = torch.stack([share["losses"] for share in shares]).mean(dim=0)
    return joined([compare({**share, "losses": losses}, expected) for share in shares])


def share_a_step(
    rank: int, folder: str, config: str, options: Options, count: int, is_compiled: bool
) -> None:
    """A step on a share of the batch, in one of several processes."""
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    backend, store = "nccl" if on_gpu else "gloo", f"file://{folder}/store"
    dist.init_process_group(backend, store, world_size=count, rank=rank)
    model = make_model(config, options, options.device)
    if is_compiled:
        model.compile_parts(**({"backend": "eager"} if options.quick else {}))
    parallel = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    step = take_step(parallel, make_batch(options, is_padded=False)[rank::count])
    torch.save(step, f"{folder}/{rank}")
    dist.destroy_process_group()


def check_export(config: str, options: Options) -> Result:
    """A .pt2 file that is moved to the device has the model's scores."""
    model, batch = make_model(config, options, "cpu").eval(), make_batch(options, is_padded=False)
    with tempfile.TemporaryDirectory() as folder:
        export_detector(Predictor.from_model(model), f"{folder}/model.pt2", "pt2")
        program = torch.export.load(f"{folder}/model.pt2")
    graph = move_to_device_pass(program, options.device).module()
    images = torch.stack([item["image"].float() for item in batch]).to(options.device)
    sizes = torch.tensor([options.size] * len(batch)).to(options.device)
    with torch.no_grad():
        _, scores, _ = graph(images, sizes)
        expected = [result["instances"].scores for result in model.to(options.device)(batch)]
    difference = float((scores - torch.stack(expected)).abs().max())
    return difference < 1e-4, f"scores {difference:.1e} (at most 1e-4)"


CHECKS: Dict[str, Callable[[str, Options], Result]] = {
    "equal to the CPU": check_equality,
    "mixed precision": check_amp,
    "forward passes": check_waits,
    "image sizes": check_sizes,
    "checkpointing with dropout": check_checkpointing,
    "a compiled process": functools.partial(check_processes, count=1, is_compiled=True),
    "two processes": check_processes,
    "export": check_export,
}
# Rounding decides which cells become queries, so that steps of such a model cannot be compared.
PROPOSING_MODEL = "smca_plus_r50_50ep"
ITS_CHECKS = ("forward passes", "image sizes", "checkpointing with dropout", "export")


# ---- A training, and all of it


def check_training(config: str, options: Options) -> Result:
    """A training in float16 with accumulation and averaged weights saves its state at a signal, and
    goes on from there."""
    folder = options.output / "training"
    shutil.rmtree(folder, ignore_errors=True)
    words = [f"train.device={options.device}", f"train.output_dir={folder}"]
    words += ["train.amp.enabled=True", "train.amp.dtype=fp16"]
    words += ["train.accumulate=2", "train.model_ema.enabled=True", "train.log_period=1"]

    def start(*more: str) -> Any:
        context = multiprocessing.get_context("spawn")
        command = ["--config-file", str(CONFIGS / f"{config}.py"), *more, *words]
        process = context.Process(target=train, args=(command,), daemon=True)
        process.start()
        return process

    process, metrics = start(), folder / "metrics.json"
    while process.is_alive() and not (metrics.is_file() and metrics.stat().st_size):
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGTERM)
    process.join()
    last = torch.load(folder / (folder / "last_checkpoint").read_text(), weights_only=True)
    num_iterations = last["trainer"]["iteration"] + 3
    start("--resume", f"train.max_iter={num_iterations}").join()
    final = torch.load(folder / "model_final.pth", weights_only=True)
    passed = final["trainer"]["iteration"] == num_iterations - 1
    passed = passed and bool(final["trainer"]["grad_scaler"]) and bool(final["model_ema"])
    return passed, f"{num_iterations - 2} iterations, a signal, and 2 more"


def run(options: Options) -> int:
    """Run all checks and write the report; gives the exit code."""
    options.threads = torch.get_num_threads()
    rows: List[List[str]] = []

    def add(name: str, config: str, result: Result) -> None:
        rows.append([name, config, {True: "yes", False: "NO", None: "-"}[result[0]], result[1]])
        print(*rows[-1], sep="; ", flush=True)
        table = tabulate(rows, ["check", "model", "passed", "figures"], tablefmt="github")
        text = f"# Check of a GPU\n\n{provenance(options)}\n\n{table}\n"
        (options.output / "report.md").write_text(text, encoding="utf-8")

    def attempt(name: str, config: str, check: Callable[[str, Options], Result]) -> None:
        try:
            result = check(config, options)
        except Exception as error:  # whatever a GPU brings up is a finding, lack of memory too
            result = False, f"{type(error).__name__}: {error}".splitlines()[0]
        if options.device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        add(name, config, result)
        gc.collect()
        torch.cuda.empty_cache()  # for the processes that follow

    def stop(*_: Any) -> None:
        add("all checks", "", (False, f"out of time after {options.minutes} minutes"))
        sys.exit(3)

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(60 * options.minutes)
    for config in options.models:
        for name in ITS_CHECKS if config == PROPOSING_MODEL else CHECKS:
            attempt(name, config, CHECKS[name])
    attempt("a training, stopped and resumed", "smca_plus_shapes", check_training)
    signal.alarm(0)
    return int(any(row[2] == "NO" for row in rows))


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("--output", default="output/gpu_check", type=Path, metavar="DIR")
    add("--models", nargs="+", default=[*MAIN_MODELS, PROPOSING_MODEL], help="names of configs")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--quick", action="store_true", help="tiny models and images")
    add("--minutes", type=at_least(1), default=60, help="time limit; default: %(default)s")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU can be used here, so there is nothing to check.", file=sys.stderr)
        return 2
    options.size = (72, 96) if options.quick else (800, 1066)  # several cells on all scales
    with writing(str(options.output)):
        options.output.mkdir(parents=True, exist_ok=True)
    return run(options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
