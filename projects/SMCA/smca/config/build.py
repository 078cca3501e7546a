"""What a LazyConfig's sections build, with errors that say which section it was."""

from typing import Any, List

from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca.errors import ConfigError, UserError

__all__ = ["build", "build_model", "dataset_names"]


def build(section: DictConfig, name: str) -> Any:
    """Instantiate a part of a LazyConfig.

    Args:
        section: what to instantiate.
        name: of the section, for the message.

    Raises:
        ConfigError: it cannot be built; names the section.
    """
    try:
        return instantiate(section)
    except UserError:
        raise
    except Exception as error:  # a value of the wrong type can fail anywhere, and in any way
        if isinstance(error, (AssertionError, KeyError, ValueError)) and error.args:
            reason = error.args[0]
        else:
            reason = error if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
        raise ConfigError(f"The config's {name} cannot be built: {reason}") from error


def build_model(cfg: DictConfig) -> nn.Module:
    """The config's model, on the device that ``train.device`` names.

    Raises:
        ConfigError: it cannot be built.
    """
    return build(cfg.model, "model").to(cfg.train.device)


def dataset_names(cfg: DictConfig, split: str) -> List[str]:
    """Names of the config's data sets in Detectron2's catalog.

    Args:
        cfg: a LazyConfig.
        split: "train" or "test".

    Returns:
        The names; none where the config calls a function for them, whose files need not be here.
    """
    key = f"dataloader.{split}.dataset.names"
    names = OmegaConf.select(cfg, key, default=None, throw_on_resolution_failure=False)
    if isinstance(names, DictConfig):
        return []
    return [names] if isinstance(names, str) else list(names or [])
