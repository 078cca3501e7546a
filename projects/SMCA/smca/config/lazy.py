"""Loading a LazyConfig: overrides with their checks, and what is missing."""

import inspect
from typing import Any, Iterator, List, Sequence

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from detectron2.utils.registry import locate
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from smca.config.names import get_config_file, load_file
from smca.config.schema import NUMBER, TRUE_OR_FALSE, Kind, check_value
from smca.config.train import check_train
from smca.errors import ConfigError, did_you_mean

__all__ = ["load_config", "quoted"]

# Of configs/fine_tune.py: another config, of the model to start from.
_BASE = "base.config"
_SECTIONS = ("model", "dataloader", "optimizer", "lr_multiplier", "train")


def load_config(config_file: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A LazyConfig with overrides, checked.

    Where it has a ``base``, ``base.config=NAME`` takes the model and the sizes of images of
    another config.

    Args:
        config_file: path of a .py or .yaml LazyConfig. Where a .py file leaves
            ``train.output_dir`` at its default, it becomes ``output/NAME``.
        overrides: ``key=value``, in hydra's syntax. The key has to be in the config, or be an
            argument of what the config calls there; ``+key=value`` adds any other.

    Raises:
        ConfigError: names the file or the key, and the nearest valid key.
    """
    cfg = _load_file(config_file)
    base = OmegaConf.select(cfg, _BASE)
    # The base first, so that the other overrides change its model.
    for override in sorted(overrides, key=lambda text: not text.startswith(f"{_BASE}=")):
        _apply_override(cfg, override)
        if OmegaConf.select(cfg, _BASE) != base:
            base = OmegaConf.select(cfg, _BASE)
            _take_from_base(cfg, base)
    _require_sections(cfg, _SECTIONS)
    # An evaluation needs no training data.
    splits = [name for name in ("train", "test") if name in cfg.dataloader]
    _require_sections(cfg.dataloader, splits, "dataloader.")
    missing = list(_missing_keys(cfg))
    if missing:
        raise ConfigError(
            f"{config_file} needs values for {', '.join(missing)}: add "
            f"{' '.join(f'{key}=...' for key in missing)} to the command."
        )
    _check_references(cfg)
    check_train(cfg.train)
    return cfg


def _take_from_base(cfg: DictConfig, name: str) -> None:
    """The model (but for its number of classes) and what happens to an image before it become those
    of another config, which is given by name or path."""
    base = _load_file(name if PathManager.isfile(name) else get_config_file(name))
    base.model.num_classes = cfg.model.num_classes
    cfg.model = base.model
    for split in ("train", "test"):
        cfg.dataloader[split].mapper = base.dataloader[split].mapper


def quoted(text: str) -> str:
    """For the value of an override: the syntax takes it as it is, but for ``${...}``."""
    return QuotedString(text, Quote.double).with_quotes()


def _missing_keys(node: DictConfig, prefix: str = "") -> Iterator[str]:
    """Keys whose value is "???". (OmegaConf's own search fails on references to such keys.)"""
    for name in map(str, node.keys()):
        if OmegaConf.is_missing(node, name):
            yield prefix + name
        elif not OmegaConf.is_interpolation(node, name) and isinstance(node[name], DictConfig):
            yield from _missing_keys(node[name], f"{prefix}{name}.")


def _check_references(node: DictConfig, prefix: str = "") -> None:
    """Raise if a value refers to what is not there, or computes from it what cannot be."""
    for name in map(str, node.keys()):
        try:
            value = node[name]
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{prefix}{name} cannot be computed from what it refers to: "
                f"{str(error).splitlines()[0]}"
            ) from error
        if isinstance(value, DictConfig) and not OmegaConf.is_interpolation(node, name):
            _check_references(value, f"{prefix}{name}.")


def _load_file(config_file: str) -> DictConfig:
    if not config_file:
        raise ConfigError("No config given: add --config-file with a file from configs/.")
    if not PathManager.isfile(config_file):
        raise ConfigError(f"The config file {config_file} does not exist.")
    try:
        cfg = load_file(config_file)
    except Exception as error:  # a .py config is code, and can fail in any way
        reason = str(error.__cause__ or error)
        if not isinstance(error, (SyntaxError, ImportError, ValueError, YAMLError)):
            reason = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{config_file} cannot be loaded: {reason}") from error
    absent = [name for name in _SECTIONS if not _is_section(cfg, name)]
    if absent:
        raise ConfigError(
            f"{config_file} is no config for this script, it does not define "
            f"{', '.join(absent)}: start from a file in configs/."
        )
    return cfg


def _require_sections(cfg: DictConfig, names: Sequence[str], prefix: str = "") -> None:
    for name in names:
        if not _is_section(cfg, name):
            raise ConfigError(f"{prefix}{name} has to be a section, as in configs/common.")


def _is_section(cfg: Any, name: str) -> bool:
    try:
        return isinstance(cfg, DictConfig) and isinstance(cfg.get(name), DictConfig)
    except (OmegaConfBaseException, TypeError):  # a reference to nothing; an empty file
        return False


def _apply_override(cfg: DictConfig, text: str) -> None:
    if text.startswith("-"):
        raise ConfigError(f"Option {text} has to stand before the first key=value.")
    try:
        override = OverridesParser.create().parse_override(text)
        key, value = override.key_or_group, override.value()
    except HydraException as error:
        raise ConfigError(
            f"Override {text!r} cannot be read, write key=value (with quotes inside quotes for "
            f"special characters, '\"a b\"'): {str(error).splitlines()[0]}"
        ) from error
    if override.is_delete():
        raise ConfigError(f"Override {text!r} would delete a key, which is not possible.")
    if not override.is_add():
        _check_override(cfg, key, value)
    try:
        LazyConfig.apply_overrides(cfg, [text])
    except (KeyError, OmegaConfBaseException) as error:
        raise ConfigError(f"Override {text!r} is not possible: {error.args[0]}") from error


def _check_override(cfg: DictConfig, key: str, value: Any) -> None:
    """Raise if `key` is unknown or `value` of another kind than the one it replaces."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_override(cfg, f"{key}.{name}", item)
        return
    *parents, name = key.split(".")
    node = cfg
    for parent in parents:
        if parent not in _names(node):
            raise _unknown_key(cfg, key)
        node = _child(node, parent)
        if node is None:  # a key without a value takes anything
            return
    if name not in _names(node):
        raise _unknown_key(cfg, key)
    _check_kind(key, _child(node, name), value)


def _child(node: Any, name: str) -> Any:
    if isinstance(node, DictConfig) and name in node.keys():
        return OmegaConf.select(node, name, throw_on_resolution_failure=False)
    if isinstance(node, ListConfig) and name.isdigit() and int(name) < len(node):
        return node[int(name)]
    return None


def _names(node: Any) -> List[str]:
    """Keys that may be set in a node: those it has, and arguments of what it calls."""
    if isinstance(node, ListConfig):
        return [str(index) for index in range(len(node))]
    if not isinstance(node, DictConfig):
        return []
    names = [str(name) for name in node.keys()]
    if "_target_" in names:
        target = _child(node, "_target_")
        try:
            target = locate(target) if isinstance(target, str) else target
        except Exception as error:  # of a module that cannot be imported, too
            reason = str(error).splitlines()[0]
            raise ConfigError(f"There is no _target_ {target}: {reason}") from error
        if callable(target):
            names += [
                name
                for name, parameter in inspect.signature(target).parameters.items()
                if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            ]
    return names


def _gives_number(node: DictConfig) -> bool:
    """Whether it is a call, such as of :func:`smca.data.num_classes`, that computes a number."""
    target = node.get("_target_")
    target = locate(target) if isinstance(target, str) else target
    return callable(target) and inspect.signature(target).return_annotation in (int, float)


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name in _names(node):
        yield prefix + name
        child = _child(node, name)
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _all_keys(child, f"{prefix}{name}.")


def _unknown_key(cfg: DictConfig, key: str) -> ConfigError:
    return ConfigError(f"The config has no key {key}{did_you_mean(key, set(_all_keys(cfg)))}")


def _check_kind(key: str, old: Any, new: Any) -> None:
    if new is None or old is None or (isinstance(new, str) and "${" in new):
        return
    if isinstance(old, bool):
        check_value(key, new, TRUE_OR_FALSE)
    elif isinstance(old, (int, float)) and isinstance(new, (str, bool)):
        check_value(key, new, NUMBER)
    elif isinstance(old, DictConfig) and _gives_number(old):
        check_value(key, new, NUMBER)
    elif isinstance(old, DictConfig):
        keys = ", ".join(map(str, old.keys()))
        check_value(key, new, Kind(f"a section with keys of its own ({keys})", lambda _: False))
