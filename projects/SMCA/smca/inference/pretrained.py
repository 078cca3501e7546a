"""Published detectors: a folder or a repository on the Hugging Face Hub, with the weights as
``model.safetensors`` and what else inference needs in ``config.yaml``.

Reading one runs no code of its author: the weights are tensors only, and the config may build
nothing but parts of detectors."""

import contextlib
import importlib
import os
from types import ModuleType
from typing import Any, Dict, Iterator, Optional

import yaml
from detectron2.utils.registry import locate
from omegaconf import OmegaConf

from smca.config.build import build
from smca.errors import CheckpointError, ConfigError, UserError
from smca.modeling.weight_map import MAPS

CONFIG_NAME = "config.yaml"
WEIGHTS_NAME = "model.safetensors"

# Where the parts of a detector come from: modules that may define what a published config calls.
_PARTS = (
    "smca.modeling.",
    "smca.data.mapper.",
    "detectron2.modeling.",
    "detectron2.layers.",
    "detectron2.data.transforms.",
    "torch.nn.modules.",
)
_PART_KEYS = ("model", "augmentations")
_KEYS = (*_PART_KEYS, "image_format", "class_names", "category_ids", "weights")


def load_pretrained(name: str, revision: Optional[str] = None) -> Dict[str, Any]:
    """``weights`` ("model" or "ema") of a published detector, and the arguments of
    `smca.Predictor.from_model`. A folder or repository that is missing or cannot be read is a
    CheckpointError; a config of another kind, or with what is no part of a detector, a ConfigError.
    """
    safetensors = need_extra("safetensors.torch")
    folder = name if os.path.isdir(name) else _download(name, revision)
    config, weights = (os.path.join(folder, file) for file in (CONFIG_NAME, WEIGHTS_NAME))
    for path in (config, weights):
        if not os.path.isfile(path):
            best = os.path.join(name, "model_best.pth")
            advice = f"give {best}" if os.path.isfile(best) else "tools/publish.py writes one"
            raise CheckpointError(
                f"{name} is no published detector, {os.path.basename(path)} is not in it: {advice}."
            )
    published = _read_config(config)
    parts = OmegaConf.create({key: published[key] for key in _PART_KEYS})
    model, augmentations = (build(parts[key]) for key in _PART_KEYS)
    try:
        model.load_state_dict(safetensors.load_file(weights))
    except Exception as error:  # SafetensorError is no type of Python's own errors
        raise CheckpointError(f"{weights} cannot be read or does not fit: {error}") from error
    others = {key: published[key] for key in _KEYS}
    return {**others, "model": model, "augmentations": augmentations}


def need_extra(module: str, extra: str = "publish") -> ModuleType:
    """A module of an extra, or a UserError if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise UserError(
            f"{package} is not installed: run pip install {package}, or install this package with "
            f"the extra '{extra}'."
        ) from error


def _download(name: str, revision: Optional[str]) -> str:
    """The folder of a repository's copy on this machine."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:  # which no repository's name is
        raise CheckpointError(f"The folder {name} does not exist.")
    hub = need_extra("huggingface_hub")
    try:
        return hub.snapshot_download(
            name, revision=revision, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]
        )
    except Exception as error:  # of huggingface_hub, httpx and the system
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} is no folder, and cannot be had from the Hugging Face Hub: {reason}"
        ) from error


def _read_config(path: str) -> Dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            published = yaml.safe_load(file)
    except (OSError, UnicodeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{path} cannot be read as plain YAML: {reason}") from error
    absent = set(_KEYS) - set(published if isinstance(published, dict) else ())
    if absent:
        names = ", ".join(sorted(absent))
        raise ConfigError(f"{path} is no published detector's config, it lacks {names}.")
    check_parts(published, path)
    return published


def check_parts(value: Any, path: str) -> None:
    """Raise unless all that a config calls is defined where parts of detectors are. What counts is
    the function or class itself, for its name may lead through any module that one imports."""
    for name in _targets(value):
        target = None
        if str(name).startswith((*_PARTS, "smca.data.")):
            with contextlib.suppress(Exception):  # there is no such thing
                target = locate(name)
        if not f"{getattr(target, '__module__', '')}.".startswith(_PARTS):
            raise ConfigError(
                f"{path} calls {name}, which is refused: only parts of detectors of smca, "
                "detectron2 and torch.nn are built."
            )


def _targets(value: Any) -> Iterator[Any]:
    """All that a config calls."""
    if isinstance(value, dict):
        if "_target_" in value:
            yield value["_target_"]
        if str(value.get("map", "fixed")) not in MAPS:  # which `Modulation` imports by its path
            yield value["map"]
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _targets(item)
