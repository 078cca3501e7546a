"""The ``train`` section of a config: which values its keys may have, and the device it names."""

import torch
from omegaconf import OmegaConf

from smca.errors import ConfigError

__all__ = ["AMP_DTYPES", "check_train", "resolve_device"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _is_int(value, low):
    return isinstance(value, int) and not isinstance(value, bool) and value >= low


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_bool(value):
    return isinstance(value, bool)


_TRAIN_RULES = {
    "output_dir": (lambda v: isinstance(v, str) and v, "the path of a folder"),
    "init_checkpoint": (lambda v: v is None or isinstance(v, str), "a path, a URL or ''"),
    "max_iter": (lambda v: _is_int(v, 1), "a whole number of at least 1"),
    "device": (lambda v: isinstance(v, str), "auto, cpu, cuda or another device of PyTorch"),
    "seed": (lambda v: _is_int(v, -(2**63)), "a whole number"),
    "amp.enabled": (_is_bool, "true or false"),
    "amp.dtype": (lambda v: v in AMP_DTYPES, " or ".join(AMP_DTYPES)),
    "accumulate": (lambda v: _is_int(v, 1), "a whole number of at least 1"),
    "clip_grad_norm": (
        lambda v: v is None or (_is_number(v) and v >= 0),
        "a number of at least 0, or null",
    ),
    "skip_nonfinite": (lambda v: _is_int(v, 0), "a whole number of at least 0"),
    "model_ema.enabled": (_is_bool, "true or false"),
    "model_ema.decay": (lambda v: _is_number(v) and 0 <= v < 1, "a number in [0, 1)"),
    "compile": (_is_bool, "true or false"),
    "checkpointer.period": (lambda v: _is_int(v, 1), "a whole number of at least 1"),
    "checkpointer.max_to_keep": (
        lambda v: v is None or _is_int(v, 1),
        "a whole number of at least 1, or null",
    ),
    "best_metric": (lambda v: isinstance(v, str), "the name of a metric, such as bbox/AP"),
    "eval_period": (lambda v: _is_int(v, 0), "a whole number of at least 0"),
    "log_period": (lambda v: _is_int(v, 1), "a whole number of at least 1"),
    "fast_dev_run": (_is_bool, "true or false"),
}
# Newer than configs that users may have saved.
_OPTIONAL = {"skip_nonfinite"}


def check_train(train):
    """
    Check the values of the config's ``train`` section.

    Raises:
        ConfigError: a key is absent, or its value is not possible.
    """
    absent = object()
    for key, (is_valid, kind) in _TRAIN_RULES.items():
        value = OmegaConf.select(train, key, default=absent)
        if value is absent and key in _OPTIONAL:
            continue
        if value is absent:
            raise ConfigError(f"The config lacks train.{key}: start from configs/common/train.py.")
        if not is_valid(value):
            raise ConfigError(f"train.{key} has to be {kind}, it cannot be {value!r}.")


def resolve_device(name):
    """
    Args:
        name (str): "auto" or a PyTorch device.

    Returns:
        torch.device: of this process; for "auto", a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        # Whether there is a GPU can be asked without occupying memory on it.
        is_there = device.type != "cuda" or torch.cuda.is_available()
        if device.type != "cuda":
            torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        is_there = False
    if not is_there:
        raise ConfigError(f"train.device={name} cannot be used on this machine: take auto or cpu.")
    return device
