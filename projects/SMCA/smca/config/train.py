"""The ``train`` section of a config: which values its keys may have, and the device it names."""

from typing import Any, Mapping

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from smca.config.schema import (
    SECTION,
    TRUE_OR_FALSE,
    Kind,
    check_value,
    number,
    or_null,
    text,
    whole_number,
)
from smca.errors import ConfigError

__all__ = ["AMP_DTYPES", "WRITERS", "check_early_stopping", "check_train", "resolve_device"]

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
WRITERS = ("wandb", "mlflow")


def _are_writers(value: Any) -> bool:
    return isinstance(value, ListConfig) and all(x in WRITERS or _is_call(x) for x in value)


# Of each key what its value may be; there may be other keys.
_TRAIN = {
    "output_dir": Kind("the path of a folder", lambda v: isinstance(v, str) and v != ""),
    "init_checkpoint": Kind("a path, a URL or ''", lambda v: v is None or isinstance(v, str)),
    "max_iter": whole_number(least=1),
    "device": text("auto, cpu, cuda or another device of PyTorch"),
    # The number of the process is added to it.
    "seed": whole_number(below=2**31, words="a whole number below 2 ** 31"),
    "amp": {
        "enabled": TRUE_OR_FALSE,
        "dtype": Kind(" or ".join(AMP_DTYPES), lambda v: v in list(AMP_DTYPES)),
    },
    "accumulate": whole_number(least=1),
    "clip_grad_norm": or_null(number("a number of at least 0", least=0)),
    "skip_nonfinite": whole_number(least=0),
    "early_stopping": whole_number(least=0),
    "model_ema": {
        "enabled": TRUE_OR_FALSE,
        "decay": number("a number in [0, 1)", least=0, below=1),
    },
    "compile": TRUE_OR_FALSE,
    "checkpointer": {
        "period": whole_number(least=1),
        "max_to_keep": or_null(whole_number(least=1)),
    },
    "best_metric": text("the name of a metric, such as bbox/AP"),
    "eval_period": whole_number(least=0),
    "log_period": whole_number(least=1),
    "num_pictures": whole_number(least=0),
    "writers": Kind(f"a list of {' and '.join(WRITERS)}, or of calls", _are_writers),
    "hooks": Kind("a list of calls", lambda v: isinstance(v, ListConfig) and all(map(_is_call, v))),
    "fast_dev_run": TRUE_OR_FALSE,
}


def check_train(train: DictConfig) -> None:
    """
    Check the values of the config's ``train`` section.

    Raises:
        ConfigError: a key is absent, or its value is not possible.
    """
    _check(train, _TRAIN, "train")


def check_early_stopping(train: DictConfig) -> None:
    """
    Make sure that a training has the evaluations that end it early.

    Raises:
        ConfigError: it has none.
    """
    patience = train.early_stopping
    if patience and train.eval_period == 0:
        raise ConfigError(
            f"train.early_stopping={patience} counts evaluations, of which train.eval_period=0 "
            "makes none: set train.eval_period to the iterations from one to the next, or "
            "train.early_stopping=0."
        )


def _check(section: DictConfig, kinds: Mapping[str, Any], name: str) -> None:
    for key, kind in kinds.items():
        full_name = f"{name}.{key}"
        if OmegaConf.is_missing(section, key):  # which a training is told before
            continue
        if key not in section:
            raise ConfigError(f"The config lacks {full_name}: start from configs/common/train.py.")
        if _is_call(section[key]):  # computed from the data, and checked then
            continue
        if isinstance(kind, Kind):
            check_value(full_name, section[key], kind)
        else:
            check_value(full_name, section[key], SECTION)
            _check(section[key], kind, full_name)


def _is_call(value: Any) -> bool:
    return isinstance(value, DictConfig) and "_target_" in value


def resolve_device(name: str, key: str = "train.device") -> torch.device:
    """
    Args:
        name: "auto" or a PyTorch device.
        key: what names it in the config.

    Returns:
        The device of this process; for "auto", a GPU if there is one, else the CPU.

    Raises:
        ConfigError: there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Which GPUs there are can be asked without occupying memory on one.
            is_there = (device.index or 0) < torch.cuda.device_count()
        else:
            torch.empty(0, device=device)
            is_there = device.type != "meta"  # whose tensors have no values
    except (RuntimeError, AssertionError, NotImplementedError):
        is_there = False
    if not is_there:
        raise ConfigError(f"{key}={name} cannot be used on this machine: take auto or cpu.")
    return device
