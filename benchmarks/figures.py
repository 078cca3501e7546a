"""Tables of measurements: as Markdown for a page, and as JSON."""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any, List, NamedTuple, Optional, Sequence


class Table(NamedTuple):
    """
    Attributes:
        columns: their titles.
        rows: of as many texts each.
    """

    columns: List[str]
    rows: List[List[str]]


def markdown(table: Table) -> str:
    """One line for each row, and no more spaces than needed."""
    lines = [table.columns, ["---"] * len(table.columns), *table.rows]
    return "\n".join(re.sub(r"\|  (?=\|)", "| ", f"| {' | '.join(line)} |") for line in lines)


def command_line(script: str, words: Sequence[str]) -> str:
    """What a user types for a tool (its `__file__`) with these words."""
    return shlex.join(["python", f"benchmarks/{Path(script).name}", *words])


def write_figures(
    path: str,
    command: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Optional[str]]],
    **more: Any,
) -> None:
    """Write a measured table.

    Args:
        path: of the JSON file; its folder is created if need be.
        command: that measured it, from the checkout's root.
        columns, rows: texts, None for an empty cell; rows may end early.
        more: what else the file shall hold, such as the measurements themselves.
    """
    filled = [[cell or "" for cell in row] + [""] * (len(columns) - len(row)) for row in rows]
    head = {"command": command, "date": time.strftime("%Y-%m-%d"), **more}
    text = json.dumps({**head, "columns": list(columns), "rows": []}, indent=1)
    lines = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in filled)
    text = text.replace('"rows": []', f'"rows": [\n  {lines}\n ]')
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text + "\n", encoding="utf-8")
