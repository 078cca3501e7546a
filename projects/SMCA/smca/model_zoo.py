"""Configs by name and their trained weights, as in ``detectron2.model_zoo``.

Trained weights are listed in ``model_zoo.json`` beside this file:

    {"smca_r50_50ep": {"url": "https://...", "sha256": "..."}}
"""

import hashlib
import json
from pathlib import Path
from typing import Dict, Optional

import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from smca.checkpoint import SMCACheckpointer
from smca.config import names
from smca.config.names import get_config_file, list_configs
from smca.errors import CheckpointError

__all__ = ["get", "get_checkpoint_url", "get_config", "get_config_file", "list_configs"]

_REGISTRY = Path(__file__).with_name("model_zoo.json")


def get_config(name: str, trained: bool = False) -> DictConfig:
    """
    Args:
        name: of a config, with or without ``.py``.
        trained: let ``train.init_checkpoint`` be the config's trained weights.

    Returns:
        The LazyConfig.

    Raises:
        ConfigError: there is no such config.
        CheckpointError: there are no trained weights of it.
    """
    config = names.get_config(name)
    if trained:
        config.train.init_checkpoint = get_checkpoint_url(name)
    return config


def get_checkpoint_url(name: str) -> str:
    """
    Args:
        name: of a config, with or without ``.py``.

    Raises:
        ConfigError: there is no such config.
        CheckpointError: there are no trained weights of it; says of which there are.
    """
    return _entry(name)["url"]


def get(name: str, trained: bool = False, device: Optional[str] = None) -> nn.Module:
    """
    Args:
        name: of a config, with or without ``.py``.
        trained: load its trained weights (downloaded once, their sha256 checked). False: random
            weights.
        device: of the model. None: a GPU if there is one, else the CPU.

    Returns:
        The model, in training mode as in Detectron2.

    Raises:
        ConfigError: there is no such config.
        CheckpointError: there are no trained weights of it, they cannot be downloaded, or the
            file is not the one that was published.
    """
    config = get_config(name)
    path = _download(name) if trained else None
    model = instantiate(config.model)
    if path is not None:
        SMCACheckpointer(model, need_detector=True).load(path)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _entry(name: str) -> Dict[str, str]:
    get_config_file(name)
    registry = json.loads(_REGISTRY.read_text())
    name = name.removesuffix(".py")
    if name not in registry:
        there_are = f"there are of {', '.join(sorted(registry))}" if registry else "none are yet"
        raise CheckpointError(f"No trained weights of {name} are published ({there_are}).")
    return registry[name]


def _download(name: str) -> str:
    """Path of the trained weights on this machine."""
    entry = _entry(name)
    try:
        path = PathManager.get_local_path(entry["url"])
        with open(path, "rb") as file:
            # hashlib.file_digest needs Python 3.11.
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
    except (OSError, AssertionError) as error:
        raise CheckpointError(f"{entry['url']} cannot be downloaded: {error}") from error
    if digest.hexdigest() != entry["sha256"]:
        raise CheckpointError(
            f"{path} is not the file that was published as {entry['url']} (its sha256 is "
            f"{digest.hexdigest()}, not {entry['sha256']}): delete it and try again."
        )
    return path
