"""What a checkpoint says about itself."""

from typing import Any, Dict, Mapping, Optional

from detectron2.utils.file_io import PathManager
from torch import Tensor

from .files import peek
from .fine_tuning import has_class_rows

__all__ = ["provenance_of", "read_provenance"]

# Keys of a checkpoint's entry "smca", with the type of a value, or of the items of a list.
_VALUES = {"config": str}
_LISTS: Dict[str, Any] = {"overrides": str, "class_names": str, "category_ids": (int, str)}


def read_provenance(weights: Optional[str]) -> Dict[str, Any]:
    """What a checkpoint's file says about itself, as :func:`provenance_of`. It is empty for a file
    that cannot be read, of which loading it into the model gives a better error.

    Args:
        weights: path or URL of the checkpoint.
    """
    try:
        return provenance_of(peek(PathManager.get_local_path(weights)))
    except Exception:
        return {}


def provenance_of(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """What a checkpoint says about itself.

    Args:
        checkpoint: what its file holds.

    Returns:
        Those that it says of ``config``, its name; ``overrides``; ``fitted``, the settings that
        followed from the training data, by their keys; ``class_names``, and
        ``category_ids``, the ids that they have in the training data's JSON; ``num_classes``. It
        is empty for a file of another origin.
    """
    # A stranger's file may hold anything under these names.
    provenance, state = (
        value if isinstance(value, Mapping) else {}
        for value in (checkpoint.get("smca"), checkpoint.get("model"))
    )
    result: Dict[str, Any] = {
        name: provenance[name]
        for name, type_ in _VALUES.items()
        if isinstance(provenance.get(name), type_)
    }
    if isinstance(provenance.get("fitted"), Mapping):
        result["fitted"] = dict(provenance["fitted"])
    for name, type_ in _LISTS.items():
        value = provenance.get(name)
        if isinstance(value, list) and all(isinstance(item, type_) for item in value):
            result[name] = value
    rows = next((state[name] for name in state if has_class_rows(name)), None)
    if isinstance(rows, Tensor) and rows.dim() > 0:
        result["num_classes"] = len(rows)
    return result
