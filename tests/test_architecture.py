"""docs/architecture.md against the package: names that exist, files that are there, imports."""

import ast
import importlib
import operator
import re

import pytest

from demo_cases import ROOT

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


def imports(source, package):
    """
    Args:
        source: of a module. package: the parts of its package's name, for relative imports.

    Yields:
        The name of an imported module or of something in it, and whether that is done at the top of
        the file.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else []
            base = [*base, *filter(None, [node.module])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node.col_offset == 0


def imported_rooms(room):
    """The (room, whether at the top) that the files of a room import."""
    folder = ROOT / "configs" if room == "configs" else PACKAGE / room
    files = folder.rglob("*.py") if folder.is_dir() else [folder.with_suffix(".py")]
    found = set()
    for file in files:
        package = module_name(file).split(".")[:-1]
        for name, at_top in imports(file.read_text(encoding="utf-8"), package):
            first, _, rest = name.partition(".")
            if first == "smca":
                found.add((rest.split(".")[0], at_top))
    return {(other, at_top) for other, at_top in found if other not in (room, "version", "")}


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
    allowed = ROOMS[room].split("May import:")[1]
    assert {other for other, _ in imported_rooms(room)} <= set(re.findall(r"`(\w+)`", allowed))


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_at_the_top_of_its_files_only_rooms_above_it(room):
    names = list(ROOMS)
    above = set(names[: names.index(room)])
    assert {other for other, at_top in imported_rooms(room) if at_top} <= above


def test_importing_the_package_imports_what_building_a_model_takes():
    found = imports((PACKAGE / "__init__.py").read_text(encoding="utf-8"), ["smca"])
    rooms = {name.split(".")[1] for name, at_top in found if at_top and name.startswith("smca.")}
    assert rooms == {"config", "data", "modeling", "version"}


def test_imports_are_seen_wherever_they_stand():
    source = """
import torch, smca.data
from smca import engine
from .scales import Scale
def f():
    from ..config.yacs import g
    from .. import errors
"""
    assert dict(imports(source, ["smca", "modeling"])) == {
        "torch": True,
        "smca.data": True,
        "smca.engine": True,
        "smca.modeling.scales.Scale": True,
        "smca.config.yacs.g": False,
        "smca.errors": False,
    }
