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
    notes = []
    known_rows = [
        key
        for key in initial
        if key in weights and weights[key].shape[1:] == initial[key].shape[1:]
    ]
    class_rows = [key for key in known_rows if has_class_rows(key)]
    if class_rows:
        num_old, num_new = (len(rows[class_rows[0]]) for rows in (weights, initial))
        has_names = len(old_names) == num_old and len(new_names) == num_new
        if has_names or num_old != num_new:
            known = {name: row for row, name in enumerate(old_names)} if has_names else {}
            names = list(new_names) if has_names else [str(index) for index in range(num_new)]
            kept = {row: known[name] for row, name in enumerate(names) if name in known}
            for key in class_rows:
                weights[key] = _with_rows(initial[key], weights[key], kept)
            anew = [name for row, name in enumerate(names) if row not in kept]
            if anew:
                notes.append(f"{len(anew)} of {num_new} classes start anew ({some(anew, 8)})")
            if len(kept) < num_old:
                notes.append(f"{num_old - len(kept)} of {num_old} old classes are left out")
    if _QUERIES in known_rows:
        num_old, num_new = len(weights[_QUERIES]), len(initial[_QUERIES])
        kept = {row: row for row in range(min(num_old, num_new))}
        weights[_QUERIES] = _with_rows(initial[_QUERIES], weights[_QUERIES], kept)
        if num_new > num_old:
            notes.append(f"{num_new - num_old} of {num_new} queries start anew")
        elif num_new < num_old:
            notes.append(f"the last {num_old - num_new} of {num_old} queries are left out")
    return notes


def _with_rows(initial: Tensor, old: Tensor, kept: Mapping[int, int]) -> Tensor:
    """`initial` with the rows `kept` (new row: old row) from `old`."""
    rows = initial.detach().clone()
    if kept:
        rows[list(kept.keys())] = old[list(kept.values())].to(rows)
    return rows
