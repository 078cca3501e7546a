"""The ``train`` section of a config: its keys with their types and defaults, and the device."""

import logging
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Callable, Dict, List, Optional, cast

import torch
from omegaconf import DictConfig, OmegaConf, ValidationError

from smca.config.build import words_for
from smca.errors import ConfigError

logger = logging.getLogger(__name__)

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def _limited(default: Any, words: str, accepts: Callable[[Any], bool]) -> Any:
    """A key with a default, and a limit to its values that `words` describe."""
    return field(default=default, metadata={"words": words, "accepts": accepts})


def _at_least(least: int, default: int) -> Any:
    return _limited(default, f"a whole number of at least {least}", lambda value: value >= least)


@dataclass
class Amp:
    enabled: bool = False
    dtype: str = _limited("bf16", " or ".join(AMP_DTYPES), AMP_DTYPES.__contains__)


@dataclass
class Average:
    enabled: bool = False
    decay: float = _limited(0.9997, "a number in [0, 1)", lambda value: 0 <= value < 1)


@dataclass
class Checkpoints:
    period: int = _at_least(1, default=5000)
    max_to_keep: Optional[int] = _limited(
        5, "null or a whole number of at least 1", lambda value: value is None or value >= 1
    )


@dataclass
class TrainConfig:
    """The settings of a training that are not part of the model, the data, the optimizer, or the
    schedule. Periods are in iterations (optimizer steps)."""

    # None: it becomes output/NAME after the config's file, such as output/smca_r50_50ep.
    output_dir: Optional[str] = _limited(None, "the path of a folder", bool)
    # Weights to start from: a detector, or a backbone (a path, URL or "detectron2://...").
    # "" starts from scratch.
    init_checkpoint: Optional[str] = ""
    max_iter: int = _at_least(1, default=90000)
    device: str = "auto"  # "auto": a GPU if there is one, else the CPU
    # Decides everything random. A negative seed is drawn once, and --resume keeps it.
    seed: int = _limited(0, "a whole number below 2 ** 31", lambda value: value < 2**31)
    amp: Amp = field(default_factory=Amp)  # mixed precision
    # Of matrix products in float32: "high" lets GPUs round them to TF32.
    float32_matmul_precision: str = _limited(
        "highest", "highest, high or medium", ("highest", "high", "medium").__contains__
    )
    accumulate: int = _at_least(1, default=1)  # batches whose gradients are averaged for a step
    clip_grad_norm: Optional[float] = _limited(  # None: off
        0.1, "null or a number of at least 0", lambda value: value is None or value >= 0
    )
    model_ema: Average = field(default_factory=Average)
    ddp: Dict[str, Any] = field(  # arguments of DistributedDataParallel
        default_factory=lambda: {
            "broadcast_buffers": False,
            "find_unused_parameters": False,
            "fp16_compression": False,
            "gradient_as_bucket_view": True,  # without a copy of the gradients
        }
    )
    compile: bool = False
    checkpointer: Checkpoints = field(default_factory=Checkpoints)
    best_metric: str = "bbox/AP"  # the checkpoint with the highest one is kept as model_best.pth
    eval_period: int = _at_least(0, default=5000)  # 0: only after the training
    # Evaluations in a row without a better best_metric that end the training. 0: off.
    early_stopping: int = _at_least(0, default=0)
    log_period: int = _at_least(1, default=20)
    # L(MyWriter)(...), beside TensorBoard, metrics.json, and log.txt, which are always written
    writers: List[Dict[str, Any]] = field(default_factory=list)
    # L(MyHook)(...), which come before the writers
    hooks: List[Dict[str, Any]] = field(default_factory=list)
    cudnn_benchmark: bool = False
    # A few steps, an evaluation on a few images and a checkpoint, in output_dir/fast_dev_run.
    fast_dev_run: bool = False


def check_train(train: DictConfig) -> None:
    """Check the values of the config's ``train`` section, and add the defaults of absent keys. A
    value may be a call, which is checked once it is computed. Other keys may hold anything."""
    _check(train, OmegaConf.structured(TrainConfig, flags={"allow_objects": True}), "train")


def _check(section: DictConfig, schema: DictConfig, section_name: str) -> None:
    defaults = cast(Dict[str, Any], OmegaConf.to_container(schema))
    for setting in fields(cast(Any, OmegaConf.get_type(schema))):
        name = setting.name
        if name not in section.keys():
            section[name] = defaults[name]
        if OmegaConf.is_missing(section, name):
            continue
        value, key = section[name], f"{section_name}.{name}"
        if isinstance(value, DictConfig) and "_target_" in value:
            continue
        if isinstance(value, DictConfig) and is_dataclass(setting.type):
            _check(value, schema[name], key)
            continue
        try:
            schema[name] = value  # converts a number that is given as a text
            is_possible = setting.metadata.get("accepts", lambda _: True)(schema[name])
        except ValidationError:
            is_possible = False
        if not is_possible:
            words = setting.metadata.get("words") or words_for(setting.type)
            raise ConfigError(f"{key} has to be {words}, it cannot be {value!r}.")
        if value != schema[name]:
            section[name] = schema[name]


def amp_dtype(name: str, device: torch.device) -> Optional[torch.dtype]:
    """The type of mixed precision by its name in `AMP_DTYPES`; None for "fp32". Warns of a GPU
    that only emulates the type."""
    dtype = AMP_DTYPES.get(name)
    if dtype == torch.bfloat16 and device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            logger.warning(
                "%s has no bfloat16: attention would be slow and take much memory. Take fp16.",
                torch.cuda.get_device_name(device),
            )
    return dtype


def resolve_device(name: str) -> torch.device:
    """The device of ``train.device``: "auto" (a GPU if there is one, else the CPU) or one of
    PyTorch's. A ConfigError says if it is not there."""
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
        raise ConfigError(f"train.device={name} cannot be used on this machine: take auto or cpu.")
    return device
