#!/usr/bin/env python3
"""What only a GPU can show, in under ten minutes, as a report.

    python benchmarks/gpu_check.py --output gpu_report
    python benchmarks/gpu_check.py --device cpu --quick   # the same in miniature, to test this tool

Of each main model: whether the GPU computes what the CPU does, losses and gradients; mixed
precision; torch.compile; activation checkpointing with dropout; two processes that share a batch
(NCCL, where there are two GPUs); then speed and memory of inference and of training steps in
float32 and bfloat16. Writes DIR/report.md and DIR/report.json. Weights and images are random.

Exit code: 0 if every check passed, 1 if one failed, 2 if there is no GPU.
"""

import argparse
import itertools
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple, Union

from smca.config import AMP_DTYPES, load_config
from smca.errors import UserError, exit_code

import torch
import torch.distributed as dist
from tabulate import tabulate
from torch import Tensor, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from benchmark import (
    CONFIGS,
    MAIN_MODELS,
    Record,
    device_name,
    in_fresh_process,
    measure,
    parse_options,
    table_of,
)
from benchmark_cases import MEASUREMENTS, Job, build_model, random_batch
from figures import Table, command_line, markdown, write_figures

Options = argparse.Namespace
NO_GPU = 2  # exit code
SECONDS = 540.0  # after which nothing new begins
# Relative differences of losses and of the gradient that rounding may make.
TOLERANCES = {"float32": (1e-4, 1e-2), "bf16": (5e-2, 0.5), "fp16": (2e-2, 0.2)}
SCALES = [2.0**power for power in range(10, -15, -4)]  # of the loss in float16

# --quick: the models' own parts, few and narrow.
_TINY = ["model.embed_dim=16", "model.num_queries=6", "model.backbone.depth=18"]
_TINY += ["+model.backbone.num_blocks=[1,1,1,1]", "+model.backbone.width=16"]
_TINY += ["model.decoder.num_layers=2"]
_TINY += ["model.decoder.ffn_dim=16", "model.decoder.num_heads=2", "model.encoder.ffn_dim=16"]


class Step(NamedTuple):
    """What a training step computes.

    Attributes:
        losses: by name.
        gradient: of all parameters, in one vector on the CPU.
    """

    losses: Dict[str, float]
    gradient: Tensor


@dataclass
class Outcome:
    """
    Attributes:
        check: its name.
        config: of the model.
        passed: None: it could not run.
        figures: what was found, in words.
    """

    check: str
    config: str
    passed: Optional[bool]
    figures: str


# ---- Models and steps


def overrides_of(config: str, options: Options, *more: str) -> List[str]:
    """The overrides of a config: those of --quick, and `more`."""
    if not options.quick:
        return list(more)
    layers = "num_layers=1" if "conv" in config else "pattern=I"
    heads = [] if "conv" in config else ["model.encoder.num_heads=2"]
    return [*_TINY, f"model.encoder.{layers}", *heads, *more]


def make_model(config: str, options: Options, device: str, *overrides: str) -> nn.Module:
    """The config's model with random weights, the same ones on each device."""
    torch.manual_seed(0)
    cfg = load_config(str(CONFIGS / f"{config}.py"), overrides_of(config, options, *overrides))
    return build_model(argparse.Namespace(device=device), cfg)


def make_batch(options: Options, is_padded: bool = True) -> List[Dict[str, Any]]:
    """Two images, of different sizes if they shall be padded."""
    torch.manual_seed(1)
    height, width = options.size
    sizes = [(height, width)] * 2
    if is_padded:
        sizes = [(height, width * 3 // 4), (height * 3 // 4, width)]
    return [item for size in sizes for item in random_batch(1, size, num_classes=80)]


def take_step(
    model: nn.Module, batch: List[Dict[str, Any]], dtype: str = "float32", seed: int = 2
) -> Step:
    """Losses and gradient, of a dropout that `seed` decides. In float16 the loss is scaled, by less
    until the gradient is finite, as training finds its scale."""
    device = next(model.parameters()).device.type
    amp_dtype = AMP_DTYPES.get(dtype)
    for scale in SCALES if dtype == "fp16" else (1.0,):
        model.train().zero_grad()
        torch.manual_seed(seed)
        with torch.autocast(device, amp_dtype, enabled=amp_dtype is not None):
            losses = model(batch)
        (scale * sum(losses.values())).backward()
        gradients = [p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None]
        gradient = torch.cat(gradients).float() / scale
        if gradient.isfinite().all():
            break
    return Step({name: loss.item() for name, loss in losses.items()}, gradient)


def compare(found: Step, expected: Step, dtype: str = "float32") -> Tuple[bool, str]:
    """Whether two steps are the same but for rounding, and how far apart they are."""
    loss, gradient = differences(found, expected)
    most_loss, most_gradient = TOLERANCES[dtype]
    text = f"{dtype}: losses {loss:.1e} (at most {most_loss:g}), gradient {gradient:.1e} "
    return loss <= most_loss and gradient <= most_gradient, f"{text}(at most {most_gradient:g})"


def differences(found: Step, expected: Step) -> Tuple[float, float]:
    """Relative ones: the greatest of a loss, and the norm of the gradient's; nan counts as inf."""
    losses = [
        abs(found.losses[name] - value) / max(abs(value), 1e-6)
        for name, value in expected.losses.items()
    ]
    loss = torch.tensor(losses).nan_to_num(torch.inf, torch.inf).max()
    distance = (found.gradient - expected.gradient).norm() / expected.gradient.norm()
    return float(loss), float(distance.nan_to_num(torch.inf, torch.inf))


# ---- Checks


def check_equality(config: str, options: Options) -> Tuple[bool, str]:
    """The device's step is the CPU's, in float32 without TF32."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        batch = make_batch(options)
        steps = [
            take_step(make_model(config, options, device, "model.dropout=0.0"), batch)
            for device in (options.device, "cpu")
        ]
    finally:
        torch.backends.cudnn.allow_tf32 = True
    return compare(steps[0], steps[1])


def check_amp(config: str, options: Options) -> Tuple[bool, str]:
    """Mixed precision's steps are near that of float32."""
    batch = make_batch(options)
    model = make_model(config, options, options.device, "model.dropout=0.0")
    expected = take_step(model, batch)
    results = [compare(take_step(model, batch, dtype), expected, dtype) for dtype in AMP_DTYPES]
    return all(passed for passed, _ in results), "; ".join(text for _, text in results)


def check_compile(config: str, options: Options) -> Tuple[bool, str]:
    """Compiled parts compute what they do in eager mode."""
    batch = make_batch(options)
    model: Any = make_model(config, options, options.device, "model.dropout=0.0")
    expected = take_step(model, batch)
    torch._dynamo.reset()
    start = time.perf_counter()
    model.compile_parts(**({"backend": "eager"} if options.quick else {}))
    passed, text = compare(take_step(model, batch), expected)
    return passed, f"{text}; {time.perf_counter() - start:.0f} s to compile"


def check_checkpointing(config: str, options: Options) -> Tuple[bool, str]:
    """With dropout, layers that are computed again draw the same numbers; memory of a step."""
    batch = make_batch(options)
    model: Any = make_model(config, options, options.device, "model.dropout=0.1")
    steps, peaks = [], []
    for checkpointing in (True, False):
        model.encoder.checkpointing = checkpointing
        if options.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps.append(take_step(model, batch))
        if options.device == "cuda":
            peaks.append(f"{torch.cuda.max_memory_allocated() / 2**20:.0f}")
    passed, text = compare(steps[0], steps[1])
    other = take_step(model, batch, seed=3)
    if differences(other, steps[1])[1] < 1e-3:
        return False, "another seed changes nothing: there is no dropout"
    return passed, text + (f"; {peaks[0]} MiB in place of {peaks[1]}" if peaks else "")


def check_processes(config: str, options: Options) -> Tuple[Optional[bool], str]:
    """Two processes with an image each have the gradient of one process with both."""
    if options.device == "cuda" and torch.cuda.device_count() < 2:
        return None, "not run: there is one GPU"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager:
        results = manager.dict()
        arguments = (port, config, options, results)
        multiprocessing.spawn(share_a_step, arguments, nprocs=2)  # type: ignore[no-untyped-call]
        found = [Step(results[rank][0], torch.from_numpy(results[rank][1])) for rank in range(2)]
    # Without padding: the convolutions see it, and an image alone has none.
    batch = make_batch(options, is_padded=False)
    model = make_model(config, options, options.device, "model.dropout=0.0")
    expected = take_step(model, batch)
    if not torch.equal(found[0].gradient, found[1].gradient):
        return False, "the processes' gradients differ"
    losses = {name: (found[0].losses[name] + found[1].losses[name]) / 2 for name in expected.losses}
    return compare(Step(losses, found[0].gradient), expected)


def share_a_step(rank: int, port: int, config: str, options: Options, results: Any) -> None:
    """A step on one image of the batch, in one of two processes."""
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("nccl" if on_gpu else "gloo", address, world_size=2, rank=rank)
    model = make_model(config, options, options.device, "model.dropout=0.0")
    parallel = DistributedDataParallel(model, device_ids=[rank] if on_gpu else None)
    step = take_step(parallel, make_batch(options, is_padded=False)[rank : rank + 1])
    results[rank] = (step.losses, step.gradient.numpy())
    dist.destroy_process_group()


CHECKS: Dict[str, Callable[[str, Options], Tuple[Optional[bool], str]]] = {
    "equal to the CPU": check_equality,
    "mixed precision": check_amp,
    "torch.compile": check_compile,
    "checkpointing with dropout": check_checkpointing,
    "two processes": check_processes,
}


def run_checks(options: Options) -> Iterator[Outcome]:
    """The outcomes of all checks of all models; an error is a failure."""
    for config in options.models:
        for name, check in CHECKS.items():
            if time.perf_counter() > options.deadline:
                yield Outcome(name, config, None, "not run: out of time")
                continue
            try:
                passed, figures = check(config, options)
            except Exception as error:  # whatever a GPU brings up is a finding
                passed, figures = False, first_line(error)
            yield Outcome(name, config, passed, figures)


def first_line(error: Exception) -> str:
    """Its kind and what it says."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


# ---- Speed and memory


def measurements(options: Options) -> Iterator[Union[Record, Outcome]]:
    """Inference and training steps in both types, each in a process of its own; the outcome of one
    that fails."""
    height, width = map(str, options.size)
    sizes = ["--image-size", height, width, "--train-size", height, width]
    costs: Dict[Tuple[str, str], int] = {}
    for dtype in ("float32", "bf16"):
        for config in options.models:
            words = ["--device", options.device, "--dtype", dtype, "--repeats", "5", *sizes]
            words += ["--config", str(CONFIGS / f"{config}.py"), *overrides_of(config, options)]
            settings = parse_options(["inference", "train_step", *words])
            for name in settings.what:
                for job in MEASUREMENTS[name](settings):
                    if time.perf_counter() > options.deadline:
                        return
                    what = (name, config)
                    try:
                        if what not in costs:
                            costs[what] = cost_of(job, settings)
                        yield in_fresh_process(measure, job, settings, costs[what])
                    except Exception as error:  # out of memory, for instance
                        yield Outcome(f"speed of {name}, {dtype}", config, False, first_line(error))


def cost_of(job: Job, settings: Options) -> int:
    """Multiply-adds of a call."""
    assert job.cost is not None
    return job.cost(settings, **job.arguments)


def speed_table(records: Sequence[Record]) -> Table:
    """The benchmark's table with the type, and images a second."""
    columns, rows = table_of(records)
    filled: List[List[str]] = []
    for record, cells in zip(records, rows):
        row = [cell or "" for cell in cells]
        images = int(record["size"].split(" x ")[0])
        speed = f"{images / record['median_s']:.1f}"
        filled.append([*row[:3], record["dtype"], speed, *row[3:]])
    return Table([*columns[:3], "type", "images a second", *columns[3:]], filled)


# ---- Report


def write_report(
    options: Options, outcomes: Sequence[Outcome], records: Sequence[Record]
) -> List[str]:
    """report.md and report.json; gives their paths."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [str(folder / name) for name in ("report.md", "report.json")]
    command = command_line(__file__, options.words)
    where = f"{device_name(options.device)}, torch {torch.__version__}"
    speed = speed_table(records)
    checks = Table(
        ["check", "model", "passed", "figures"],
        [[o.check, o.config, in_words(o.passed), o.figures] for o in outcomes],
    )
    text = [f"# Check on {where}", f"`{command}`, {time.strftime('%Y-%m-%d')}"]
    text += ["## Checks", markdown(checks), "## Speed and memory", markdown(speed)]
    Path(paths[0]).write_text("\n\n".join(text) + "\n", encoding="utf-8")
    more: Dict[str, Any] = dict(
        machine=where, checks=list(map(asdict, outcomes)), records=list(records)
    )
    write_figures(paths[1], command, *speed, **more)
    return paths


def in_words(passed: Optional[bool]) -> str:
    """Of an outcome."""
    return {True: "yes", False: "NO", None: "-"}[passed]


# ---- Command line


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output", default="output/gpu_check", metavar="DIR")
    add("--models", nargs="+", default=MAIN_MODELS, metavar="NAME", help="of configs")
    add("--device", default="cuda", choices=("cuda", "cpu"))
    add("--quick", action="store_true", help="tiny models and images")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    options = get_parser().parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("No GPU can be used here, so there is nothing to check.", file=sys.stderr)
        return NO_GPU
    unknown = [name for name in options.models if not (CONFIGS / f"{name}.py").is_file()]
    if unknown:
        raise UserError(
            f"There is no config {unknown[0]}: the default is {', '.join(MAIN_MODELS)}."
        )
    options.size = (64, 96) if options.quick else (800, 1066)
    options.deadline = time.perf_counter() + SECONDS
    outcomes: List[Outcome] = []
    records: List[Record] = []
    for found in itertools.chain(run_checks(options), measurements(options)):
        if isinstance(found, Outcome):
            outcomes.append(found)
            words = f"{found.config}, {found.check}: {in_words(found.passed)}"
            print(f"{words}; {found.figures}", flush=True)
        else:
            records.append(found)
            print(f"{found['config']} {found['name']} {found['dtype']}", flush=True)
    print(tabulate(*reversed(speed_table(records)), tablefmt="github", disable_numparse=True))
    print("Written:", *write_report(options, outcomes, records), sep="\n  ")
    return 1 if any(outcome.passed is False for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
