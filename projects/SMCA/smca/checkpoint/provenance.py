"""What a checkpoint says about itself."""

from typing import Any, Dict, Mapping, Optional

from detectron2.utils.file_io import PathManager
from torch import Tensor

from .files import peek
from .fine_tuning import has_class_rows

# Keys of a checkpoint's entry "smca", with the types of a value and of the items of a list.
_TYPES: Dict[str, Any] = {
    "config": (str, None),
    "fitted": (dict, None),
    "overrides": (list, str),
    "class_names": (list, str),
    "category_ids": (list, (int, str)),
}


def read_provenance(weights: Optional[str]) -> Dict[str, Any]:
    """:func:`provenance_of` a checkpoint's path or URL. It is empty for a file that cannot be read,
    of which loading it into the model gives a better error."""
    try:
        return provenance_of(peek(PathManager.get_local_path(weights)))
    except Exception:
        return {}


def provenance_of(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """What the content of a checkpoint says about itself.

    Returns:
        The keys that the file has of ``config`` (its name), ``overrides``, ``fitted`` (settings
        that followed from the training data, by their keys), ``class_names``, ``category_ids``
        (the ids of the classes in the training data's JSON), and ``num_classes``.
    """
    # A stranger's file may hold anything under these names.
    provenance, state = (
        value if isinstance(value, Mapping) else {}
        for value in (checkpoint.get("smca"), checkpoint.get("model"))
    )
    result: Dict[str, Any] = {
        name: provenance[name]
        for name, (type_, item_type) in _TYPES.items()
        if isinstance(provenance.get(name), type_)
        and (item_type is None or all(isinstance(x, item_type) for x in provenance[name]))
    }
    rows = next((state[name] for name in state if has_class_rows(name)), None)
    if isinstance(rows, Tensor) and rows.dim() > 0:
        result["num_classes"] = len(rows)
    return result
