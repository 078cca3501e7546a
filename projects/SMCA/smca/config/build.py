"""What a LazyConfig's sections build, with errors that say which section it was."""

import copy
import logging
import re
import traceback
from typing import Any, Dict, Iterator, List, Mapping, Sequence

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from smca.data import class_names, fitted, num_classes, register_coco
from smca.errors import ConfigError, UserError

__all__ = ["build", "build_model", "dataset_names", "fit_to_data", "origin", "use_classes"]

logger = logging.getLogger(__name__)

# These errors come from code, such as a user's class, rather than from a value in the config.
_CODE_ERRORS = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError)


def build(section: Any, name: str) -> Any:
    """Instantiate a part of a LazyConfig, as Detectron2's `instantiate`.

    Args:
        section: what to instantiate.
        name: its key, for the message.

    Raises:
        ConfigError: it cannot be built; names the innermost section that cannot, and the key where
            the reason begins with an argument. It is raised from the error itself; of one in code
            the message has file and line, and the log the traceback.
    """
    try:
        arguments: Any = section
        if isinstance(section, DictConfig) and "_target_" in section:
            arguments = {
                key: build(section[key], f"{name}.{key}") for key in map(str, section.keys())
            }
        elif isinstance(section, ListConfig):
            items = [build(item, f"{name}.{index}") for index, item in enumerate(section)]
            arguments = ListConfig(items, flags={"allow_objects": True})
        return instantiate(arguments)
    except UserError:
        raise
    except Exception as error:  # a value of the wrong type can fail anywhere, and in any way
        reason = f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            reason = str(error)
        elif isinstance(error, (AssertionError, KeyError, ValueError)) and " " in str(error):
            reason = _with_key(str(error.args[0]), section, name)
        if isinstance(error, _CODE_ERRORS):
            logger.debug("The config's %s cannot be built:", name, exc_info=True)
            reason += f" ({origin(error)})"
        reason = " ".join(reason.split())
        raise ConfigError(f"The config's {name} cannot be built: {reason}") from error


def origin(error: BaseException) -> str:
    """File and line that an error comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _with_key(reason: str, section: Any, name: str) -> str:
    """A reason that begins with an argument, with the key that sets it in its place."""
    argument = re.match(r"\w+", reason)
    if not argument or not isinstance(section, DictConfig) or argument[0] not in section:
        return reason
    key = f"{name}.{argument[0]}"
    if OmegaConf.is_interpolation(section, argument[0]):  # to the one that has the value
        node: Any = section._get_node(argument[0])
        key = node._dereference_node()._get_full_key(None) or key
    return key + reason[argument.end() :]


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


def use_classes(cfg: DictConfig, provenance: Mapping[str, Any]) -> None:
    """Put a checkpoint's classes in place of what a config computes from the training data, which
    need not be here: the number and the names of the classes, and their order in data sets of
    `smca.data.register_coco`. So with the values that :func:`fit_to_data` found.

    Args:
        cfg: a LazyConfig.
        provenance: as of `smca.checkpoint.read_provenance`.
    """
    if isinstance(cfg.model.get("num_classes"), DictConfig) and "num_classes" in provenance:
        cfg.model.num_classes = provenance["num_classes"]
    for key in _fitted_keys(cfg):
        if key in provenance.get("fitted", {}):
            OmegaConf.update(cfg, key, provenance["fitted"][key], merge=False)
    if provenance.get("class_names"):
        _use_classes(cfg, list(provenance["class_names"]))


def fit_to_data(cfg: DictConfig) -> Dict[str, Any]:
    """Replace what a config computes from the training data with the functions of
    ``smca.data.fitted`` by the values, and log each.

    Args:
        cfg: a LazyConfig.

    Returns:
        The values by their keys. Checkpoints keep them, since the data need not be there later.

    Raises:
        DatasetError: there is a problem with the data.
    """
    values: Dict[str, Any] = {}
    keys = list(_fitted_keys(cfg))
    known, names = copy.deepcopy(cfg), "dataloader.train.dataset.names"
    if keys and isinstance(OmegaConf.select(cfg, names), DictConfig):
        # The data are registered once, not for each key.
        OmegaConf.update(known, names, build(OmegaConf.select(cfg, names), names), merge=False)
    for key in keys:
        values[key] = build(OmegaConf.select(known, key), key)
        logger.info("%s=%s follows from the training data.", key, values[key])
    for key, value in values.items():
        OmegaConf.update(cfg, key, value, merge=False)
    return values


def _fitted_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Keys whose values are calls of ``smca.data.fitted``."""
    for name in map(str, node if isinstance(node, DictConfig) else ()):
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        child, key = node[name], f"{prefix}{name}"
        target = child.get("_target_") if isinstance(child, DictConfig) else None
        if isinstance(target, str) and target.startswith("smca.data."):
            target = locate(target)
        if getattr(target, "__module__", None) == fitted.__name__:
            yield key
        else:
            yield from _fitted_keys(child, f"{key}.")


def _use_classes(cfg: DictConfig, names: Sequence[str]) -> None:
    for key in map(str, list(cfg.keys())):
        if OmegaConf.is_missing(cfg, key) or OmegaConf.is_interpolation(cfg, key):
            continue
        node = cfg[key]
        if not isinstance(node, DictConfig):
            continue
        target = node.get("_target_")
        if isinstance(target, str) and target.startswith("smca.data."):
            target = locate(target)
        if target is num_classes:
            cfg[key] = len(names)
        elif target is class_names:
            cfg[key] = names
        else:
            if target is register_coco:
                node.classes, node.categories_from = names, None
            _use_classes(node, names)
