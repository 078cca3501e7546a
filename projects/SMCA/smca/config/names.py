"""The configs that come with this package, by name."""

import builtins
import importlib.util
import os
from pathlib import Path
from typing import List

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from smca.errors import ConfigError, did_you_mean

__all__ = ["find_config_file", "get_config", "get_config_file", "list_configs", "load_file"]


def _folders() -> List[str]:
    """The folders of this package's configs, in the repository or in the installation. The configs
    themselves build on this room."""
    spec = importlib.util.find_spec("smca.configs")
    return list(spec.submodule_search_locations or []) if spec else []


def list_configs() -> List[str]:
    """Names of all configs, for instance ``smca_r50_50ep`` and ``ablations/head_shared``."""
    names = set()
    for folder in map(Path, _folders()):
        for path in folder.rglob("*.py"):
            name = path.relative_to(folder).with_suffix("").as_posix()
            if path.stem != "__init__" and not name.startswith("common/"):
                names.add(name)
    return sorted(names)


def get_config_file(name: str) -> str:
    """The path of a config's file, in the repository or in the installed package.

    Args:
        name: of a config, with or without ``.py``.

    Raises:
        ConfigError: there is no such config.
    """
    name = name.removesuffix(".py")
    known = list_configs()
    if name not in known:
        raise ConfigError(f"There is no config {name}{did_you_mean(name, known)}")
    candidates = [Path(folder, f"{name}.py") for folder in _folders()]
    return str(next(path for path in candidates if path.is_file()))


def find_config_file(text: str) -> str:
    """The path of the config file that a command line names by its path, or by the name of one of
    this package's configs.

    Raises:
        ConfigError: there is no such config.
    """
    is_name = text.removesuffix(".py") in list_configs() or (text != "" and not Path(text).suffix)
    return get_config_file(text) if is_name and not os.path.isfile(text) else text


def get_config(name: str) -> DictConfig:
    """The LazyConfig of that name.

    Args:
        name: of a config, with or without ``.py``.

    Raises:
        ConfigError: there is no such config.
    """
    return load_file(get_config_file(name))


def load_file(config_file: str) -> DictConfig:
    """``LazyConfig.load``, and ``train.output_dir`` after the config's name where it has none:
    ``output/smca_r50_50ep``, ``output/ablations/head_shared``.
    """
    importer = builtins.__import__
    try:
        cfg = LazyConfig.load(config_file)
    finally:
        builtins.__import__ = importer  # where a config fails, Detectron2 leaves its own
    if isinstance(cfg.get("train"), DictConfig) and not cfg.train.get("output_dir"):
        cfg.train.output_dir = f"output/{_name(config_file)}"
    return cfg


def _name(config_file: str) -> str:
    """The name as in :func:`list_configs`; the file's own if it is not one of this package's."""
    path = Path(config_file).resolve().with_suffix("")
    for folder in _folders():
        if path.is_relative_to(Path(folder).resolve()):
            return path.relative_to(Path(folder).resolve()).as_posix()
    return path.name
