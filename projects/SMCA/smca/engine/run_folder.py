"""The output folder of a run."""

import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, NamedTuple, Optional, TypeVar

from detectron2.config import LazyConfig
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from smca.checkpoint import SMCACheckpointer, provenance_of
from smca.checkpoint.files import remove_temporary_files, write_atomically
from smca.errors import UserError, writing

logger = logging.getLogger(__name__)

_T = TypeVar("_T")


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


class SavedRun(NamedTuple):
    """A checkpoint of a training."""

    path: str
    provenance: Dict[str, Any]  # what it says about itself
    seed: int = 0
    content: Optional[Dict[str, Any]] = None  # of the file, in the main process


def open_run(folder: str, need_trainer: bool = True) -> Optional[SavedRun]:
    """The newest checkpoint in a run's folder that can be read. If `need_trainer`, the training is
    to go on, for which weights alone are not enough. All processes call this together."""
    content: Optional[Dict[str, Any]] = None

    def read() -> Optional[SavedRun]:
        nonlocal content
        if need_trainer:
            remove_temporary_files(folder)
        found = SMCACheckpointer(nn.Module(), folder).find_resumable(need_trainer)
        if found is None:
            logger.warning("There is no checkpoint in %s: starting anew.", folder)
            return None
        path, content = found
        return SavedRun(path, provenance_of(content), content.get("trainer", {}).get("seed", 0))

    saved = from_main_process(read)
    return saved and saved._replace(content=content)
