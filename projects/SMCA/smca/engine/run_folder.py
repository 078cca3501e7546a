"""The output folder of a run, which holds one run's files at a time."""

import errno
import fcntl
import fnmatch
import logging
import os
import tempfile
from pathlib import Path
from typing import IO, Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple, TypeVar

from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from smca.checkpoint import SMCACheckpointer, provenance_of
from smca.checkpoint.files import remove_temporary_files, write_atomically
from smca.errors import CheckpointError, ConfigError, UserError, writing

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOCKED: Dict[str, IO[str]] = {}  # by folder; closing one gives up its lock

_CHECKPOINTS = ("last_checkpoint", "model_*.pth")
_TRAINED = (*_CHECKPOINTS, "metrics.json")
# All files of a run but log.txt, to which Detectron2 appends; the last ones are drawn by tools.
_FILES = [*_TRAINED, "config.yaml", "events.out.tfevents.*", "nonfinite_*.json"]
_FILES += ["pictures", "curves.png", "validation.png", "gaussians.png", "modulation.*"]
_FILES += ["examples.jpg"]


def from_main_process(function: Callable[..., _T], *args: Any) -> _T:
    """What a function returns in the main process, or the UserError that it raises there. All
    processes call this together."""
    result = error = None
    if comm.is_main_process():
        try:
            result = function(*args)
        except UserError as raised:
            error = raised
    result, error = comm.all_gather((result, error))[0]
    if error is not None:
        raise error
    return result


def claim(folder: str) -> None:
    """Lock the output folder until this process ends or calls `release`. Without the lock, a second
    training would move the files of the first one away."""
    with writing(f"train.output_dir={folder}"):
        os.makedirs(folder, exist_ok=True)
        # Open as long as the lock is held.
        file = open(os.path.join(folder, ".lock"), "w")  # noqa: SIM115
    try:
        # With `flock`, the workers of a killed training would keep the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):  # else there are no locks
            file.close()
            raise ConfigError(
                f"train.output_dir={folder} is in use by another training: wait for its end, or "
                "choose another folder."
            ) from error
    _LOCKED[folder] = file


def release(folder: str) -> None:
    """Unlock a folder."""
    if folder in _LOCKED:
        _LOCKED.pop(folder).close()


def log_to(folder: str, name: str = "log.txt") -> None:
    """Log into that file, and this package's messages to stdout too."""
    path, rank = os.path.join(folder, name), comm.get_rank()
    with writing(f"train.output_dir={folder}"):
        for package in ("smca", "fvcore", "detectron2"):
            setup_logger(
                path, distributed_rank=rank, name=package, configure_stdout=package == "smca"
            )


def save_config(cfg: DictConfig, folder: str) -> None:
    """Write ``config.yaml`` as Detectron2 does (and a .pkl where the config is no YAML), but whole
    or not at all."""
    with writing(f"train.output_dir={folder}"), tempfile.TemporaryDirectory() as scratch:
        LazyConfig.save(cfg, os.path.join(scratch, "config.yaml"))
        for path in Path(scratch).iterdir():
            write_atomically(os.path.join(folder, path.name), path.read_bytes())
    logger.info("Full config saved to %s", os.path.join(folder, "config.yaml"))


def set_previous_run_aside(train: DictConfig) -> Tuple[Optional[str], str]:
    """Move the files of a run that is not to be continued into a folder ``previous_<n>`` of their
    own, where that run can still be resumed.

    Returns:
        The folder, None if there was no run; and where the weights of
        ``train.init_checkpoint`` are now.
    """
    folder, weights = train.output_dir, train.init_checkpoint
    if not _matching(folder, _TRAINED):
        return None, weights
    remove_temporary_files(folder)
    numbers = [int(path.rpartition("_")[2]) for path in _previous_runs(folder)]
    previous = os.path.join(folder, f"previous_{max(numbers, default=0) + 1}")
    try:
        os.mkdir(previous)
        for name in _matching(folder, _FILES):
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


class SavedRun(NamedTuple):
    """A checkpoint of a training.

    Attributes:
        path: path of its file.
        provenance: what it says about itself.
        seed: seed of the training.
        content: all that the file holds, where it has been read: in the main process.
    """

    path: str
    provenance: Dict[str, Any]
    seed: int = 0
    content: Optional[Dict[str, Any]] = None


def open_run(folder: str, need_trainer: bool = True) -> Optional[SavedRun]:
    """Read the newest checkpoint in a folder. All processes call this together.

    Args:
        folder: output folder of the run.
        need_trainer: the training is to go on, for which weights alone are not enough.

    Raises:
        CheckpointError: none can be read, or they are those of the run before.
    """
    contents: List[Dict[str, Any]] = []

    def read() -> Optional[SavedRun]:
        if need_trainer:
            remove_temporary_files(folder)
        found = SMCACheckpointer(nn.Module(), folder).find_resumable(need_trainer)
        if found is None:
            with_checkpoints = [x for x in _previous_runs(folder) if _matching(x, _CHECKPOINTS)]
            if need_trainer and with_checkpoints:
                raise CheckpointError(
                    f"There is no checkpoint in {folder}, but {with_checkpoints[-1]} has those of "
                    f"the run before: resume with train.output_dir={with_checkpoints[-1]}, or "
                    "start anew without --resume."
                )
            logger.warning("There is no checkpoint in %s: starting anew.", folder)
            return None
        path, content = found
        contents.append(content)
        return SavedRun(path, provenance_of(content), content.get("trainer", {}).get("seed", 0))

    saved = from_main_process(read)
    return saved._replace(content=contents[0]) if saved and contents else saved


def _matching(folder: str, patterns: Sequence[str]) -> List[str]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    return [n for n in names if any(fnmatch.fnmatch(n, pattern) for pattern in patterns)]


def _previous_runs(folder: str) -> List[str]:
    """Folders ``previous_<n>``, in the order of their numbers."""
    paths = Path(folder).glob("previous_[0-9]*")
    return [str(path) for path in sorted(paths, key=lambda path: (len(path.name), path.name))]
