"""What a checkpoint says about itself."""

from typing import Any, Dict, Mapping, Optional

from detectron2.utils.file_io import PathManager

from .files import peek
from .fine_tuning import has_class_rows

_TYPES = dict(config=str, overrides=list, fitted=dict, class_names=list, category_ids=list)


def read_provenance(weights: Optional[str]) -> Dict[str, Any]:
    """:func:`provenance_of` a checkpoint's path or URL. It is empty for a file that cannot be read,
    of which loading it into the model gives a better error."""
    try:
        return provenance_of(peek(PathManager.get_local_path(weights)))
    except Exception:
        return {}


def provenance_of(checkpoint: Mapping[str, Any]) -> Dict[str, Any]:
    """What the content of a checkpoint says about itself: the keys that it has of ``config`` (its
    name), ``overrides``, ``fitted`` (settings that followed from the training data, by their keys),
    ``class_names``, ``category_ids`` (in the training data's JSON), and ``num_classes``."""
    said = checkpoint.get("smca")  # a stranger's file may hold anything under this name
    said = said if isinstance(said, dict) else {}
    result = {key: said[key] for key, kind in _TYPES.items() if isinstance(said.get(key), kind)}
    rows = next((x for name, x in checkpoint["model"].items() if has_class_rows(name)), None)
    if rows is not None:
        result["num_classes"] = len(rows)
    return result
