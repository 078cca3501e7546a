"""What has to be right with a config's data and model before a training or an evaluation."""

from typing import Any, Mapping

from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca.config import dataset_names
from smca.data import require_dataset
from smca.errors import ConfigError, did_you_mean

__all__ = ["check_class_counts", "check_class_names", "check_datasets", "check_model"]


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
