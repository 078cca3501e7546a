#!/usr/bin/env python3
"""A busy machine: seconds of a step of the demo's training with another program on one of the cores
and without, for each way in which threads may wait for one another.

    python tools/busy_machine.py --output docs/figures/busy.json

Nothing else should run meanwhile; with two cores it takes ten minutes.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Sequence

from smca.analysis import read_metrics
from smca.errors import UserError, at_least, exit_code

import torch
from tqdm import tqdm

from benchmark import device_name
from figures import Table, command_line, markdown, write_figures

ROOT = Path(__file__).resolve().parents[1]
_WARMUP = 6  # steps
# What a case says itself; importing smca sets the first.
_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS")


class Case(NamedTuple):
    name: str
    environment: Dict[str, str]
    arguments: Sequence[str] = ()


CASES = [
    Case("OpenMP's default", {"GOMP_SPINCOUNT": "300000"}),
    Case("30,000 spins", {"GOMP_SPINCOUNT": "30000"}),
    Case("10,000 spins", {"GOMP_SPINCOUNT": "10000"}),
    Case("5,000 spins (here)", {}),
    Case("1,000 spins", {"GOMP_SPINCOUNT": "1000"}),
    Case("no spins (OMP_WAIT_POLICY=PASSIVE)", {"OMP_WAIT_POLICY": "PASSIVE"}),
    Case("one thread (OMP_NUM_THREADS=1)", {"OMP_NUM_THREADS": "1"}),
    Case("two processes of one thread", {"OMP_NUM_THREADS": "1"}, ["--num-gpus", "2"]),
]


def seconds_of_a_step(case: Case, steps: int, overrides: Sequence[str]) -> float:
    """The median of a training in a process of its own.

    Raises:
        UserError: what the training says if it fails.
    """
    env = {k: v for k, v in os.environ.items() if k not in _SETTINGS} | case.environment
    settings = ["dataloader.evaluator=null", "train.eval_period=0", "train.num_pictures=0"]
    settings += ["train.log_period=1", "train.device=cpu", f"train.max_iter={steps + _WARMUP}"]
    script = [sys.executable, str(ROOT / "train_net.py"), *case.arguments]
    config = ["--config-file", str(ROOT / "configs" / "smca_shapes.py")]
    with tempfile.TemporaryDirectory() as folder:
        command = [*script, *config, *settings, f"train.output_dir={folder}/run", *overrides]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise UserError(f"The training failed: {last.removeprefix('Error: ')}")
        iterations, times = read_metrics(f"{folder}/run/metrics.json")["time"]
    return statistics.median(t for i, t in zip(iterations, times) if i >= _WARMUP)


def measure(case: Case, steps: int, overrides: Sequence[str]) -> List[float]:
    """Seconds of a step alone, and beside a program that takes all of a core."""
    alone = seconds_of_a_step(case, steps, overrides)
    neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
    try:
        return [alone, seconds_of_a_step(case, steps, overrides)]
    finally:
        neighbour.kill()
        neighbour.wait()


def table_of(measured: Dict[str, List[float]]) -> Table:
    quiet = measured[CASES[0].name][0]
    rows = [
        [name, f"{alone:.3f}", f"{busy:.3f}", f"{alone / quiet:.2f}", f"{busy / quiet:.1f}"]
        for name, (alone, busy) in measured.items()
    ]
    columns = ["threads wait with", "s alone", "s beside another program"]
    return Table([*columns, "alone, of the default's", "beside, of the default's alone"], rows)


def main(argv: Optional[Sequence[str]] = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=at_least(1), default=30, help="of each; default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="of the table, as JSON")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="overrides of the config")
    args = parser.parse_args(argv)
    measured = {
        case.name: measure(case, args.steps, args.opts) for case in tqdm(CASES, disable=None)
    }
    table = table_of(measured)
    print(markdown(table))
    if args.output:
        command = command_line(__file__, argv)
        where = f"{device_name('cpu')}, {os.cpu_count()} cores, torch {torch.__version__}"
        write_figures(args.output, command, *table, machine=where)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
