"""Configs: loading LazyConfigs with overrides, what they build, and the yacs way to them."""

from .build import build, build_model, dataset_names, fit_to_data, use_classes
from .lazy import (
    find_config_file,
    get_config,
    get_config_file,
    list_configs,
    load_config,
    quoted,
    require_values,
)
from .train import AMP_DTYPES, TrainConfig, amp_dtype, check_train, resolve_device
from .yacs import add_smca_config
