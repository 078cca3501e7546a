"""A detector's weights for other classes and another number of queries."""

import re
from typing import Dict, List, Mapping, Sequence

from torch import Tensor

from smca.errors import some

_QUERIES = "query_embed.weight"
_CLASS_ROWS = re.compile(r"(.*\.)?(class_embed(\.\d+)?\.(weight|bias)|label_embed\.weight)")


def has_class_rows(name: str) -> bool:
    """Whether a weight of that name has a row for each class."""
    return bool(_CLASS_ROWS.fullmatch(name))


def adapt(
    weights: Dict[str, Tensor],
    initial: Mapping[str, Tensor],
    old_names: Sequence[str] = (),
    new_names: Sequence[str] = (),
) -> List[str]:
    """Fit a checkpoint's rows of classes and queries to a model.

    A class has the row of the same name. Without names on both sides all rows are kept if there
    are as many, else none. The first queries are kept, as many as both sides have. Whatever has no
    row in the checkpoint keeps its initial one.

    Args:
        weights: weights of the checkpoint, changed in place. Those whose rows have another length
            are left as they are.
        initial: weights of the model.
        old_names, new_names: names of the classes of both.

    Returns texts that say what is not kept; none if everything is.
    """
    rows = [key for key in initial if key in weights]
    rows = [key for key in rows if weights[key].shape[1:] == initial[key].shape[1:]]
    notes: List[str] = []
    for kind, keys, old, new in (
        ("classes", list(filter(has_class_rows, rows)), old_names, new_names),
        ("queries", [key for key in rows if key == _QUERIES], (), ()),
    ):
        num_old, num_new = (len(each[keys[0]]) if keys else 0 for each in (weights, initial))
        if len(old) != num_old or len(new) != num_new:
            are_same = kind == "queries" or num_old == num_new
            old = [str(row) for row in range(num_old if are_same else 0)]
            new = [str(row) for row in range(num_new)]
        known = {name: row for row, name in enumerate(old)}
        kept = {row: known[name] for row, name in enumerate(new) if name in known}
        for key in keys:
            values = initial[key].detach().clone()
            values[list(kept)] = weights[key][list(kept.values())].to(values)
            weights[key] = values
        anew = [name for row, name in enumerate(new) if row not in kept]
        if anew:
            notes.append(f"{len(anew)} of {num_new} {kind} start anew ({some(anew, 8)})")
        if len(kept) < num_old:
            notes.append(f"{num_old - len(kept)} of {num_old} old {kind} are left out")
    return notes
