"""The output folder of a run, which holds one run's files at a time."""

import errno
import fnmatch
import functools
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import IO, Dict, List, Optional, Sequence, Tuple

import torch
from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from smca.checkpoint import SMCACheckpointer
from smca.checkpoint.files import remove_temporary_files, write_atomically
from smca.errors import CheckpointError, ConfigError, writing

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = [
    "claim",
    "find_checkpoint",
    "log_to",
    "release",
    "save_config",
    "set_previous_run_aside",
]

logger = logging.getLogger(__name__)

_LOCK = ".lock"
_LOCKED: Dict[str, IO[str]] = {}  # by folder; closing one gives up its lock

_TRAINED = ("last_checkpoint", "model_*.pth", "metrics.json")
# log.txt is not among them: Detectron2 goes on with it from run to run.
_FILES = (
    *_TRAINED,
    "config.yaml",
    "events.out.tfevents.*",
    "nonfinite_*.json",
    "tracking.json",
    # What the project's tools draw there.
    "pictures",
    "curves.png",
    "validation.png",
    "gaussians.png",
    "modulation.json",
    "modulation.png",
    "examples.jpg",
)


def claim(folder: str) -> None:
    """Make the output folder this process's own until it ends or calls `release`: a second training
    would move the first one's files away and both write on.

    Raises:
        UserError: it cannot be written, or another process trains there.
    """
    path = os.path.join(folder, _LOCK)
    with writing(f"train.output_dir={folder}"):
        os.makedirs(folder, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115, open as long as the lock is held
    try:
        if fcntl is not None:
            # Not flock's kind, which a killed training's workers would go on holding.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.close()
            raise ConfigError(
                f"train.output_dir={folder} is in use by another training: wait for its end, or "
                "choose another folder."
            ) from error
        logger.warning(
            "%s cannot be locked (%s): let no other training write there.", folder, error
        )
    _LOCKED[folder] = file


def release(folder: str) -> None:
    """Give up what this process has claimed."""
    file = _LOCKED.pop(folder, None)
    if file is not None:
        file.close()


def log_to(folder: str, name: str = "log.txt") -> None:
    """Log into that file, and this package's words to stdout too.

    Raises:
        UserError: it cannot be written.
    """
    path, rank = os.path.join(folder, name), comm.get_rank()
    with writing(f"train.output_dir={folder}"):
        for package in ("smca", "fvcore", "detectron2"):
            setup_logger(
                path, distributed_rank=rank, name=package, configure_stdout=package == "smca"
            )


def save_config(cfg: DictConfig, folder: str) -> None:
    """Write ``config.yaml`` as Detectron2 does (and a .pkl where the config is no YAML), but whole
    or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with writing(f"train.output_dir={folder}"), tempfile.TemporaryDirectory() as scratch:
        LazyConfig.save(cfg, os.path.join(scratch, "config.yaml"))
        for path in Path(scratch).iterdir():
            write = functools.partial(_write, path.read_bytes())
            write_atomically(os.path.join(folder, path.name), write)
    logger.info("Full config saved to %s", os.path.join(folder, "config.yaml"))


def _write(content: bytes, file: IO[bytes]) -> None:
    file.write(content)


def set_previous_run_aside(train: DictConfig) -> Tuple[Optional[str], str]:
    """Move the files of a run that is not to be continued into a folder ``previous_<n>`` of their
    own, where that run can still be resumed. (Those of a fast_dev_run are removed.)

    Args:
        train: the config's section.

    Returns:
        The folder, None if there was no run; and where the weights of
        ``train.init_checkpoint`` are now.

    Raises:
        ConfigError: the files cannot be moved.
    """
    folder, weights = train.output_dir, train.init_checkpoint
    names = os.listdir(folder) if os.path.isdir(folder) else []
    if not _matching(names, _TRAINED):
        return None, weights
    remove_temporary_files(folder)
    if train.fast_dev_run:  # whose checkpoints nobody misses
        for name in _matching(names, _TRAINED):
            os.remove(os.path.join(folder, name))
        return None, weights
    number = max(_numbers(names), default=0) + 1
    previous = os.path.join(folder, f"previous_{number}")
    try:
        os.mkdir(previous)
        for name in _matching(names, _FILES):
            source, target = os.path.join(folder, name), os.path.join(previous, name)
            if weights and os.path.exists(weights) and os.path.samefile(weights, source):
                weights = target
            os.rename(source, target)
    except OSError as error:
        raise ConfigError(
            f"The files of another run in {folder} cannot be moved to {previous} ({error}): choose "
            "another train.output_dir."
        ) from error
    return previous, weights


def find_checkpoint(folder: str) -> str:
    """
    Returns:
        Path of the checkpoint to resume from, "" to start anew.

    Raises:
        CheckpointError: none can be read, or they are those of the run before.
    """
    remove_temporary_files(folder)
    last = SMCACheckpointer(torch.nn.Module(), folder).find_resumable()
    if last:
        return last
    previous = _newest_previous_run(folder)
    if previous:
        raise CheckpointError(
            f"There is no checkpoint in {folder}, but {previous} has those of the run "
            f"before: resume with train.output_dir={previous}, or start anew without --resume."
        )
    logger.warning("There is no checkpoint in %s: starting anew.", folder)
    return ""


def _newest_previous_run(folder: str) -> Optional[str]:
    """
    Returns:
        The folder of the last run with checkpoints that was set aside.
    """
    names = os.listdir(folder) if os.path.isdir(folder) else []
    for number in sorted(_numbers(names), reverse=True):
        previous = os.path.join(folder, f"previous_{number}")
        if _matching(os.listdir(previous), _TRAINED[:2]):
            return previous
    return None


def _matching(names: Sequence[str], patterns: Sequence[str]) -> List[str]:
    return [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]


def _numbers(names: Sequence[str]) -> List[int]:
    matches = [re.fullmatch(r"previous_(\d+)", name) for name in names]
    return [int(match[1]) for match in matches if match]
