"""Configs and their models by name, as in ``detectron2.model_zoo``."""

from typing import Optional

import torch
from detectron2.config import instantiate
from torch import nn

from smca.config import get_config, get_config_file, list_configs, load_config

__all__ = ["get", "get_config", "get_config_file", "list_configs"]


def get(name: str, device: Optional[str] = None) -> nn.Module:
    """The model of the config of that name with random weights, in training mode as in Detectron2,
    on a device. None: a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such config, or its model follows from data.
    """
    model = instantiate(load_config(get_config_file(name), needed=["model"]).model)
    return model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
