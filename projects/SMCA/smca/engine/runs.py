"""A run: its output folder, and what its config describes, built and checked."""

import fcntl
import io
import itertools
import logging
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import LazyConfig
from detectron2.data import MetadataCatalog
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from smca.checkpoint import SMCACheckpointer, provenance_of
from smca.checkpoint.files import remove_temporary_files, write_atomically
from smca.config import build, build_model, check_train, dataset_names
from smca.data import require_dataset, spare_shared_memory
from smca.errors import ConfigError, UserError, writing

logger = logging.getLogger(__name__)

_DEV_RUN_IMAGES = 4


def from_main_process(function: Callable[..., Any], *args: Any) -> Any:
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
    logging.raiseExceptions = False  # a full disk, which checkpoints report, is none of each line
    with writing(f"train.output_dir={folder}"):
        for package in ("smca", "fvcore", "detectron2"):
            package_logger = setup_logger(
                path, distributed_rank=rank, name=package, configure_stdout=package == "smca"
            )
            for handler in package_logger.handlers:
                if isinstance(handler.stream, io.TextIOWrapper):  # a file's name need not be text
                    handler.stream.reconfigure(errors="backslashreplace")


def lock(folder: str) -> None:
    """Raise a UserError if the training of another process writes into the folder."""
    try:
        # It stays open, since closing it would end the lock, as the process's end does.
        file = os.open(os.path.join(folder, "log.txt"), os.O_WRONLY)
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"train.output_dir={folder} belongs to a training that is running: choose another "
            "folder, or stop that training."
        ) from error
    except OSError:  # a file system without locks
        pass


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


class Run(NamedTuple):
    model: nn.Module  # detector on the config's device
    train_loader: Iterable[Any]  # endless batches
    test_loader: Iterable[Any]
    evaluator: Any  # one of Detectron2's, a list of them, or None
    optimizer: torch.optim.Optimizer
    schedule: Any  # an fvcore `ParamScheduler`, which gives factors of the learning rate


def build_run(cfg: DictConfig, saved: Optional[SavedRun] = None) -> Run:
    """Build what a config trains, and check that its parts fit one another and the checkpoint of
    this training, if it goes on. What the config computes from the data is replaced by its value.
    """
    # The data come first: a fault in them is reported before the model is built, which takes time.
    train_loader, test_loader = _build_loaders(cfg, ["train", "test"], saved)
    evaluator = build(cfg.dataloader.get("evaluator"))
    model = build_model(cfg)
    logging.getLogger("detectron2").info("Model:\n%s", model)  # in the log's file only
    OmegaConf.update(cfg, "optimizer.params.model", model, force_add=True)
    optimizer = build(cfg.optimizer)
    schedule = build(cfg.lr_multiplier)
    return Run(model, train_loader, test_loader, evaluator, optimizer, schedule)


def build_evaluation(cfg: DictConfig, saved: SavedRun) -> Tuple[nn.Module, Iterable[Any], Any]:
    """The model, the test loader, and the evaluator of a config."""
    (test_loader,) = _build_loaders(cfg, ["test"], saved)
    evaluator = build(cfg.dataloader.get("evaluator"))
    return build_model(cfg), test_loader, evaluator


def _build_loaders(
    cfg: DictConfig, splits: Sequence[str], saved: Optional[SavedRun]
) -> List[Iterable[Any]]:
    _resolve_data_settings(cfg, splits)
    for split in splits:
        require_dataset(dataset_names(cfg, split))
    loaders = [build(cfg.dataloader[split]) for split in splits]
    for split in splits:  # the classes of a data set are known once it is loaded
        _check_classes(cfg, split, saved)
    if isinstance(loaders[-1], DataLoader):
        spare_shared_memory(loaders[-1])
    if cfg.train.fast_dev_run:
        loaders[-1] = list(itertools.islice(loaders[-1], _DEV_RUN_IMAGES))
    return loaders


def _resolve_data_settings(cfg: DictConfig, splits: Sequence[str]) -> None:
    """Replace what a config computes from the data by its value: names of data sets that it
    registers, the number of classes (``configs/custom_coco.py``), and iterations of so many
    epochs (``configs/fine_tune.py``). config.yaml keeps how they are computed."""
    keys = [f"dataloader.{split}.dataset.names" for split in splits] + ["model.num_classes"]
    if "train" in splits:
        keys += ["train.max_iter", "train.eval_period", "train.checkpointer.period"]
    for key in keys:
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig):
            OmegaConf.update(cfg, key, build(node), merge=False)
    check_train(cfg.train)
    evaluator = cfg.dataloader.get("evaluator")  # or a list of them
    evaluated = evaluator.get("dataset_name") if isinstance(evaluator, DictConfig) else None
    if isinstance(evaluated, ListConfig):
        raise ConfigError(
            f"dataloader.evaluator.dataset_name is a list of {len(evaluated)}, an evaluator takes "
            "one data set: give data.val_json, dataloader.test.dataset.names, or val of a YOLO "
            "data.yaml without [ ]."
        )


def _check_classes(cfg: DictConfig, split: str, saved: Optional[SavedRun]) -> None:
    """Raise if a data set has other classes than the checkpoint, or more than the model; or fewer,
    where Detectron2's evaluator fails at the first detection of another class."""
    num_classes = OmegaConf.select(cfg, "model.num_classes")
    trained = saved and saved.provenance.get("class_names")
    is_evaluated = split == "test" and cfg.dataloader.get("evaluator") is not None
    for name in dataset_names(cfg, split):
        names = list(MetadataCatalog.get(name).get("thing_classes", []))
        if saved and trained and names and names != trained:
            raise ConfigError(
                f"{saved.path} has the classes {trained}, data set '{name}' has {names}: set "
                f"dataloader.{split}.dataset.names to data with the checkpoint's classes "
                "(smca.data.register_coco with classes=[...] puts them in that order)."
            )
        if not isinstance(num_classes, int) or not names:  # of a wrong type: the model says so
            continue
        if len(names) > num_classes or (is_evaluated and len(names) < num_classes):
            raise ConfigError(
                f"Data set '{name}' has {len(names)} classes, the model {num_classes}: set "
                f"model.num_classes={len(names)}, or dataloader.{split}.dataset.names to data with "
                "the model's classes."
            )
