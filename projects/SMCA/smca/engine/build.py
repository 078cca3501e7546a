"""What a config describes of a run: data, model, optimizer and schedule, built and checked."""

import itertools
import logging
from typing import Any, Iterable, Mapping, NamedTuple

import torch
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader

from smca.config import build, build_model, check_train, dataset_names
from smca.data import require_dataset, spare_shared_memory
from smca.errors import ConfigError, did_you_mean

__all__ = ["Run", "build_run", "build_test_data", "build_test_loader"]

logger = logging.getLogger(__name__)

_DEV_RUN_IMAGES = 4


class Run(NamedTuple):
    """
    Attributes:
        model: on the config's device.
        train_loader: endless batches.
        test_loader: batches to evaluate on.
        optimizer: of the model's parameters.
        schedule: an fvcore `ParamScheduler`, which gives factors of the learning rate.
    """

    model: nn.Module
    train_loader: Iterable[Any]
    test_loader: Iterable[Any]
    optimizer: torch.optim.Optimizer
    schedule: Any


def build_run(cfg: DictConfig, checkpoint: str = "", provenance: Mapping[str, Any] = {}) -> Run:
    """Build what a config trains, and check that its parts fit one another.

    Args:
        cfg: a LazyConfig. What it computes from the data is replaced by its value.
        checkpoint: from which the training is resumed, or "".
        provenance: what this checkpoint says about itself.

    Raises:
        ConfigError, DatasetError: see the messages.
    """
    _resolve_data_settings(cfg, "train", "test")
    # Data first: what is wrong with them should not take the time to build a model.
    check_datasets(cfg, "train", "test")
    train_loader = build(cfg.dataloader.train, "dataloader.train")
    test_loader = build_test_loader(cfg)
    check_class_counts(cfg, "train", "test")
    check_class_names(cfg, checkpoint, provenance, "train", "test")
    model = build_model(cfg)
    logger.info("Model:\n%s", model)
    check_model(cfg, model)
    cfg.optimizer.params.model = model
    optimizer = build(cfg.optimizer, "optimizer")
    schedule = build(cfg.lr_multiplier, "lr_multiplier")
    return Run(model, train_loader, test_loader, optimizer, schedule)


def build_test_data(
    cfg: DictConfig, checkpoint: str, provenance: Mapping[str, Any]
) -> Iterable[Any]:
    """Build the batches that a checkpoint is evaluated on, and check that they fit it.

    Args:
        cfg: see :func:`build_run`.
        checkpoint: its path.
        provenance: what it says about itself.
    """
    _resolve_data_settings(cfg, "test")
    check_datasets(cfg, "test")
    test_loader = build_test_loader(cfg)
    check_class_counts(cfg, "test")
    check_class_names(cfg, checkpoint, provenance, "test")
    return test_loader


def build_test_loader(cfg: DictConfig) -> Iterable[Any]:
    """Batches to evaluate on: those of the config, or a few of them in a fast_dev_run."""
    loader = build(cfg.dataloader.test, "dataloader.test")
    if isinstance(loader, DataLoader):
        spare_shared_memory(loader)
    if cfg.train.fast_dev_run:
        return list(itertools.islice(loader, _DEV_RUN_IMAGES))
    return loader


def _resolve_data_settings(cfg: DictConfig, *splits: str) -> None:
    """Replace what a config computes from the data by its value: names of data sets that it
    registers, the number of classes (``configs/custom_coco.py``), and iterations of so many
    epochs (``configs/fine_tune.py``). config.yaml keeps how they are computed.

    Args:
        cfg: a LazyConfig.
        splits: "train" and "test"; what belongs to another stays.
    """
    keys = [f"dataloader.{split}.dataset.names" for split in splits] + ["model.num_classes"]
    if "train" in splits:
        keys += ["train.max_iter", "train.eval_period", "train.checkpointer.period"]
    for key in keys:
        node = OmegaConf.select(cfg, key)
        if isinstance(node, DictConfig):
            OmegaConf.update(cfg, key, build(node, key), merge=False)
    check_train(cfg.train)
    evaluator = cfg.dataloader.get("evaluator")  # or a list of them
    evaluated = evaluator.get("dataset_name") if isinstance(evaluator, DictConfig) else None
    if isinstance(evaluated, ListConfig):
        raise ConfigError(
            f"dataloader.evaluator.dataset_name is a list of {len(evaluated)}, an evaluator takes "
            "one data set: give data.val_json or dataloader.test.dataset.names without [ ]."
        )


def check_datasets(cfg: DictConfig, *splits: str) -> None:
    """Find, or make, the data sets of the splits "train" and "test", and check their files."""
    for split in splits:
        require_dataset(dataset_names(cfg, split))


def check_class_counts(cfg: DictConfig, *splits: str) -> None:
    """Compare the data sets' classes with the model's, once the data are loaded and known.

    Raises:
        ConfigError: the model has fewer; or it has more than the data that it is evaluated on,
            where Detectron2's evaluator fails at the first detection of one of them.
    """
    num_classes = OmegaConf.select(cfg, "model.num_classes")
    if num_classes is None:
        return
    for split in splits:
        is_evaluated = split == "test" and cfg.dataloader.get("evaluator") is not None
        for name in dataset_names(cfg, split):
            count = len(MetadataCatalog.get(name).get("thing_classes", []))
            if count > num_classes or (is_evaluated and 0 < count < num_classes):
                raise ConfigError(
                    f"Data set '{name}' has {count} classes, the model {num_classes}: set "
                    f"model.num_classes={count}, or dataloader.{split}.dataset.names to data with "
                    "the model's classes."
                )


def check_class_names(
    cfg: DictConfig, checkpoint: str, provenance: Mapping[str, Any], *splits: str
) -> None:
    """Compare the data sets' classes with a checkpoint's, once the data are loaded and known.

    Args:
        cfg: a LazyConfig.
        checkpoint: path, for the message.
        provenance: what the checkpoint says about itself; without names all is accepted.
        splits: "train" and "test".

    Raises:
        ConfigError: a data set has others, or in another order.
    """
    expected = provenance.get("class_names")
    for split in splits if expected else ():
        for name in dataset_names(cfg, split):
            found = list(MetadataCatalog.get(name).get("thing_classes", []))
            if found and found != expected:
                raise ConfigError(
                    f"{checkpoint} has the classes {expected}, data set '{name}' has {found}: set "
                    f"dataloader.{split}.dataset.names to data with the checkpoint's classes "
                    "(smca.data.register_coco with classes=[...] puts them in that order)."
                )


def check_model(cfg: DictConfig, model: nn.Module) -> None:
    """
    Raises:
        ConfigError: ``train.compile`` is set for a model that has no such method, or
            :func:`smca.solver.layer_lr_factor` gives a rate to a part that the model lacks.
    """
    if cfg.train.compile and not hasattr(model, "compile_parts"):
        raise ConfigError(
            f"train.compile=True needs a model with a method compile_parts, as SMCA has, which "
            f"{type(model).__name__} has not: set train.compile=False."
        )
    key = "optimizer.params.lr_factor_func"
    section = OmegaConf.select(cfg, key)
    if not isinstance(section, DictConfig) or "factors" not in section:
        return
    names = [name.split(".") for name, _ in model.named_parameters()]
    known = {".".join(words[:count]) for words in names for count in range(1, len(words) + 1)}
    for prefix, factor in section.factors.items():
        if factor != 1 and prefix not in known:
            raise ConfigError(
                f"{key}.factors names {prefix}, but no parameter of the model begins so"
                f"{did_you_mean(str(prefix), known)}"
            )
