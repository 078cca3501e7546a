"""What a checkpoint says about itself."""

from typing import Any, Dict, Optional

import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from .fine_tuning import has_class_rows

__all__ = ["read_provenance"]

# Keys of a checkpoint's entry "smca", with the type of a value, or of the items of a list.
_VALUES = {"config": str}
_LISTS = {"overrides": str, "class_names": str, "category_ids": int}


def read_provenance(weights: Optional[str]) -> Dict[str, Any]:
    """What a checkpoint says about itself.

    Args:
        weights: path or URL of the checkpoint.

    Returns:
        Those that it says of ``config``, its name; ``overrides``; ``class_names``, and
        ``category_ids``, the ids that they have in the training data's JSON; ``num_classes``. It
        is empty for a file of another origin or one that cannot be read, of which loading it into
        the model gives a better error.
    """
    try:
        path = PathManager.get_local_path(weights)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        provenance = dict(checkpoint.get("smca") or {})
        state = checkpoint.get("model", {})
        rows = next((state[name] for name in state if has_class_rows(name)), None)
    except Exception:
        return {}
    # A stranger's file may hold anything under these names.
    result: Dict[str, Any] = {
        name: provenance[name]
        for name, type_ in _VALUES.items()
        if isinstance(provenance.get(name), type_)
    }
    for name, type_ in _LISTS.items():
        value = provenance.get(name)
        if isinstance(value, list) and all(isinstance(item, type_) for item in value):
            result[name] = value
    if isinstance(rows, Tensor) and rows.dim() > 0:
        result["num_classes"] = len(rows)
    return result
