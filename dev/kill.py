#!/usr/bin/env python
"""Kill a training at random moments (``kill -9``), resume it, and compare its end with that of a
training that was never stopped:

    kill.py
    kill.py --kills 100 --seed 1 --output-dir output/kill

A tiny SMCA learns a few pictures of the embedded data set, with dropout, an average of the
weights and an evaluation. More than half of the kills are aimed at the writing of a checkpoint,
which is slowed down for them; where each hit is read from the files that it left. The exit code is
0 if every training resumed and ended with the same bits.
"""

import argparse
import io
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Callable, List, Optional, Set

from smca.config import quoted
from smca.data import register_shapes, require_dataset
from smca.engine import run
from smca.errors import UserError, exit_code

import numpy as np
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import default_argument_parser
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]

_DATA = "kill_shapes"
_OVERRIDES = [
    "model.backbone.num_blocks=[1,1]",
    "model.embed_dim=16",
    "model.encoder.ffn_dim=16",
    "model.decoder.ffn_dim=16",
    "model.decoder.num_layers=1",
    "model.num_queries=6",
    "model.dropout=0.1",
    "dataloader.train.mapper.augmentations.short_sides=64",
    "dataloader.train.mapper.augmentations.max_size=96",
    "dataloader.test.mapper.augmentations.short_sides=64",
    "dataloader.test.mapper.augmentations.max_size=96",
    f"dataloader.train.dataset.names={_DATA}_train",
    f"dataloader.test.dataset.names={_DATA}_val",
    "dataloader.train.total_batch_size=2",
    "train.device=cpu",
    "train.model_ema={enabled:True,decay:0.9}",
    "train.max_iter=16",
    "train.eval_period=8",
    "train.log_period=1",
    "train.checkpointer={period:2,max_to_keep:3}",
]
_MARK = "made_by_kill"  # a file in the output folder, which may then be removed
_KILLS_PER_TRAINING = 10
_AIMED = 0.6  # of the kills, at writing
_WRITING = ("writing a checkpoint", "writing last_checkpoint", "between these two files")
_PLACES = ("starting or resuming", "training", *_WRITING, "evaluating")


def get_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output-dir", default="output/kill", metavar="DIR", help="is emptied")
    parser.add_argument("opts", nargs="*", metavar="key=value", help="LazyConfig overrides")
    return parser


# Processes that are killed


class Life:
    """A process that trains; forked, so that it need not import PyTorch again."""

    def __init__(self, run_dir: Path, opts: List[str], slow_writes: bool = False) -> None:
        self.log = run_dir.with_suffix(".txt")
        self.start = time.monotonic()
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 99
            try:
                code = self._train(run_dir, opts, slow_writes)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        self.code: Optional[int] = None

    def _train(self, run_dir: Path, opts: List[str], slow_writes: bool) -> int:
        with open(self.log, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        torch.set_num_threads(1)
        if slow_writes:
            _slow_down_writes()
        config = ["--config-file", str(ROOT / "configs" / "smca_shapes.py"), "--resume"]
        overrides = [*_OVERRIDES, *opts, f"train.output_dir={quoted(str(run_dir))}"]
        return run(default_argument_parser().parse_args(config + overrides))

    def is_over(self) -> bool:
        """Whether the process has ended; `code` is its exit code then, negative after a signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, until: Callable[[], bool]) -> None:
        """Until the process has ended or something is so; ends one that takes minutes."""
        while not self.is_over() and not until():
            if time.monotonic() - self.start > 300:
                self.kill()
                raise UserError(f"A training hangs, see {self.log}.")
            time.sleep(0.001)

    def kill(self) -> None:
        """``kill -9``, unless it has ended."""
        if self.code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _slow_down_writes() -> None:
    """Let the writing of a checkpoint take long enough to be hit anywhere."""
    save, sync, replace = torch.save, os.fsync, os.replace

    def slow_save(data: Any, file: IO[bytes]) -> None:
        buffer = io.BytesIO()
        save(data, buffer)
        content = buffer.getvalue()
        size = len(content) // 15 + 1
        for start in range(0, len(content), size):
            file.write(content[start : start + size])
            file.flush()
            time.sleep(0.005)

    def slow_sync(descriptor: int) -> None:
        time.sleep(0.02)
        sync(descriptor)

    def slow_replace(source: Any, target: Any) -> None:
        time.sleep(0.02)
        replace(source, target)
        time.sleep(0.02)

    torch.save, os.fsync, os.replace = slow_save, slow_sync, slow_replace  # type: ignore


# Files that they leave


@dataclass
class Files:
    """What is in a run's folder: temporary files, the last step that was saved, the tagged one."""

    temporary: Set[str] = field(default_factory=set)
    newest: int = -1
    tagged: int = -1

    @classmethod
    def of(cls, run_dir: Path) -> "Files":
        names = os.listdir(run_dir) if run_dir.is_dir() else []
        matches = [re.match(r"model_(\d+)\.pth$", name) for name in names]
        newest = max((int(match[1]) for match in matches if match), default=-1)
        tag = run_dir / "last_checkpoint"
        name = tag.read_text() if tag.exists() else ""
        tagged = re.search(r"\d+", name)
        # model_final.pth is of the same step as the last with a number.
        at_end = newest if name else -1
        return cls(
            {name for name in names if name.endswith(".tmp")},
            newest,
            int(tagged[0]) if tagged else at_end,
        )


def _place(before: Files, after: Files, log: str) -> str:
    """Where a kill hit, one of _PLACES, from the files before and after and the life's log."""
    new = after.temporary - before.temporary
    if any(".pth." in name for name in new):
        return "writing a checkpoint"
    if any(name.startswith("last_checkpoint.") for name in new):
        return "writing last_checkpoint"
    if after.newest > max(before.newest, after.tagged):
        return "between these two files"
    if "Starting training from iteration" not in log:
        return "starting or resuming"
    is_evaluating = log.rfind("Start inference") > log.rfind("iter: ")
    return "evaluating" if is_evaluating else "training"


def _is_same(a: Any, b: Any) -> bool:
    """Whether two checkpoints' contents are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        same_kind = a.dtype == b.dtype and a.shape == b.shape
        return same_kind and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_is_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(_is_same, a, b))
    return a == b


# The experiment


class Experiment:
    """Trainings that are killed, one after the other.

    Attributes:
        kills: how many hit each place.
        steps_again: steps that were trained, not saved, and so trained again, for each kill.
        num_resumed: processes that went on from a checkpoint.
        num_trainings, num_equal: trainings that came to their end, and those with the right bits.
        problems: what went wrong.
    """

    def __init__(self, folder: Path, seed: int, opts: List[str]) -> None:
        self.folder, self.opts = folder, opts
        self.rng = np.random.default_rng(seed)
        self.kills: Counter[str] = Counter()
        self.steps_again: List[int] = []
        self.num_resumed = self.num_trainings = self.num_equal = 0
        self.problems: List[str] = []
        unbroken = Life(folder / "unbroken", opts)
        unbroken.wait(lambda: False)
        if unbroken.code != 0:
            raise UserError(f"The training fails without being killed, see {unbroken.log}.")
        self.duration = time.monotonic() - unbroken.start
        self.expected = _final(folder / "unbroken")

    def train(self, num_kills: int) -> None:
        """One training, killed up to so many times before it may come to its end."""
        self.num_trainings += 1
        run_dir = self.folder / f"training_{self.num_trainings}"
        last_step = -1  # that was trained
        while True:
            before = Files.of(run_dir)
            is_aimed = self.rng.random() < _AIMED
            life = Life(run_dir, self.opts, slow_writes=is_aimed and num_kills > 0)
            if num_kills <= 0:
                life.wait(lambda: False)
            elif is_aimed:
                self._wait_for_write(life, run_dir)
            else:
                moment = life.start + self.rng.uniform(0, self.duration)
                life.wait(lambda: time.monotonic() > moment)  # noqa: B023
            life.kill()
            log = life.log.read_text() if life.log.exists() else ""
            self._check_resumed(life, before, log, last_step)
            steps = [int(step) for step in re.findall(r" iter: (\d+)  total_loss", log)]
            last_step = max([last_step, *steps])
            if life.code != -signal.SIGKILL:
                break
            num_kills -= 1
            place = _place(before, Files.of(run_dir), log)
            self.kills[place] += 1
            text = f"training {self.num_trainings}: killed after step {last_step}, {place}"
            print(text, flush=True)
        if life.code != 0:
            self.problems.append(f"Exit code {life.code}, see {life.log}.")
        elif _is_same(_final(run_dir), self.expected):
            self.num_equal += 1
        else:
            self.problems.append(f"{run_dir} ends with other bits.")

    def _wait_for_write(self, life: Life, run_dir: Path) -> None:
        """Wait for a random moment of one of the life's next writes."""
        seen = Files.of(run_dir).temporary
        for _ in range(self.rng.integers(1, 4)):
            life.wait(lambda: bool(Files.of(run_dir).temporary - seen))  # noqa: B023
            seen |= Files.of(run_dir).temporary
        moment = time.monotonic() + self.rng.uniform(0, 0.2)
        life.wait(lambda: time.monotonic() > moment)

    def _check_resumed(self, life: Life, before: Files, log: str, last_step: int) -> None:
        """A life that came to train went on from the newest checkpoint, or the one before it."""
        if "Starting training from iteration" not in log:
            return
        match = re.search(r"Resuming at iteration (\d+)\.", log)
        start = int(match[1]) if match else 0
        if start not in (before.newest + 1, before.tagged + 1):
            self.problems.append(f"Started at {start} with {before}, see {life.log}.")
        if before.newest >= 0:
            self.num_resumed += 1
        self.steps_again.append(max(0, last_step + 1 - start))


def _final(run_dir: Path) -> Any:
    """What a finished training left, None if there is nothing."""
    if not (run_dir / "model_final.pth").exists():
        return None
    checkpoint = torch.load(run_dir / "model_final.pth", weights_only=True)
    return {key: checkpoint[key] for key in ("model", "model_ema", "trainer")}


def stress(args: argparse.Namespace) -> int:
    """The command's work."""
    folder = Path(args.output_dir).absolute()
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not (folder / _MARK).is_file():
        raise UserError(
            f"--output-dir {args.output_dir} would be removed, but it did not make it: choose a "
            "new folder."
        )
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / _MARK).touch()
    os.environ["SMCA_CACHE"] = str(folder / "cache")
    if f"{_DATA}_train" not in DatasetCatalog:
        register_shapes(num_train=12, num_val=2, prefix=_DATA)
    require_dataset([f"{_DATA}_train", f"{_DATA}_val"])
    start = time.monotonic()
    experiment = Experiment(folder, args.seed, args.opts)
    while (left := args.kills - sum(experiment.kills.values())) > 0 and not experiment.problems:
        experiment.train(min(left, _KILLS_PER_TRAINING))

    num_kills = sum(experiment.kills.values())
    num_writing = sum(experiment.kills[place] for place in _WRITING)
    rows = [(place, experiment.kills[place]) for place in _PLACES]
    print(tabulate(rows, ["killed while", "kills"], tablefmt="github"))
    print(
        f"{num_kills} kills, {num_writing} of them while files were written, in "
        f"{time.monotonic() - start:.0f} s (an unbroken training takes "
        f"{experiment.duration:.1f} s).\n"
        f"{experiment.num_resumed} processes went on from a checkpoint; at most "
        f"{max(experiment.steps_again, default=0)} steps were trained again.\n"
        f"{experiment.num_equal} of {experiment.num_trainings} trainings ended with the bits of "
        "the unbroken one (weights, their average, optimizer)."
    )
    if experiment.problems:
        raise UserError("\n".join(experiment.problems))
    return 0


def main(argv: Optional[List[str]] = None) -> int:
    """The command; gives its exit code."""
    return exit_code(stress, get_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
