"""The configs that come with this package, by name."""

import importlib.resources
import os
from pathlib import Path
from typing import Dict, List

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from smca.errors import ConfigError, did_you_mean


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
