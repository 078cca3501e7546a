"""Loading a LazyConfig, of this package by its name: overrides with their checks, and what is
missing."""

import importlib.resources
import inspect
import os
import re
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence

from detectron2.config import LazyConfig
from detectron2.utils.file_io import PathManager
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)
from yaml import YAMLError

from smca.config.build import calls_in, origin, require_type, signature_of, words_for
from smca.config.train import check_train
from smca.errors import ConfigError, did_you_mean

# The key of configs/fine_tune.py that names the config of the pretrained model.
_BASE = "base.config"
# What is not of hydra's syntax: quotes, references, lists.
_NO_SYNTAX = re.compile(r"(?!(null|true|false|\?\?\?)$)[^\"'\\{}$,]+", re.IGNORECASE)
_PATHS = ("data.", "train.output_dir", "train.init_checkpoint", _BASE)
_SECTIONS = ["model", "dataloader", "optimizer", "lr_multiplier", "train"]


def _config_files() -> Dict[str, Path]:
    """Paths by name, in the repository or in the installation."""
    folder = Path(str(importlib.resources.files("smca.configs")))
    files = {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in sorted(folder.rglob("*.py"))
        if path.stem != "__init__"
    }
    return {name: path for name, path in files.items() if not name.startswith("common/")}


def list_configs() -> List[str]:
    """Names of all configs, for instance ``smca_r50_50ep`` and ``ablations/head_shared``."""
    return sorted(_config_files())


def get_config_file(name: str) -> str:
    """The path of a config's file by its name, with or without ``.py``; a ConfigError names the
    nearest if there is none."""
    name, files = name.removesuffix(".py"), _config_files()
    if name not in files:
        raise ConfigError(f"There is no config {name}{did_you_mean(name, sorted(files))}")
    return str(files[name])


def find_config_file(text: str) -> str:
    """The path of the config file that a command line names by its path, or by the name of one of
    this package's configs."""
    is_name = text.removesuffix(".py") in _config_files() or (text != "" and not Path(text).suffix)
    return get_config_file(text) if is_name and not os.path.isfile(text) else text


def get_config(name: str) -> DictConfig:
    """The LazyConfig of that name, see :func:`get_config_file`."""
    return load_file(get_config_file(name))


def load_file(config_file: str) -> DictConfig:
    """``LazyConfig.load``, and ``train.output_dir`` after the config's name where it has none:
    ``output/smca_r50_50ep``, ``output/ablations/head_shared``.
    """
    cfg = LazyConfig.load(config_file)
    if isinstance(cfg.get("train"), DictConfig) and not cfg.train.get("output_dir"):
        own = {path.resolve(): name for name, path in _config_files().items()}
        path = Path(config_file).resolve()
        cfg.train.output_dir = f"output/{own.get(path, path.stem)}"
    return cfg


def load_config(
    config_file: str, overrides: Sequence[str] = (), needed: Optional[Sequence[str]] = None
) -> DictConfig:
    """A LazyConfig with overrides, checked.

    Where it has a ``base``, ``base.config=NAME`` takes the model and the sizes of images of
    another config.

    Args:
        config_file: path of a .py or .yaml LazyConfig, or the name of one of this package's. Its
            name also gives a ``train.output_dir`` that is not set: ``output/NAME``.
        overrides: texts ``key=value`` in hydra's syntax. The key has to be in the config, or be an
            argument of what the config calls there; ``+key=value`` adds any other.
        needed: keys that must have values, like all keys below them ("???" is no value). None: all
            keys. (A trained detector does not need the keys of its training.)

    Raises:
        ConfigError: names the file or the key, and the nearest valid key.
    """
    cfg = _load_file(find_config_file(config_file))
    base = OmegaConf.select(cfg, _BASE)
    # The base first, so that the other overrides change its model.
    for override in sorted(overrides, key=lambda text: not text.startswith(f"{_BASE}=")):
        _apply_override(cfg, override)
        if OmegaConf.select(cfg, _BASE) != base:
            base = OmegaConf.select(cfg, _BASE)
            _take_from_base(cfg, base)
    # An evaluation needs no training data.
    splits = [f"dataloader.{name}" for name in ("train", "test") if name in (cfg.dataloader or ())]
    _require_sections(cfg, [*_SECTIONS, *splits], config_file)
    require_values(cfg, needed, config_file)
    check_train(cfg.train)
    for key, target in calls_in(OmegaConf.masked_copy(cfg, "model")):
        if isinstance(target, type) and target.__module__ == "builtins":
            raise ConfigError(
                f"The class {target.__name__} of {key} stands in the config itself, where the "
                "trained detector does not find it: put it in a module and import it."
            )
    return cfg


def require_values(
    cfg: DictConfig, keys: Optional[Sequence[str]] = None, config_file: str = "The config"
) -> None:
    """Raise a ConfigError if a value of a config is missing or refers to one that is, or cannot be
    computed. `keys` are those of the values, which may be sections; None: all. The message calls
    the config `config_file`."""
    missing = list(dict.fromkeys(_missing(cfg, keys)))
    if missing:
        raise ConfigError(
            f"{config_file} needs values for {', '.join(missing)}: add "
            f"{' '.join(f'{key}=...' for key in missing)} to the command."
        )


def _take_from_base(cfg: DictConfig, name: str) -> None:
    """Take the model (but for its number of classes) and the mappers of images from another config,
    which is given by its name or path."""
    base = _load_file(find_config_file(name))
    base.model.num_classes = cfg.model.num_classes
    cfg.model = base.model
    for split in ("train", "test"):
        cfg.dataloader[split].mapper = base.dataloader[split].mapper


def quoted(text: str) -> str:
    """Quote a text for the value of an override, in which ``${...}`` is no reference."""
    return QuotedString(text.replace("${", r"\${"), Quote.double).with_quotes()


def _missing(node: DictConfig, keys: Optional[Sequence[str]], prefix: str = "") -> Iterator[str]:
    """Keys without a value, among `keys` or below them, and those that they refer to."""
    for name in map(str, node.keys()):
        key = f"{prefix}{name}"
        is_needed = keys is None or any(f"{key}.".startswith(f"{part}.") for part in keys)
        if not is_needed and not any(part.startswith(f"{key}.") for part in keys or ()):
            continue
        try:
            value = node[name]
        except MissingMandatoryValue:
            yield key
        except InterpolationToMissingValueError as error:
            yield str(error).splitlines()[0].rpartition(" ")[2]
        except OmegaConfBaseException as error:
            raise ConfigError(
                f"{key} cannot be computed from what it refers to: {str(error).splitlines()[0]}"
            ) from error
        else:
            if isinstance(value, DictConfig):  # also of another part that this one refers to
                yield from _missing(value, None if is_needed else keys, f"{key}.")


def _load_file(config_file: str) -> DictConfig:
    if not config_file:
        raise ConfigError(
            "No config given: add --config-file with a file from configs/ or a name such as "
            "custom_small."
        )
    if not PathManager.isfile(config_file):
        nearest = did_you_mean(Path(config_file).stem, list_configs())
        raise ConfigError(f"The config file {config_file} does not exist{nearest}")
    try:
        cfg = load_file(config_file)
    except Exception as error:  # a .py config is code, and can fail in any way
        reason = str(error.__cause__ or error)
        if not isinstance(error, (SyntaxError, ImportError, ValueError, YAMLError)):
            reason = f"{type(error).__name__}: {error} ({origin(error)})"
        raise ConfigError(f"{config_file} cannot be loaded: {' '.join(reason.split())}") from error
    _require_sections(cfg, _SECTIONS, config_file)
    return cfg


def _require_sections(cfg: Any, names: Sequence[str], config_file: str) -> None:
    cfg = cfg if isinstance(cfg, DictConfig) else OmegaConf.create()  # a file of something else
    found = {name: OmegaConf.select(cfg, name, throw_on_resolution_failure=False) for name in names}
    absent = [name for name in names if not isinstance(found[name], DictConfig)]
    if absent:
        raise ConfigError(
            f"{config_file} is no config for this command, it does not have the sections "
            f"{', '.join(absent)}: start from a file in configs/."
        )


def _apply_override(cfg: DictConfig, text: str) -> None:
    if text.startswith("-"):
        raise ConfigError(f"Option {text} has to stand before the first key=value.")
    readable = _with_quotes(text)
    try:
        override = OverridesParser.create().parse_override(readable)
        key, value = override.key_or_group, override.value()
    except HydraException as error:
        raise ConfigError(
            f"Override {text!r} cannot be read, write key=value (with quotes inside quotes for "
            f"special characters, '\"a b\"'): {str(error).splitlines()[0]}"
        ) from error
    if override.is_sweep_override():
        raise ConfigError(
            f"Override {text!r} gives several values: a list needs brackets, {key}=[a,b], and a "
            "text with a comma quotes inside quotes, '\"a,b\"'."
        )
    if not override.is_add():
        _check_override(cfg, key, value)
    try:
        if isinstance(value, list) and isinstance(OmegaConf.select(cfg, key), DictConfig):
            OmegaConf.update(cfg, key, None, merge=False)  # a list cannot be merged into a call
        LazyConfig.apply_overrides(cfg, [readable])
    except (KeyError, NotImplementedError, OmegaConfBaseException) as error:
        raise ConfigError(f"Override {text!r} is not possible: {error.args[0]}") from error


def _with_quotes(text: str) -> str:
    """An override of a path or of names with quotes, since hydra would take 2024_01 for a number;
    also any value with umlauts, which hydra does not take."""
    key, _, value = text.partition("=")
    is_list = value.startswith("[") and value.endswith("]")
    items = value[1:-1].split(",") if is_list else [value]
    may_be_syntax = value.isascii() and not key.removeprefix("+").startswith(_PATHS)
    if may_be_syntax or not all(map(_NO_SYNTAX.fullmatch, items)):
        return text
    value = ",".join(quoted(item.strip()) for item in items)
    return f"{key}=[{value}]" if is_list else f"{key}={value}"


def _check_override(cfg: DictConfig, key: str, value: Any) -> None:
    """Raise if `key` is unknown or `value` of another kind than the one it replaces."""
    if isinstance(value, dict):
        for name, item in value.items():
            _check_override(cfg, f"{key}.{name}", item)
        return
    node: Any = cfg
    for name in key.split("."):
        if name not in _names(node):
            known = list(dict.fromkeys(_all_keys(cfg)))
            last = key.rpartition(".")[2]
            known = [other for other in known if other.endswith(f".{last}")] or known
            raise ConfigError(f"The config has no key {key}{did_you_mean(key, known)}")
        node = _child(node, name)
        if node is None:  # a key without a value takes anything
            return
    # What is built of the config checks other types.
    if "${" not in str(value):
        if isinstance(node, bool):  # "no" is a text, and true
            require_type(value, bool, key)
        elif isinstance(node, DictConfig) and isinstance(value, (str, int, float)):
            kind = signature_of(node).return_annotation
            if "section" in words_for(kind):  # not for what a config computes, such as a size
                require_type(value, kind, key)


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
    arguments = signature_of(node).parameters.values()
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [*map(str, node), *(each.name for each in arguments if each.kind not in variable)]


def _all_keys(node: Any, prefix: str = "") -> Iterator[str]:
    for name in _names(node):
        yield prefix + name
        child = _child(node, name)
        if isinstance(child, (DictConfig, ListConfig)):
            yield from _all_keys(child, f"{prefix}{name}.")
