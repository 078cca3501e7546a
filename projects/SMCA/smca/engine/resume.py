"""What a resumed training takes from its checkpoint, and what from its config."""

import logging
from typing import Any, Dict, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch

from smca.errors import CheckpointError

__all__ = ["check_groups", "keep_settings", "sample_of_old", "warn_of_change"]

logger = logging.getLogger(__name__)

# What a config says of an optimizer, and a checkpoint as well.
_OPTIMIZER_SETTINGS = {"lr", "weight_decay", "betas", "eps", "momentum"}


def check_groups(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Make sure that an optimizer has the groups of parameters that a checkpoint has.

    Args:
        optimizer: whose state is to be loaded.
        saved: the state in the checkpoint.

    Raises:
        CheckpointError: it has others.
    """
    sizes = [
        " and ".join(str(len(group["params"])) for group in groups)
        for groups in (saved["param_groups"], optimizer.param_groups)
    ]
    if sizes[0] != sizes[1]:
        raise CheckpointError(
            "The optimizer's groups of parameters (optimizer.params) are not those of the run, "
            f"they were {sizes[0]} parameters and are now {sizes[1]}: resume with the settings of "
            "its config.yaml, or start another run from its weights, with train.init_checkpoint."
        )


def keep_settings(
    optimizer: torch.optim.Optimizer, configured: Sequence[Mapping[str, Any]]
) -> None:
    """Undo that PyTorch's optimizers take their settings from a checkpoint, too.

    Args:
        optimizer: whose state was loaded.
        configured: its parameter groups as they were before.
    """
    changed: Dict[str, Tuple[Any, Any]] = {}
    for group, settings in zip(optimizer.param_groups, configured):
        for name in _OPTIMIZER_SETTINGS & settings.keys():
            key = "initial_lr" if name == "lr" else name  # which the schedule multiplies
            former, value = group.get(key, settings[name]), settings[name]
            # Pairs such as Adam's betas become lists in a config.
            if list(np.ravel(former)) != list(np.ravel(value)):
                group[key] = value
                changed.setdefault(f"the optimizer's {name}", (former, value))
    for name, (former, value) in sorted(changed.items()):
        warn_of_change(name, former, value)


def warn_of_change(name: str, former: Any, value: Any) -> None:
    """Say that a setting is not what it was."""
    logger.warning(
        "The run goes on, but not exactly: %s was %s when the checkpoint was written and is %s "
        "now.",
        name,
        former,
        value,
    )


def sample_of_old(state_dict: Dict[str, Any]) -> Optional[int]:
    """Where a checkpoint that does not say so is in the stream of data, or None."""
    if not state_dict.get("total_batch_size") or not state_dict.get("accumulate"):
        return None
    num_batches = (state_dict["iteration"] + 1) * state_dict["accumulate"]
    return num_batches * state_dict["total_batch_size"]
