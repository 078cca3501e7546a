"""docs/architecture.md against the package: names that exist, files that are there, imports."""

import importlib
import operator
import re

import pytest

from helpers import ROOT
from test_structure import IMPORTS, room_of

DOCUMENT = ROOT / "docs" / "architecture.md"
PACKAGE = ROOT / "projects" / "SMCA" / "smca"
TEXT = DOCUMENT.read_text(encoding="utf-8")
# The file and the names of a row: | ... | `modeling/file.py` | `a`, `b` |
ROWS = re.findall(r"^\|.*\| `([\w/]+\.py)` \| (.+) \|$", TEXT, re.MULTILINE)
# A folder and those that it may import: | `folder` | ... | `a`, `b` |
ROOMS = dict(
    re.findall(r"^\| `(\w+)` \|.*\| (.+) \|$", TEXT.partition("## Folders")[2], re.MULTILINE)
)


@pytest.mark.parametrize("file, names", ROWS)
def test_every_name_in_the_tables_exists(file, names):
    module = importlib.import_module(f"smca.{file.removesuffix('.py').replace('/', '.')}")
    names = re.findall(r"`([^`]+)`", names)
    assert names
    for name in names:
        operator.attrgetter(name)(module)


def test_every_file_of_the_model_is_in_the_tables():
    files = {f"modeling/{path.name}" for path in (PACKAGE / "modeling").glob("*.py")}
    assert {file for file, _ in ROWS} >= files - {"modeling/__init__.py"}


def test_every_room_has_its_row():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"configs"}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "version"}
    assert set(ROOMS) == rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_document_allows(room):
    modules = [module for module in IMPORTS if f"{module}.".startswith(f"smca.{room}.")]
    named = {other for module in modules for other in IMPORTS[module]}
    rooms = {room_of(other) for other in named} - {room, "version"}
    allowed = set(re.findall(r"`(\w+)`", ROOMS[room]))
    assert rooms <= allowed <= set(list(ROOMS)[: list(ROOMS).index(room)])  # which stand above it
