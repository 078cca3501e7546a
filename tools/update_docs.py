#!/usr/bin/env python
"""Write the documentation that is made of the code and of results: docs/configuration.md, published
AP in configs/README.md, and on every page the tables between `<!-- table: ... -->` and
`<!-- end -->`.

    tools/update_docs.py           # write what is not as it should be
    tools/update_docs.py --check   # write nothing; exit code 1 if something is stale

Measured tables are those of a JSON file that the measuring tool wrote (tools/figures.py says how a
page names it); a number that is changed by hand in a page is stale.
"""

import argparse
import functools
import json
import re
import sys
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

from smca import model_zoo
from smca.errors import UserError, exit_code

from configuration_page import configuration_page
from figures import MARK, Table, markdown, read_json, with_tables

ROOT = Path(__file__).resolve().parent.parent

# ---- Tables of the convergence study


def final_means(study: str) -> Dict[str, tuple[str, str]]:
    """Of each run of the study's main comparison AP and AP50 at its end, means of the seeds that
    are finished.

    Raises:
        UserError: a run has none.
    """
    path = ROOT / "docs" / "convergence" / f"{study}.json"
    report = read_json(path)
    means = {}
    for name in report["comparisons"]["main"]:
        runs = [run for run in report["runs"] if run["name"] == name]
        finals = [run["final"] for run in runs if run["final"]]
        if not finals:
            raise UserError(f"{path} has no finished training of {name}.")
        ap, ap50 = (sum(final[key] for final in finals) / len(finals) for key in ("AP", "AP50"))
        means[name] = (f"{ap:.1f}", f"{ap50:.1f}")
    return means


def convergence_in_readme() -> str:
    """A row for each data set."""
    labels = {
        "shapes": "embedded shapes, 1,500 steps",
        "blood_cells": "292 photographs of blood cells, 1,000 steps",
    }
    means = {study: final_means(study) for study in labels}
    lines = [f"| AP (AP50) | {' | '.join(means['shapes'])} |", "|---" * 6 + "|"]
    for study, label in labels.items():
        cells = [f"{ap} ({ap50})" for ap, ap50 in means[study].values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


def convergence_in_its_page() -> str:
    """A row of AP and one of AP50 for each data set."""
    labels = {"shapes": "textured shapes, 1,500 steps", "blood_cells": "blood cells, 1,000 steps"}
    means = {study: final_means(study) for study in labels}
    lines = [f"| | {' | '.join(means['shapes'])} |", "| --- " * 6 + "|"]
    for study, label in labels.items():
        lines.append(f"| {label}: AP | {' | '.join(ap for ap, _ in means[study].values())} |")
        lines.append(f"| AP50 | {' | '.join(ap50 for _, ap50 in means[study].values())} |")
    return "\n".join(lines)


# ---- Published AP


class Published(NamedTuple):
    """A row of docs/published.json.

    Attributes:
        model: as tables call it; "ablation" for those that only configs/README.md lists.
        epochs: of the training.
        AP: on COCO val2017 in %: AP and, where published, AP50, AP75, APs, APm, APl.
        config: its name; "" where there is none.
        ours, paper: GFLOPs and parameters.
        in_readme: another name there; None: not there.
    """

    model: str
    epochs: int
    AP: List[float]
    config: str = ""
    ours: Sequence[str] = ("", "")
    paper: Sequence[str] = ("", "")
    in_readme: Optional[str] = ""

    @property
    def cells(self) -> List[str]:
        """Of AP, some empty."""
        return [str(value) for value in self.AP] + [""] * (6 - len(self.AP))


def published() -> List[Published]:
    """What the paper and the authors' repository say."""
    text = (ROOT / "docs" / "published.json").read_text()
    return [Published(**row) for row in json.loads(text)]


def rows_as_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """In Markdown; an empty cell is one space."""
    first, *others = [f"| {' | '.join(line)} |".replace("  ", " ") for line in [headers, *rows]]
    return "\n".join([first, "|---" * len(headers) + "|", *others])


def published_in_readme() -> str:
    """The main models."""
    headers = ["model", "epochs", "AP", "AP50", "AP75", "APs", "APm", "APl", "config"]
    rows = [
        [
            row.in_readme or row.model,
            str(row.epochs),
            *row.cells,
            f"[`{row.config}`](configs/{row.config}.py)" if row.config else "",
        ]
        for row in published()
        if row.in_readme is not None and row.model != "ablation"
    ]
    return rows_as_table(headers, rows)


def published_in_project() -> str:
    """All models, with their costs."""
    headers = ["model", "config", "epochs", "AP", "AP50", "AP75", "APs", "APm", "APl"]
    headers += ["GFLOPs ours / paper", "parameters ours / paper"]
    rows = []
    for row in published():
        if row.model != "ablation":
            costs = [f"{ours} / {paper}".strip() for ours, paper in zip(row.ours, row.paper)]
            costs = ["" if cost == "/" else cost for cost in costs]
            config = f"`{row.config}`" if row.config else ""
            rows.append([row.model, config, str(row.epochs), *row.cells, *costs])
    return rows_as_table(headers, rows)


def with_published_ap(page: str) -> str:
    """A page whose tables of configs have the published AP in their last column."""
    found = {row.config: row.cells[0] for row in published()}
    lines = []
    for line in (ROOT / page).read_text().split("\n"):
        match = re.match(r"\| `([\w/]+)\.py` \|.*\|(?= [\d.]*[ |]*$)", line)
        if match and match[1] in model_zoo.list_configs():
            line = f"{match[0]} {found.get(match[1], '')} |".replace("  ", " ")
        lines.append(line)
    return "\n".join(lines)


# ---- Tables of the comparison with others


def peers_in_readme() -> str:
    """How many times as fast as the official code, in float32, and with which part of its
    memory; from the ratios that docs/performance.md shows, which are peer over ours."""
    content = read_json(ROOT / "docs" / "figures" / "peers.json")
    rows = [dict(zip(content["columns"], row)) for row in content["rows"]]
    cells = []
    for row in rows:
        label, _, who = row["model"].rpartition(", ")
        if who == "official" and row["type"] == "float32" and row["time, peer / ours"]:
            memory = 1 / float(row["memory, peer / ours"])
            what = f"{row['task']}, {label.removeprefix('SMCA ')}, {row['size']}"
            speed = f"{float(row['time, peer / ours']):.1f} times"
            cells.append([what, speed, f"{memory:.0%}"])
    return markdown(Table(["", "as fast as the official code", "of its peak memory"], cells))


# ---- Pages


def filled(text: str, table_name: str, table_text: str) -> str:
    """A page's text with another table between its marks."""
    start, end = f"<!-- table: {table_name} -->\n", "\n<!-- end -->"
    before, mark, rest = text.partition(start)
    if not mark or end not in rest:
        raise UserError(f"No table between {start.strip()} and {end.strip()}: restore them.")
    return before + mark + table_text + end + rest.partition(end)[2]


# Of pages the tables that are put together here.
TABLES: Dict[str, Dict[str, Callable[[], str]]] = {
    "README.md": {
        "published": published_in_readme,
        "convergence": convergence_in_readme,
        "peers": peers_in_readme,
    },
    "projects/SMCA/README.md": {"published": published_in_project},
    "docs/convergence.md": {"convergence": convergence_in_its_page},
}


def page_with_tables(page: str) -> str:
    """A page with all its tables as their files have them.

    Raises:
        UserError: a mark names no table.
    """
    text = (ROOT / page).read_text(encoding="utf-8")
    try:
        for name, make in TABLES.get(page, {}).items():
            text = filled(text, name, make())
        return with_tables(ROOT, text)
    except UserError as error:
        raise UserError(f"{page}: {error}") from error


def pages() -> Dict[str, Callable[[], str]]:
    """By path what each page that is written here, in part or whole, should be."""
    found: Dict[str, Callable[[], str]] = {"docs/configuration.md": configuration_page}
    if (ROOT / "configs" / "README.md").is_file():
        found["configs/README.md"] = lambda: with_published_ap("configs/README.md")
    for pattern in ("README.md", "*/README.md", "*/*/README.md", "docs/*.md"):
        for path in sorted(ROOT.glob(pattern)):
            page = str(path.relative_to(ROOT))
            if page in TABLES or MARK.search(path.read_text(encoding="utf-8")):
                found[page] = functools.partial(page_with_tables, page)
    return found


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only say what is stale")
    check = parser.parse_args(argv).check
    stale = []
    for name, page in pages().items():
        path, text = ROOT / name, page()
        if not path.is_file() or path.read_text() != text:
            stale.append(name)
            if not check:
                path.write_text(text)
                print(f"Written: {name}")
    if check and stale:
        print(f"Stale: {', '.join(stale)}; run python tools/update_docs.py", file=sys.stderr)
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
