"""Measured tables of the documentation: written by the tools that measure, as JSON, and rendered
from it alone.

A page has a table between two marks:

    <!-- table: docs/figures/models.json -->
    <!-- end -->

The file holds "columns", "rows" of texts, and the "command" that measured them. Marks may choose
columns, `docs/figures/x.json: s | MiB`, and of a study's report (compare_convergence.py) name
the comparison first, `docs/convergence/shapes.json main: run | AP`.
"""

import json
import re
import shlex
import time
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from smca.errors import UserError

MARK = re.compile(
    r"<!-- table: (?P<path>\S+\.json)(?: (?P<comparison>\w+))?(?:: (?P<columns>[^\n]+))? -->\n"
    r"(?P<body>.*?)<!-- end -->",
    re.DOTALL,
)


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


def chosen(table: Table, columns: Sequence[str]) -> Table:
    """Some columns of a table."""
    indices = [table.columns.index(name) for name in columns]
    return Table(list(columns), [[row[i] for i in indices] for row in table.rows])


def read_json(path: Path) -> Dict[str, Any]:
    """
    Raises:
        UserError: the file is missing or no JSON.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(f"{path} is no JSON file: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} has no table.")
    return content


def read_table(path: Path) -> Table:
    """The table of a file that `write_figures` wrote.

    Raises:
        UserError: it is another file, rows are of another length than the columns, or nothing says
            which command it is from.
    """
    content = read_json(path)
    columns, rows = content.get("columns"), content.get("rows")
    if not columns or not isinstance(rows, list) or not content.get("command"):
        raise UserError(f'{path} has no table: it needs "columns", "rows" and "command".')
    if any(len(row) != len(columns) for row in rows):
        raise UserError(f"{path} has rows of another length than its {len(columns)} columns.")
    return Table(columns, rows)


def study_tables(path: Path, comparison: str) -> List[Table]:
    """The tables of a comparison in a study's report, or of its claims.

    Raises:
        UserError: the report has no such comparison.
    """
    from convergence_report import evaluations, make_claims, make_table, read_report

    report = read_report(str(path))
    if comparison == "claims" and report.get("claims"):
        claims = make_claims(report)
        return [Table(list(claims.columns), claims.values.tolist())]
    if comparison not in report["comparisons"]:
        raise UserError(f"{path} has no comparison {comparison}.")
    names = report["comparisons"][comparison]
    rows = evaluations(report)
    trained = [name for name in names if (rows["name"] == name).any()]
    parts = make_table(rows, trained, report["target_ap"]).split("\n\n")
    tables = []
    for part in parts:
        if part.startswith("|"):
            head, _, *body = [
                [cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()
            ]
            tables.append(Table(head, body))
    return tables


def render(root: Path, path: str, comparison: Optional[str], columns: Optional[str]) -> str:
    """The table that a mark names, in Markdown.

    Raises:
        UserError: the file has no such table.
    """
    tables = study_tables(root / path, comparison) if comparison else [read_table(root / path)]
    if columns is None:
        return markdown(tables[0])
    names = [name.strip() for name in columns.split("|")]
    for table in tables:
        if set(names) <= set(table.columns):
            return markdown(chosen(table, names))
    raise UserError(f"{path} has no table with the columns {columns}.")


def with_tables(root: Path, text: str) -> str:
    """A page with each marked table as its file has it.

    Args:
        root: of the checkout, which paths in marks start from.
        text: of the page.
    """

    def replaced(match: "re.Match[str]") -> str:
        mark = match.group().partition("\n")[0]
        table = render(root, match["path"], match["comparison"], match["columns"])
        return f"{mark}\n{table}\n<!-- end -->"

    return MARK.sub(replaced, text)


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
