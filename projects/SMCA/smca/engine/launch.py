"""Running a training in one or several processes, which PyTorch's elastic launcher supervises."""

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Optional, Tuple

import torch
import torch.distributed as dist
from detectron2.utils import comm
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, record
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from smca.config import load_config, resolve_device
from smca.engine.signals import STOP_SIGNALS
from smca.engine.train import main
from smca.errors import ConfigError, UserError, exit_code

_COLLECTIVE_TIMEOUT = timedelta(minutes=30)  # Detectron2's
_START_METHOD = "spawn"  # CUDA cannot be used after a fork


def run(args: argparse.Namespace) -> int:
    """Run :func:`smca.engine.main` in ``--num-gpus`` processes, which are CPU processes (gloo) if
    the device is the CPU; or in this process, as one of those that torchrun or Slurm has started,
    which set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.

    Args:
        args: of Detectron2's `default_argument_parser`, and perhaps `max_restarts`.

    Returns:
        The exit code, see :func:`smca.errors.exit_code`; after a signal 128 + its number.
    """
    # Detectron2 logs errors in training with their traceback.
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    return exit_code(_run, args)


def _run(args: argparse.Namespace) -> int:
    is_started = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys()
    if args.num_machines != 1 or (is_started and args.num_gpus != 1):
        raise ConfigError(
            "--num-gpus starts processes on one machine: for several machines use torchrun "
            "--nnodes or Slurm, whose processes take neither --num-gpus nor --num-machines."
        )
    if args.num_gpus != 1:
        return _launch(args)
    if is_started:  # by torchrun or Slurm
        _device(args)
        record(_work)(args)
    else:
        main(args)
    return 0


def _is_no_user_error(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], UserError))


def _device(args: argparse.Namespace) -> torch.device:
    """The device of a training in several processes."""
    # What is wrong with the config is found here, once, rather than in each process.
    device = resolve_device(load_config(args.config_file, args.opts).train.device)
    if device.index is not None:
        raise ConfigError(
            f"train.device={device} is one GPU, and several processes take one each: set "
            "train.device=cuda, and choose the GPUs with CUDA_VISIBLE_DEVICES."
        )
    if device.type == "cpu":
        # Detectron2 chooses NCCL wherever it sees a GPU.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return device


# The launcher


def _launch(args: argparse.Namespace) -> int:
    """Start the processes, hand signals on to them, and wait for them all. If one fails, all are
    started again, `args.max_restarts` times, to go on from the newest checkpoint."""
    if args.num_gpus < 1:
        raise ConfigError("--num-gpus has to be at least 1.")
    if _device(args).type == "cuda" and args.num_gpus > torch.cuda.device_count():
        raise ConfigError(
            f"--num-gpus {args.num_gpus} is more than this machine's {torch.cuda.device_count()} "
            "GPUs; CPU processes are started with train.device=cpu."
        )
    signal.signal(signal.SIGUSR1, _raise_signal)  # the launcher handles others
    # PyTorch logs tracebacks, and this function prints the first error.
    for name in list(logging.root.manager.loggerDict):
        if name.startswith(("torch.distributed.elastic", "torch.multiprocessing")):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    max_restarts = getattr(args, "max_restarts", 0)
    try:
        for args.restart in range(max_restarts + 1):
            code, text, is_final = _run_group(args)
            if is_final or args.restart == max_restarts:
                break
            print(f"{text} All processes start again.", file=sys.stderr, flush=True)
    except SignalException as error:
        return 128 + error.sigval
    finally:
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if text:
        print(f"Error: {text}", file=sys.stderr, flush=True)
    return code


def _raise_signal(number: int, frame: Optional[FrameType]) -> None:
    raise SignalException(f"signal {number}", signal.Signals(number))


def _run_group(args: argparse.Namespace) -> Tuple[int, str, bool]:
    """Start the processes and wait for them. Gives the exit code; what went wrong (others fail
    because of the first error), "" for nothing or a signal; and whether to start again is no help.
    """
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=args.num_gpus,
            run_id="smca",
            max_restarts=0,
            start_method=_START_METHOD,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="localhost",
        )
        try:
            elastic_launch(config, _work)(args)
        except ChildFailedError as error:
            return _failure(error, Path(folder))
    return 0, "", True


def _failure(error: ChildFailedError, folder: Path) -> Tuple[int, str, bool]:
    """Each process that failed by an exception has left a file error.json in `folder`."""
    rank, first = error.get_first_failure()
    code = first.exitcode
    if code in [128 + number for number in STOP_SIGNALS]:
        return code, "", True
    errors = []
    for file in sorted(folder.rglob("error.json"), key=lambda path: path.stat().st_mtime_ns):
        with contextlib.suppress(ValueError):  # of a process that was killed while it wrote
            errors.append((file.parent.name, json.loads(file.read_text())["message"]))
    for _, details in errors:
        kind, _, text = details["message"].partition(": ")
        if kind == UserError.__name__:
            return 1, text, True
    if code < 0 or not errors:
        ended = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return 128 - code if code < 0 else code, f"Process {rank} was ended {ended}.", False
    name, details = errors[0]
    print(details["extraInfo"]["py_callstack"], file=sys.stderr)
    return 1, f"Process {name} failed: {details['message']}", False


# Each process


def _own_gpu() -> torch.device:
    """The GPU of this process: that of its number on the machine, or the only one that a scheduler
    lets it see."""
    index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if count == 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        index = 0
    if index >= count:
        raise ConfigError("There are more processes on this machine than GPUs.")
    return torch.device("cuda", index)


def _work(args: argparse.Namespace) -> None:
    """Be one of the processes of a training, as the environment's variables say."""
    logging.getLogger("detectron2.engine.train_loop").addFilter(_is_no_user_error)
    gpu = _own_gpu() if torch.cuda.is_available() else None
    if gpu is not None:
        torch.cuda.set_device(gpu)
    store, rank, world_size = next(dist.rendezvous("env://", timeout=_COLLECTIVE_TIMEOUT))
    # The store may still have the addresses of processes that have ended.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    dist.init_process_group(
        "gloo" if gpu is None else "nccl",
        store=dist.PrefixStore(f"attempt_{attempt}", store),
        rank=rank,
        world_size=world_size,
        timeout=_COLLECTIVE_TIMEOUT,
        device_id=gpu,
    )
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    comm.create_local_process_group(local_size)
    comm.synchronize()
    torch.set_num_threads(max(1, torch.get_num_threads() // local_size))
    try:
        main(args)
    except UserError as error:
        raise UserError(str(error)) from error  # whose name the launcher knows
    except KeyboardInterrupt as error:
        raise SystemExit(128 + signal.SIGINT) from error
    dist.destroy_process_group()
