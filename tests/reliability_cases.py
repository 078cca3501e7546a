"""Trainings in processes of their own, to which real things happen: signals, full disks, death."""

import multiprocessing
import os
import re
import signal
import sys
import time

import torch
import torch.utils.tensorboard  # noqa: F401  once, and not in each process that is forked

from smca.cli.train import main


class Job(multiprocessing.get_context("fork").Process):
    """
    ``train_net.py`` in a process group of its own, which is forked: a Python that has imported
    PyTorch already starts in milliseconds.
    """

    def __init__(self, folder, config, *args, prepare=None):
        """
        Args:
            folder (Path): for the output.
            config: file of the config.
            args: of the command line beside it.
            prepare (callable or None): called in the new process before the command.
        """
        super().__init__()
        self.output_file = folder / f"output_{len(list(folder.glob('output_*')))}"
        self.output_file.touch()  # so that the next one takes another name
        self.words = ["--config-file", config, *map(str, args)]
        self.prepare = prepare
        self.start()

    def run(self):
        os.setsid()
        with open(self.output_file, "w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)
        sys.stderr = open(2, "w", buffering=1, closefd=False)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # As in a data loader's worker: threads of the process before the fork are gone.
        torch.set_num_threads(1)
        if self.prepare is not None:
            self.prepare()
        sys.exit(main(self.words))

    @property
    def output(self):
        return self.output_file.read_text()

    def wait_for(self, pattern, seconds=600):
        """Wait until the output has this regular expression."""
        deadline = time.monotonic() + seconds
        while not re.search(pattern, self.output):
            assert self.is_alive(), f"ended before {pattern!r}:\n{self.output}"
            assert time.monotonic() < deadline, f"no {pattern!r} in:\n{self.output}"
            time.sleep(0.02)

    @staticmethod
    def wait_until(condition, seconds=600):
        """Wait for what other processes do."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def signal_group(self, number):
        os.killpg(self.pid, number)

    def wait(self, seconds=600):
        """The exit code; kills what takes longer."""
        self.join(seconds)
        if self.is_alive():
            self.signal_group(signal.SIGKILL)
            raise AssertionError(f"not ended after {seconds} s:\n{self.output}")
        return self.exitcode


def train(folder, config, *args, prepare=None):
    """The exit code and the output of a training."""
    job = Job(folder, config, *args, prepare=prepare)
    return job.wait(), job.output


def load(path):
    return torch.load(path, weights_only=True)


def iteration_of(path):
    return load(path)["trainer"]["iteration"]


def files(folder):
    return {path.name for path in folder.iterdir()}
