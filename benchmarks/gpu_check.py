#!/usr/bin/env python3
"""What only a GPU can show, as a report.

    python benchmarks/gpu_check.py --output gpu_report
    python benchmarks/gpu_check.py --device cpu --quick   # the same in miniature, to test this tool

Of each main model: whether the GPU computes what the CPU does, losses and gradients; mixed
precision; torch.compile; activation checkpointing with dropout; two processes that share a batch
(NCCL, where there are two GPUs); then speed and memory of inference and of training steps in
float32 and bfloat16. DIR/report.md is written anew after each of them. Weights and images are
random.

Exit code: 0 if every check passed, 1 if one failed, 2 if there is no GPU.
"""

import argparse
import socket
import sys
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

from smca.config import AMP_DTYPES, load_config
from smca.errors import UserError, exit_code, writing

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmark import COLUMNS, build_model, jobs_of, parse_options, row_of
from measuring import CONFIGS, MAIN_MODELS, Options, provenance, random_batch

NO_GPU = 2  # exit code
# Relative differences of losses and of the gradient that rounding may make.
TOLERANCES = {"float32": (1e-4, 1e-2), "bf16": (5e-2, 0.5), "fp16": (2e-2, 0.2)}
SCALES = [2.0**power for power in range(10, -15, -4)]  # of the loss in float16

# Overrides of --quick: the same models with few and narrow layers.
_TINY = ["model.embed_dim=16", "model.num_queries=6", "model.backbone.depth=18"]
_TINY += ["+model.backbone.num_blocks=[1,1,1,1]", "+model.backbone.width=16"]
_TINY += ["model.decoder.num_layers=2"]
_TINY += ["model.decoder.ffn_dim=16", "model.decoder.num_heads=2", "model.encoder.ffn_dim=16"]

Result = Tuple[Optional[bool], str]  # whether a check passed (None: it did not run), and figures


class Step(NamedTuple):
    """The losses of a training step by name, and the gradients, as a vector for each part."""

    losses: Dict[str, float]
    gradients: Dict[str, Tensor]


def part_of(name: str) -> str:
    """The part that a parameter belongs to. Weight maps, whose gradients are small, are one."""
    return "weight maps" if "modulation" in name else name.removeprefix("module.").split(".")[0]


# ---- Models and steps


def overrides_of(config: str, options: Options) -> List[str]:
    """The overrides of a config with --quick."""
    if not options.quick:
        return []
    if "conv" in config:
        return [*_TINY, "model.encoder.num_layers=1"]
    return [*_TINY, "model.encoder.pattern=I", "model.encoder.num_heads=2"]


def make_model(config: str, options: Options, device: str, dropout: float = 0.0) -> Any:
    """The config's model with random weights, the same ones on each device."""
    torch.manual_seed(0)
    overrides = [*overrides_of(config, options), f"model.dropout={dropout}"]
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
    for scale in SCALES if dtype == "fp16" else (1.0,):
        model.train().zero_grad()
        torch.manual_seed(seed)
        with torch.autocast(device, amp_dtype, enabled=amp_dtype is not None):
            losses = model(batch)
        (scale * sum(losses.values())).backward()
        parts: Dict[str, List[Tensor]] = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parts.setdefault(part_of(name), []).append(parameter.grad.flatten().cpu())
        gradients = {name: torch.cat(part).float() / scale for name, part in parts.items()}
        if all(gradient.isfinite().all() for gradient in gradients.values()):
            break
    return Step({name: loss.item() for name, loss in losses.items()}, gradients)


def compare(found: Step, expected: Step, dtype: str = "float32") -> Tuple[bool, str]:
    """Whether two steps are the same but for rounding, and how far apart they are."""
    loss, gradient = differences(found, expected)
    most_loss, most_gradient = TOLERANCES[dtype]
    text = f"{dtype}: losses {loss:.1e} (at most {most_loss:g}), gradient {gradient:.1e} "
    return loss <= most_loss and gradient <= most_gradient, f"{text}(at most {most_gradient:g})"


def differences(found: Step, expected: Step) -> Tuple[float, float]:
    """The greatest relative differences of a loss, and of a part's gradient. Infinity stands for
    nan."""
    losses = [
        abs(found.losses[name] - value) / max(abs(value), 1e-6)
        for name, value in expected.losses.items()
    ]
    loss = torch.tensor(losses).nan_to_num(torch.inf, torch.inf).max()
    distances = [
        (found.gradients[part] - gradient).norm() / gradient.norm()
        for part, gradient in expected.gradients.items()
    ]
    return float(loss), float(torch.stack(distances).nan_to_num(torch.inf, torch.inf).max())


# ---- Checks


def check_equality(config: str, options: Options) -> Result:
    """The device's step is the CPU's."""
    batch, devices = make_batch(options), (options.device, "cpu")
    steps = [take_step(make_model(config, options, device), batch) for device in devices]
    return compare(steps[0], steps[1])


def check_amp(config: str, options: Options) -> Result:
    """The steps of mixed precision are near that of float32."""
    batch, model = make_batch(options), make_model(config, options, options.device)
    expected = take_step(model, batch)
    results = [compare(take_step(model, batch, dtype), expected, dtype) for dtype in AMP_DTYPES]
    return all(passed for passed, _ in results), "; ".join(text for _, text in results)


def check_compile(config: str, options: Options) -> Result:
    """Compiled parts compute what they do in eager mode."""
    batch, model = make_batch(options), make_model(config, options, options.device)
    expected = take_step(model, batch)
    torch._dynamo.reset()
    model.compile_parts(**({"backend": "eager"} if options.quick else {}))
    return compare(take_step(model, batch), expected)


def check_checkpointing(config: str, options: Options) -> Result:
    """Layers that are computed again draw the same dropout."""
    batch, model = make_batch(options), make_model(config, options, options.device, dropout=0.1)
    steps = []
    for checkpointing in (True, False):
        model.encoder.checkpointing = checkpointing
        steps.append(take_step(model, batch))
    if differences(take_step(model, batch, seed=3), steps[1])[1] < 1e-3:
        return False, "another seed changes nothing: there is no dropout"
    return compare(steps[0], steps[1])


def check_processes(config: str, options: Options) -> Result:
    """Two processes with an image each have the gradient of one process with both."""
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        return None, "not run: there is one GPU"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.get_context("spawn").Manager() as manager:
        results = manager.dict()
        arguments = (port, config, options, results)
        multiprocessing.spawn(share_a_step, arguments, nprocs=2)  # type: ignore[no-untyped-call]
        (losses, arrays), (other_losses, other_arrays) = (results[rank] for rank in range(2))
    # Without padding: the convolutions see it, and an image alone has none.
    batch = make_batch(options, is_padded=False)
    expected = take_step(make_model(config, options, options.device), batch)
    if any((array != other_arrays[part]).any() for part, array in arrays.items()):
        return False, "the processes' gradients differ"
    losses = {name: (loss + other_losses[name]) / 2 for name, loss in losses.items()}
    gradients = {part: torch.from_numpy(array) for part, array in arrays.items()}
    return compare(Step(losses, gradients), expected)


def share_a_step(rank: int, port: int, config: str, options: Options, results: Any) -> None:
    """A step on one image of the batch, in one of two processes."""
    on_gpu = options.device == "cuda"
    torch.backends.cudnn.allow_tf32 = False
    if on_gpu:
        torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if on_gpu else "gloo", address, world_size=2, rank=rank)
    model = make_model(config, options, options.device)
    parallel = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    step = take_step(parallel, make_batch(options, is_padded=False)[rank : rank + 1])
    # As arrays: tensors would go with the process.
    results[rank] = step.losses, {part: g.numpy() for part, g in step.gradients.items()}
    dist.destroy_process_group()


CHECKS: Dict[str, Callable[[str, Options], Result]] = {
    "equal to the CPU": check_equality,
    "mixed precision": check_amp,
    "torch.compile": check_compile,
    "checkpointing with dropout": check_checkpointing,
    "two processes": check_processes,
}


def measurements(options: Options) -> Iterator[Tuple[str, Callable[[], List[str]]]]:
    """Inference and training steps in both types: their names, and functions that measure a row."""
    height, width = map(str, options.size)
    sizes = ["--image-size", height, width, "--train-size", height, width]
    for dtype in ("float32", "bf16"):
        for config in options.models:
            words = ["--device", options.device, "--dtype", dtype, "--seconds", "3", *sizes]
            words += ["--config", str(CONFIGS / f"{config}.py"), *overrides_of(config, options)]
            settings = parse_options(["inference", "train_step", *words])
            for name in settings.what:
                for job in jobs_of(name, settings):
                    yield name, lambda j=job, s=settings: [s.dtype, *row_of(j, s)]  # type: ignore


def run(options: Options) -> int:
    """Run all checks and measurements and write the report; gives the exit code."""
    options.threads = torch.get_num_threads()
    torch.backends.cudnn.allow_tf32 = False  # measurements have processes of their own
    checks: List[List[str]] = []
    speeds: List[List[str]] = []

    def add(name: str, config: str, result: Result) -> None:
        words = {True: "yes", False: "NO", None: "-"}[result[0]]
        checks.append([name, config, words, result[1]])
        print(*checks[-1], sep="; ", flush=True)
        write_report(options, checks, speeds)

    for config in options.models:
        for name, check in CHECKS.items():
            try:
                add(name, config, check(config, options))
            except Exception as error:  # whatever a GPU brings up is a finding
                add(name, config, failure(error))
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    for name, measure in measurements(options):
        try:
            speeds.append(measure())
            print(*speeds[-1], flush=True)
            write_report(options, checks, speeds)
        except Exception as error:  # out of memory, for instance
            add(f"speed of {name}", "", failure(error))
    return int(any(row[2] == "NO" for row in checks))


def failure(error: Exception) -> Result:
    """The result of a check that raised an error."""
    return False, f"{type(error).__name__}: {error}".splitlines()[0]


def write_report(options: Options, checks: List[List[str]], speeds: List[List[str]]) -> None:
    """Write report.md."""
    parts = [f"# Check of a GPU\n\n{provenance(options)}"]
    parts.append(tabulate(checks, ["check", "model", "passed", "figures"], tablefmt="github"))
    parts.append(tabulate(speeds, ["type", *COLUMNS], tablefmt="github", disable_numparse=True))
    (options.output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


# ---- Command line


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", default="output/gpu_check", type=Path, metavar="DIR")
    add("--models", nargs="+", default=MAIN_MODELS, metavar="NAME", help="names of configs")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--quick", action="store_true", help="tiny models and images")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU can be used here, so there is nothing to check.", file=sys.stderr)
        return NO_GPU
    for name in options.models:
        if not (CONFIGS / f"{name}.py").is_file():
            raise UserError(f"There is no config {name}: the default is {', '.join(MAIN_MODELS)}.")
    options.size = (64, 96) if options.quick else (800, 1066)
    with writing(str(options.output)):
        options.output.mkdir(parents=True, exist_ok=True)
    return run(options)


if __name__ == "__main__":
    sys.exit(exit_code(main))
