#!/usr/bin/env python3
"""Speed and memory of this project's models beside what a user would take instead.

    python benchmarks/compare_peers.py --official DIR --output peers.json
    python benchmarks/compare_peers.py --only single hf_detr --tasks inference --dtypes float32

Models: {models}.

DIR is a checkout of the official SMCA (https://github.com/gaopengcuhk/SMCA-DETR), of which nothing
is changed; Hugging Face's models need the extra plug_in. A peer that can't run here has a row that
says why.

Models take turns: in each of the repeats every one runs in a process of its own, one of ours before
its peers. Times are medians over the repeats; a ratio is the median of the repeats' ratios, peer
over ours. Memory is the peak over what the process held before it built the model, with all that it
needs imported: weights, and what the calls take. Weights and images are random.

On a machine that others use as well, --quiet 0.2 takes a turn again, up to --tries times, where
other processes had more than 0.2 cores meanwhile (Linux); the one with the quietest machine counts.
On one that is never quiet, --cpu-time --threads 1 takes the time that the process had a core for.
"""

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from smca.config import AMP_DTYPES
from smca.errors import UserError, at_least, exit_code

import torch
from tqdm import tqdm

from benchmark import PeakMemory, device_name, in_fresh_process, print_table
from figures import command_line, write_figures
from peer_models import MODELS, TASKS

Options = argparse.Namespace
Record = Dict[str, Any]  # of a model, task and type in one of the repeats
Case = Tuple[str, str]  # a task and a type

TASK_NAMES = {"inference": "inference", "train_step": "training step"}
COLUMNS = ["model", "task", "size", "type", "s", "MiB", "time, peer / ours", "memory, peer / ours"]


# ---- Measuring


def measure(name: str, task: str, dtype: str, options: Options) -> Record:
    """Time and memory of a model; runs in a process of its own.

    Returns:
        ``seconds``, the median of the calls, ``bytes``, and ``others``, the cores that other
    processes had meanwhile; or ``missing``, why it can't run.
    """
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    # What the builders of benchmarks/benchmark_cases.py take.
    settings = argparse.Namespace(
        **{**vars(options), "dtype": dtype, "device": "cpu", "compile": False, "overrides": []}
    )
    try:
        build = MODELS[name].load(settings)
        before = PeakMemory("cpu").start
        run = build(task, options.sizes[task])
        memory = PeakMemory("cpu")
        start, busy = time.perf_counter(), others_seconds()
        times = call_times(run, options)
        others = (others_seconds() - busy) / (time.perf_counter() - start)
    except UserError as error:
        return {"missing": str(error)}
    except Exception as error:  # of code that is not ours, with whatever it finds here
        return {"missing": f"It fails here: {type(error).__name__}: {error}".splitlines()[0]}
    used = memory.read()["peak_bytes"] - before
    return {"seconds": statistics.median(times), "bytes": used, "others": others}


def call_times(run: Callable[[], Any], options: Options) -> List[float]:
    """Seconds of each call, after the warm-up."""
    clock = time.process_time if options.cpu_time else time.perf_counter
    times = []
    for _ in range(options.warmup + options.calls):
        start = clock()
        run()
        times.append(clock() - start)
    return times[options.warmup :]


def others_seconds() -> float:
    """Seconds of all cores that other processes have had so far; 0 where it is not Linux."""
    try:
        user, nice, system = Path("/proc/stat").read_text().split()[1:4]
    except OSError:
        return 0.0
    busy = (int(user) + int(nice) + int(system)) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def measure_quietly(name: str, task: str, dtype: str, options: Options) -> Record:
    """As `measure`; of some tries the one in which other processes had least."""
    tries: List[Record] = []
    while len(tries) < options.tries:
        try:
            tries.append(in_fresh_process(measure, name, task, dtype, options))
        except UserError as error:  # the process was killed
            return {"missing": str(error)}
        if "missing" in tries[-1] or tries[-1]["others"] <= options.quiet:
            return tries[-1]
    return min(tries, key=lambda record: record["others"])


def measure_all(options: Options) -> List[Record]:
    """The records of all models, tasks and types, the repeats one after the other."""
    cases = list(itertools.product(options.tasks, options.dtypes))
    records: List[Record] = []
    missing: Dict[Tuple[str, str, str], Record] = {}
    jobs = itertools.product(cases, range(options.repeats), options.only)
    total = len(cases) * options.repeats * len(options.only)
    for (task, dtype), repeat, name in tqdm(jobs, total=total, unit="run", disable=None):
        key = (name, task, dtype)
        if key in missing:
            continue
        found = measure_quietly(name, task, dtype, options)
        if "missing" in found:
            missing[key] = found
        images = options.batch_size if task == "train_step" else 1
        size = " x ".join(map(str, (images, *options.sizes[task])))
        what = dict(model=name, task=task, size=size, dtype=dtype, repeat=repeat)
        records.append({**what, **found})
        if options.output:  # after each, so that a long run that is stopped leaves its results
            write(options, records)
    return records


# ---- Reporting


def table(records: Sequence[Record]) -> List[List[Optional[str]]]:
    """The rows of `COLUMNS`: models by task and type, each of ours before its peers."""
    rows: List[List[Optional[str]]] = []
    cases: List[Case] = list(dict.fromkeys((r["task"], r["dtype"]) for r in records))
    for task, dtype in cases:
        of_case = [r for r in records if (r["task"], r["dtype"]) == (task, dtype)]
        for name in (name for name in MODELS if any(r["model"] == name for r in of_case)):
            label, counterpart = MODELS[name].label, MODELS[name].counterpart
            found = [r for r in of_case if r["model"] == name]
            row: List[Optional[str]] = [label, TASK_NAMES[task], found[0]["size"], dtype]
            if "missing" in found[0]:
                rows.append([*row, None, None, found[0]["missing"]])
                continue
            row.append(f"{statistics.median(r['seconds'] for r in found):.2f}")
            row.append(f"{statistics.median(r['bytes'] for r in found) / 2**20:.0f}")
            for key in ("seconds", "bytes"):
                ratio = median_ratio(found, [r for r in of_case if r["model"] == counterpart], key)
                row.append(None if ratio is None else f"{ratio:.2f}")
            rows.append(row)
    return rows


def median_ratio(peer: Sequence[Record], ours: Sequence[Record], key: str) -> Optional[float]:
    """The median over the repeats of peer over ours, None where there is no pair."""
    of_repeat = {r["repeat"]: r[key] for r in ours if key in r}
    ratios = [r[key] / of_repeat[r["repeat"]] for r in peer if r["repeat"] in of_repeat]
    return statistics.median(ratios) if ratios else None


def write(options: Options, records: Sequence[Record]) -> None:
    """The table and the records as JSON, with the command that made them."""
    words = ["DIR" if word == options.official else word for word in options.words]
    write_figures(
        options.output,
        command_line(__file__, words),
        COLUMNS,
        table(records),
        machine=f"{device_name('cpu')}, {options.threads} threads, torch {torch.__version__}",
        clock="time on the CPU" if options.cpu_time else "time",
        records=records,
    )


# ---- Command line


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").format(models=", ".join(MODELS)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--official", metavar="DIR", help="a checkout of the official SMCA")
    add("--only", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL")
    add("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    dtypes = ("float32", *AMP_DTYPES)
    add("--dtypes", nargs="+", choices=dtypes, default=["float32", "bf16"], help="autocast's")
    add("--image-size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    add("--train-size", type=int, nargs=2, default=(512, 672), metavar=("H", "W"))
    add("--batch-size", type=int, default=2, help="of the training step")
    add("--threads", type=int, default=torch.get_num_threads())
    add("--repeats", type=at_least(1), default=5, help="turns of all models")
    add("--warmup", type=int, default=1, help="calls of a turn before those that count")
    add("--calls", type=at_least(1), default=2, help="of a turn, whose median counts")
    add("--cpu-time", action="store_true", help="see above")
    add("--quiet", type=float, default=math.inf, metavar="CORES", help="see above")
    add("--tries", type=at_least(1), default=10, help="of --quiet")
    add("--output", metavar="FILE", help="write table and measurements as JSON")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    options = get_parser().parse_args(argv)
    options.words = list(sys.argv[1:] if argv is None else argv)
    options.sizes = dict(zip(TASKS, (tuple(options.image_size), tuple(options.train_size))))
    if options.official is not None and not Path(options.official).is_dir():
        raise UserError(f"--official {options.official} is no folder.")
    options.only = [name for name in MODELS if name in options.only]
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # of others' code, in each process
    print_table(COLUMNS, table(measure_all(options)))


if __name__ == "__main__":
    sys.exit(exit_code(main))
