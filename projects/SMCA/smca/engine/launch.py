"""Starting the processes of a training, and ending them: each error reaches its reader, and
no process waits for one that is gone."""

import argparse
import logging
import multiprocessing.connection
import os
import signal
import socket
import sys
import time
import traceback
from datetime import timedelta
from types import FrameType
from typing import Any, Callable, List, Optional, Tuple
from urllib.parse import urlparse

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch import multiprocessing as mp

from smca.config import load_config, resolve_device
from smca.engine.peers import Failure, PeerWatch
from smca.engine.signals import STOP_SIGNALS
from smca.engine.train import main
from smca.errors import ConfigError, UserError

__all__ = ["run"]

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # Detectron2's
_GRACE = 50  # seconds for all others to save and end, after one process has failed

# URL, rank, world size, rank and number on the machine, the first process's machine
_Place = Tuple[str, int, int, int, int, str]


def run(args: argparse.Namespace) -> int:
    """Run :func:`smca.engine.main` in as many processes as asked for: ``--num-gpus`` of them on
    each machine, which are CPU processes (gloo) if the device is the CPU; or in this one alone, as
    one of those that ``torchrun`` has started.

    Args:
        args: of Detectron2's `default_argument_parser`.

    Returns:
        The exit code. What the user can put right is printed without a traceback, with 1;
        after a signal the training is saved, and the code is 128 + the signal's number.
    """
    try:
        if _is_torchrun():
            if args.num_gpus * args.num_machines != 1:
                raise ConfigError(
                    "torchrun starts the processes (--nproc-per-node, --nnodes): leave out "
                    "--num-gpus and --num-machines."
                )
            return _run_torchrun(args)
        _check_processes(args)
        if args.num_gpus * args.num_machines > 1:
            return _launch(args)
    except UserError as error:
        return _report(str(error))
    except KeyboardInterrupt:
        return 130
    return _guarded(args, None, _report)


def _report(text: str) -> int:
    print(f"Error: {text}", file=sys.stderr, flush=True)
    return 1


def _is_torchrun() -> bool:
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"))


def _check_processes(args: argparse.Namespace) -> None:
    """Find what is wrong with the config here, once, rather than in each of several processes."""
    if args.num_gpus < 1 or args.num_machines < 1:
        raise ConfigError("--num-gpus and --num-machines have to be at least 1.")
    if not 0 <= args.machine_rank < args.num_machines:
        raise ConfigError(
            f"--machine-rank {args.machine_rank} has to be from 0 to {args.num_machines - 1}."
        )
    if args.num_gpus * args.num_machines == 1:
        return
    device = _device(args)
    if device.type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus} is more than this machine's {torch.cuda.device_count()} "
            "GPUs; CPU processes are started with train.device=cpu."
        )


def _device(args: argparse.Namespace) -> torch.device:
    device = resolve_device(load_config(args.config_file, args.opts).train.device)
    if device.type == "cpu":
        # Detectron2 chooses NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return device


# Launching on this machine


def _launch(args: argparse.Namespace) -> int:
    """Start this machine's processes, hand signals on to them, and wait for them all."""
    if args.dist_url == "auto":
        if args.num_machines > 1:
            raise ConfigError("--dist-url has to be tcp://HOST:PORT where there are machines.")
        args.dist_url = f"tcp://127.0.0.1:{_free_port()}"
    received: List[int] = []
    processes: List[Any] = []

    def forward(number: int, frame: Optional[FrameType]) -> None:
        received.append(number)
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    # Python's own helper process, which is started first, ignores no signal but two.
    previous = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        messages = mp.get_context("spawn").SimpleQueue()
        for number in STOP_SIGNALS:
            signal.signal(number, forward)
        context = mp.start_processes(
            _spawned, (args, messages), nprocs=args.num_gpus, join=False, start_method="spawn"
        )
        processes += context.processes
        if received:  # between the processes' start and here
            forward(received[0], None)
        texts: List[str] = []
        code = _wait(processes, received, messages, texts)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if texts:
        _report(texts[0])  # which others may have found, too
    elif code < 0 and not received:
        rank = next(i for i, process in enumerate(processes) if process.exitcode == code)
        _report(f"Process {rank} was ended by {signal.Signals(-code).name}.")
    if code and received:
        return 128 + received[0]
    return 128 - code if code < 0 else code


def _free_port() -> int:
    with socket.socket() as link:
        link.bind(("127.0.0.1", 0))
        return link.getsockname()[1]


def _wait(processes: List[mp.Process], received: List[int], messages: Any, texts: List[str]) -> int:
    """Wait for all processes, and collect their messages into `texts`.

    Returns:
        0, or the exit code of a process that failed, once all have ended.
    """
    deadline = None
    while any(process.is_alive() for process in processes):
        alive = [process.sentinel for process in processes if process.is_alive()]
        multiprocessing.connection.wait(alive, timeout=0.5)
        while not messages.empty():
            texts.append(messages.get())
        failed = _failed(processes)
        if failed and deadline is None:
            deadline = time.monotonic() + _GRACE
        # After a signal it is for its sender to lose patience.
        if deadline is not None and time.monotonic() > deadline and not received:
            for process in processes:
                process.kill()
    while not messages.empty():
        texts.append(messages.get())
    # A signal, which is negative, is why others failed.
    return min(_failed(processes), default=0)


def _failed(processes: List[mp.Process]) -> List[int]:
    return [process.exitcode for process in processes if process.exitcode]


def _spawned(local_rank: int, args: argparse.Namespace, messages: Any) -> None:
    """The whole life of a process that `_launch` starts."""
    rank = args.machine_rank * args.num_gpus + local_rank
    world_size = args.num_gpus * args.num_machines

    def report(text: str) -> int:
        messages.put(text)
        return 1

    host = urlparse(args.dist_url).hostname
    if host is None:  # of a file
        host = "127.0.0.1" if args.num_machines == 1 else socket.gethostname()
    place = (args.dist_url, rank, world_size, local_rank, args.num_gpus, host)
    sys.exit(_guarded(args, place, report))


def _run_torchrun(args: argparse.Namespace) -> int:
    env = os.environ
    device = _device(args)
    if device.type == "cuda" and int(env["LOCAL_RANK"]) >= torch.cuda.device_count():
        raise ConfigError("torchrun's --nproc-per-node is more than this machine's GPUs.")
    local_size = int(env.get("LOCAL_WORLD_SIZE", env["WORLD_SIZE"]))
    place = ("env://", int(env["RANK"]), int(env["WORLD_SIZE"]), int(env["LOCAL_RANK"]))
    return _guarded(args, (*place, local_size, env["MASTER_ADDR"]), _report)


# In each process


def _guarded(
    args: argparse.Namespace, place: Optional[_Place], report: Optional[Callable[[str], int]]
) -> int:
    """Run `main` in this process, as one of several if `place` says which.

    Args:
        report: makes a message known, and returns the exit code.

    Returns:
        The exit code.
    """
    # Detectron2 logs errors in training with their traceback.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    peers = None
    try:
        if place is not None:
            peers = _join(*place)
        main(args, peers)
        code, failure = 0, ""
    except UserError as error:
        code, failure = 1, str(error)
    except KeyboardInterrupt:
        code, failure = 130, "stopped by SIGINT"
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
        failure = f"stopped with exit code {code}"
    except Exception as error:
        if place is None:
            raise
        # A process is often told so by its collectives that another one failed.
        if peers is None or peers.wait_for_failure(5) is None:
            traceback.print_exc()
        code, failure = 1, f"{type(error).__name__}: {error}"
        report = None
    if peers is None:
        return report(failure) if code == 1 and report is not None else code
    return _leave(peers, code, failure, report)


def _leave(
    peers: PeerWatch, code: int, failure: str, report: Optional[Callable[[str], int]]
) -> int:
    if code:
        other = peers.failure
        peers.fail(Failure(code, f"Process {comm.get_rank()} ended: {failure}"))
        if code == 1 and report is not None:
            report(failure)
        elif other is not None and other.exit_code != 1:
            code = other.exit_code  # a signal that came to another first
    peers.close()
    if code == 0:
        dist.destroy_process_group()
    return code


def _join(
    url: str, rank: int, world_size: int, local_rank: int, local_size: int, host: str
) -> Optional[PeerWatch]:
    """Become one of the processes of a training."""
    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.set_device(local_rank)
    # It may wait for another machine, long, and where Python does not see Ctrl-C.
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
    dist.init_process_group(
        "nccl" if is_cuda else "gloo",
        init_method=url,
        world_size=world_size,
        rank=rank,
        timeout=_COLLECTIVE_TIMEOUT,
    )
    signal.signal(signal.SIGINT, handler)
    comm.create_local_process_group(local_size)
    comm.synchronize()
    torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    return PeerWatch(host) if world_size > 1 else None


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))
