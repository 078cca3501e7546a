"""The configs that come with this package, by name."""

import difflib
from pathlib import Path
from typing import List

from detectron2.config import LazyConfig
from omegaconf import DictConfig

import smca.configs
from smca.errors import ConfigError

__all__ = ["get_config", "get_config_file", "list_configs"]


def list_configs() -> List[str]:
    """Names of all configs, for instance ``smca_r50_50ep`` and ``ablations/head_shared``."""
    names = set()
    for folder in map(Path, smca.configs.__path__):
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
        nearest = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {nearest[0]}?" if nearest else f"there are {', '.join(known)}."
        raise ConfigError(f"There is no config {name}; {hint}")
    candidates = [Path(folder, f"{name}.py") for folder in smca.configs.__path__]
    return str(next(path for path in candidates if path.is_file()))


def get_config(name: str) -> DictConfig:
    """The LazyConfig of that name.

    Args:
        name: of a config, with or without ``.py``.

    Raises:
        ConfigError: there is no such config.
    """
    return LazyConfig.load(get_config_file(name))
