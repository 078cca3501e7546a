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
# Of a table's row, the link's text and target, and the names: | ... | [`file`](path) | `a`, `b` |
ROWS = re.findall(r"^\|.*\| \[`([^`]+)`\]\(([^)]+)\) \| (.+) \|$", TEXT, re.MULTILINE)
# Of a room its name and its text.
ROOMS = dict(
    re.findall(r"^### `(\w+)`\n(.*?)(?=^### |^Outside|\Z)", TEXT, re.MULTILINE | re.DOTALL)
)


def module_name(path):
    """What to import for a file of the package or of configs/."""
    for folder, package in ((PACKAGE, "smca"), (ROOT / "configs", "smca.configs")):
        if path.is_relative_to(folder):
            return ".".join([package, *path.relative_to(folder).with_suffix("").parts])
    raise AssertionError(f"{path} is no file of the package.")


@pytest.mark.parametrize("text, target, names", ROWS)
def test_every_name_in_the_tables_exists(text, target, names):
    path = (DOCUMENT.parent / target).resolve()
    assert path.is_file() and path.as_posix().endswith(text)
    module = importlib.import_module(module_name(path))
    names = re.findall(r"`([^`]+)`", names)
    assert names
    for name in names:
        operator.attrgetter(name)(module)


def test_every_file_of_the_model_is_in_the_tables():
    files = {f"modeling/{path.name}" for path in (PACKAGE / "modeling").glob("*.py")}
    assert {text for text, _, _ in ROWS} >= files - {"modeling/__init__.py"}


def test_every_room_has_its_paragraph():
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")} | {"configs"}
    rooms |= {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "version"}
    assert set(ROOMS) == rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_document_allows(room):
    modules = [module for module in IMPORTS if f"{module}.".startswith(f"smca.{room}.")]
    named = {other for module in modules for other in IMPORTS[module]}
    rooms = {room_of(other) for other in named if other != "smca"} - {room, "version"}
    assert rooms <= set(re.findall(r"`(\w+)`", ROOMS[room].split("May import:")[1]))
