"""Parameters that were renamed since the last release, so that its weights still load.

The table serves one release: an entry goes when the release after the renaming is out."""

import re
from typing import Any, Dict

__all__ = ["RENAMED", "rename_parameters"]

# Yesterday's name (a regular expression, searched for in the whole name) and today's.
RENAMED = {
    r"(decoder\.layers\.\d+)\.centre\.": r"\1.center.",
}


def rename_parameters(state_dict: Dict[str, Any]) -> Dict[str, Any]:
    """Translate yesterday's parameter names.

    Args:
        state_dict: weights by name, with or without a prefix such as ``module.``.

    Returns:
        The same weights in the same order, by today's names.
    """
    renamed = {}
    for name, value in state_dict.items():
        for pattern, replacement in RENAMED.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed
