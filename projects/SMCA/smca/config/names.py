"""The configs that come with this package, by name."""

import builtins
import os
from pathlib import Path
from typing import List

from detectron2.config import LazyConfig
from omegaconf import DictConfig

import smca.configs as configs
from smca.errors import ConfigError, did_you_mean

__all__ = ["find_config_file", "get_config", "get_config_file", "list_configs", "load_file"]

# Of configs/common/train.py.
_DEFAULT_OUTPUT_DIR = "output"


def list_configs() -> List[str]:
    """Names of all configs, for instance ``smca_r50_50ep`` and ``ablations/head_shared``."""
    names = set()
    for folder in map(Path, configs.__path__):
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
    candidates = [Path(folder, f"{name}.py") for folder in configs.__path__]
    return str(next(path for path in candidates if path.is_file()))


def find_config_file(text: str) -> str:
    """The config file that a command line means: the file of that path, else the config of that
    name, for an installation has no folder configs/ to name one in."""
    if not os.path.isfile(text) and text.removesuffix(".py") in list_configs():
        return get_config_file(text)
    return text


def get_config(name: str) -> DictConfig:
    """The LazyConfig of that name.

    Args:
        name: of a config, with or without ``.py``.

    Raises:
        ConfigError: there is no such config.
    """
    return load_file(get_config_file(name))


def load_file(config_file: str) -> DictConfig:
    """``LazyConfig.load``, and ``train.output_dir`` after the config's name where a .py file leaves
    it at its default: ``output/smca_r50_50ep``, ``output/ablations/head_shared``.
    """
    importer = builtins.__import__
    try:
        cfg = LazyConfig.load(config_file)
    finally:
        builtins.__import__ = importer  # where a config fails, Detectron2 leaves its own
    # A .yaml file is one that training wrote, with the folder that it was told.
    if config_file.endswith(".py") and "train" in cfg:
        if cfg.train.get("output_dir") == _DEFAULT_OUTPUT_DIR:
            cfg.train.output_dir = f"{_DEFAULT_OUTPUT_DIR}/{_name(config_file)}"
    return cfg


def _name(config_file: str) -> str:
    """Of one of this package's configs as in :func:`list_configs`, of others the file's."""
    path = Path(config_file).resolve().with_suffix("")
    for folder in configs.__path__:
        if path.is_relative_to(Path(folder).resolve()):
            return path.relative_to(Path(folder).resolve()).as_posix()
    return path.name
