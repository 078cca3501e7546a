"""What a LazyConfig's sections build, with errors that say which section it was."""

import copy
import logging
import re
import traceback
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from smca.data import class_names, fitted, num_classes, register_coco
from smca.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

# These errors come from code, such as a user's class, rather than from a value in the config.
_CODE_ERRORS = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError)


def build(section: Any, name: str) -> Any:
    """Instantiate a section of a LazyConfig, whose key is `name`, as Detectron2's `instantiate`.

    Raises:
        ConfigError: it cannot be built. The message names the innermost section that cannot, or
            the key of the argument that the reason begins with, and file and line of an error in
            code, whose traceback is in the log.
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
    """The config's model, on the device that ``train.device`` names."""
    return build(cfg.model, "model").to(cfg.train.device)


def dataset_names(cfg: DictConfig, split: str) -> List[str]:
    """Names of the config's data sets in Detectron2's catalog for "train" or "test"; none where the
    config calls a function for them, whose files need not be here."""
    key = f"dataloader.{split}.dataset.names"
    names = OmegaConf.select(cfg, key, default=None, throw_on_resolution_failure=False)
    if isinstance(names, DictConfig):
        return []
    return [names] if isinstance(names, str) else list(names or [])


def use_classes(cfg: DictConfig, provenance: Mapping[str, Any]) -> None:
    """Put what `smca.checkpoint.read_provenance` says in place of what a config computes from the
    training data, which need not be here: the number and the names of the classes, and their order
    in data sets of `smca.data.register_coco`; and the values that :func:`fit_to_data` found."""
    if isinstance(cfg.model.get("num_classes"), DictConfig) and "num_classes" in provenance:
        cfg.model.num_classes = provenance["num_classes"]
    names, values = list(provenance.get("class_names") or []), provenance.get("fitted", {})
    for key, target in _calls_of_data(cfg):
        if key in values and _is_fitted(target):
            OmegaConf.update(cfg, key, values[key], merge=False)
        elif names and target is num_classes:
            OmegaConf.update(cfg, key, len(names), merge=False)
        elif names and target is class_names:
            OmegaConf.update(cfg, key, names, merge=False)
        elif names and target is register_coco:
            new = {"classes": names, "categories_from": None}
            OmegaConf.update(cfg, key, new, merge=True, force_add=True)


def fit_to_data(cfg: DictConfig, known: Optional[Mapping[str, Any]] = None) -> Dict[str, Any]:
    """Replace what a config computes from the training data with the functions of
    ``smca.data.fitted`` by the values, and log and return these by their keys. Checkpoints keep
    them: those of a training that goes on are `known`, though its data may have changed."""
    values: Dict[str, Any] = {}
    known = known or {}
    source, names = copy.deepcopy(cfg), "dataloader.train.dataset.names"
    for key in [key for key, target in _calls_of_data(cfg) if _is_fitted(target)]:
        if key not in known and isinstance(OmegaConf.select(source, names), DictConfig):
            # The data are registered once, not for each key.
            registered = build(OmegaConf.select(source, names), names)
            OmegaConf.update(source, names, registered, merge=False)
        values[key] = known[key] if key in known else build(OmegaConf.select(source, key), key)
        OmegaConf.update(cfg, key, values[key], merge=False)
        logger.info("%s=%s follows from the training data.", key, values[key])
    return values


def _is_fitted(target: Any) -> bool:
    return target.__module__ == fitted.__name__


def _calls_of_data(node: Any, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Keys of the calls of functions of `smca.data` in a config, and these functions. A value may
    be replaced while this runs."""
    for name in map(str, list(node) if isinstance(node, DictConfig) else ()):
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        target = node[name].get("_target_") if isinstance(node[name], DictConfig) else None
        if isinstance(target, str) and target.startswith("smca.data."):
            target = locate(target)
        if str(getattr(target, "__module__", None)).startswith("smca.data."):
            yield f"{prefix}{name}", target
        yield from _calls_of_data(node[name], f"{prefix}{name}.")
