"""What a LazyConfig's sections build, with errors that say which section it was."""

import collections.abc
import contextlib
import copy
import inspect
import json
import logging
import re
import traceback
import types
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple, Union, get_args, get_origin

from detectron2.config import instantiate
from detectron2.utils.registry import locate
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from smca.data import class_names, fitted, num_classes, register_coco
from smca.errors import ConfigError, UserError

logger = logging.getLogger(__name__)

# These errors come from code, such as a user's class, rather than from a value in the config.
_CODE_ERRORS = (AttributeError, ImportError, NameError, NotImplementedError, SyntaxError)


def build(section: Any) -> Any:
    """Instantiate a section of a LazyConfig, as Detectron2's `instantiate`.

    Raises:
        ConfigError: it cannot be built. The message names the innermost section that cannot, or
            the key of the argument that the reason begins with, and file and line of an error in
            code, whose traceback is in the log.
    """
    try:
        arguments: Any = section
        if isinstance(section, DictConfig) and "_target_" in section:
            arguments = {key: build(section[key]) for key in map(str, section.keys())}
            if str(getattr(section._target_, "__module__", section._target_)).startswith("smca."):
                _check_types(arguments, section)
        elif isinstance(section, ListConfig):
            arguments = ListConfig(list(map(build, section)), flags={"allow_objects": True})
        return instantiate(arguments)
    except UserError:
        raise
    except Exception as error:  # a value of the wrong type can fail anywhere, and in any way
        if isinstance(arguments, dict):
            _check_types(arguments, section)
        name, reason = section._get_full_key(None), f"{type(error).__name__}: {error}"
        if isinstance(error, OSError):
            reason = str(error)
        elif isinstance(error, (AssertionError, KeyError, ValueError)) and " " in str(error):
            reason = str(error.args[0])
            argument = re.match(r"\w+", reason)
            if argument and isinstance(section, DictConfig) and argument[0] in section:
                reason = _key_of(argument[0], section) + reason[argument.end() :]
        if isinstance(error, _CODE_ERRORS):
            logger.debug("The config's %s cannot be built:", name, exc_info=True)
            reason += f" ({origin(error)})"
        reason = " ".join(reason.split())
        raise ConfigError(f"The config's {name} cannot be built: {reason}") from error


def origin(error: BaseException) -> str:
    """File and line that an error comes from."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{frame.filename}, line {frame.lineno}"


def _key_of(argument: str, section: DictConfig) -> str:
    """The key that sets an argument of a section."""
    if OmegaConf.is_interpolation(section, argument):  # to the one that has the value
        node: Any = section._get_node(argument)
        return node._dereference_node()._get_full_key(None) or section._get_full_key(argument)
    return section._get_full_key(argument)


def _check_types(arguments: Mapping[str, Any], section: DictConfig) -> None:
    """Raise where an argument is not of the type that the function's signature says."""
    for argument, parameter in signature_of(section).parameters.items():
        if argument in arguments and arguments[argument] is not parameter.default:
            require_type(arguments[argument], parameter.annotation, _key_of(argument, section))


def signature_of(section: DictConfig) -> inspect.Signature:
    """That of what a section calls, without types if they are of what is not imported. A class
    returns itself, and a section that calls nothing a dict."""
    target = OmegaConf.select(section, "_target_", throw_on_resolution_failure=False)
    if target is None:
        return inspect.Signature(return_annotation=dict)
    try:
        target = locate(target) if isinstance(target, str) else target
    except Exception as error:  # of a module that cannot be imported, too
        key, reason = section._get_full_key("_target_"), " ".join(str(error).split())
        raise ConfigError(f"There is no {key}={target}: {reason}") from error
    signature = inspect.Signature()
    with contextlib.suppress(TypeError, ValueError):  # functions written in C may have none
        signature = inspect.signature(target)
        with contextlib.suppress(Exception):  # annotations that are texts are code
            signature = inspect.signature(target, eval_str=True)
    return signature.replace(return_annotation=target) if isinstance(target, type) else signature


def require_type(value: Any, kind: Any, key: str) -> None:
    """Raise a ConfigError if the value of a key is not of an annotated type."""
    is_known = kind is not inspect.Signature.empty and not isinstance(kind, str)
    if is_known and not _fits(value, kind):
        raise ConfigError(f"{key} has to be {words_for(kind)}, it cannot be {value!r}.")


_WORDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}
_WORDS[type(None)] = "null"
_UNIONS, _LISTS = (Union, types.UnionType), (list, tuple, collections.abc.Sequence)


def words_for(kind: Any) -> str:
    """What a value of an annotated type is called."""
    items = get_args(kind)
    if get_origin(kind) in _UNIONS:
        return " or ".join(map(words_for, items))
    if get_origin(kind) in _LISTS:
        return f"a list of {words_for(items[0]).removeprefix('a ')}s"
    return _WORDS.get(kind, "a section")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a plain value, or a list of such, is of an annotated type; any other object is."""
    origin, items = get_origin(kind), get_args(kind)
    if origin in _UNIONS:
        return any(_fits(value, item) for item in items)
    is_list = isinstance(value, (list, tuple, ListConfig))
    if is_list and origin in _LISTS:
        return all(_fits(item, items[0]) for item in value)
    if kind is Any or not (is_list or value is None or isinstance(value, (str, int, float))):
        return True
    if value is None or is_list:
        return kind is type(None) if value is None else kind not in _WORDS
    if origin in _LISTS or (kind in (int, float) and isinstance(value, bool)):
        return False
    kind = origin or kind
    return not isinstance(kind, type) or isinstance(value, (int, float) if kind is float else kind)


def build_model(cfg: DictConfig) -> nn.Module:
    """The config's model, on the device that ``train.device`` names."""
    return build(cfg.model).to(cfg.train.device)


def dataset_names(cfg: DictConfig, split: str) -> List[str]:
    """Names of the config's data sets in Detectron2's catalog for "train" or "test"; none where the
    config calls a function for them, whose files need not be here."""
    key = f"dataloader.{split}.dataset.names"
    names = OmegaConf.select(cfg, key, default=None, throw_on_resolution_failure=False)
    if names is None or isinstance(names, DictConfig):
        return []
    return list(names) if isinstance(names, ListConfig) else [names]


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
            OmegaConf.update(cfg, key, _constant(names), merge=False)
        elif names and target is register_coco:
            for name, value in (("classes", _constant(names)), ("categories_from", None)):
                OmegaConf.update(cfg, f"{key}.{name}", value, merge=False, force_add=True)


def _constant(names: List[str]) -> Dict[str, str]:
    """A call that gives these names. OmegaConf would compute one such as "${a}", and miss "???"."""
    return {"_target_": "json.loads", "s": json.dumps(names).replace("$", r"\u0024")}


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
            registered = build(OmegaConf.select(source, names))
            OmegaConf.update(source, names, registered, merge=False)
        values[key] = known[key] if key in known else build(OmegaConf.select(source, key))
        OmegaConf.update(cfg, key, values[key], merge=False)
        logger.info("%s=%s follows from the training data.", key, values[key])
    return values


def _is_fitted(target: Any) -> bool:
    return target.__module__ == fitted.__name__


def _calls_of_data(cfg: DictConfig) -> Iterator[Tuple[str, Any]]:
    """Keys of the calls of functions of `smca.data` in a config, and these functions."""
    for key, target in calls_in(cfg):
        if isinstance(target, str) and target.startswith("smca.data."):
            target = locate(target)
        if str(getattr(target, "__module__", None)).startswith("smca.data."):
            yield key, target


def calls_in(node: Any, prefix: str = "") -> Iterator[Tuple[str, Any]]:
    """Keys of a config's calls, and what they call: itself, or its name. A value may be replaced
    while this runs."""
    for name in map(str, list(node) if isinstance(node, DictConfig) else ()):
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if isinstance(node[name], DictConfig) and "_target_" in node[name]:
            yield f"{prefix}{name}", node[name].get("_target_")
        yield from calls_in(node[name], f"{prefix}{name}.")
