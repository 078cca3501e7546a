"""Imports of the package: no circle, nothing that is not needed, and what comes before PyTorch; and
docs/architecture.md, which says what each room may import."""

import ast
import graphlib
import importlib
import operator
import re
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, Set

import pytest

from helpers import ROOT, child_environment

FOLDERS = {"smca": ROOT / "projects" / "SMCA" / "smca", "smca.configs": ROOT / "configs"}


FILES: Dict[str, Path] = {}  # of each module of the package; a package has its own name
for package, folder in FOLDERS.items():
    for path in folder.rglob("*.py"):
        parts = [package, *path.relative_to(folder).with_suffix("").parts]
        FILES[".".join(parts).removesuffix(".__init__")] = path


def imports_of(module: str) -> Iterator[str]:
    """Modules of the package that a module names in its imports, but for those of its types."""
    path = FILES[module]
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: 1 - node.level or None] if node.level else []
            source = ".".join([*start, *filter(None, [node.module])])
            # "from package import name" is of a module or of what a module holds.
            named = [f"{source}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else source for name in named]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "smca")


IMPORTS: Dict[str, Set[str]] = {module: set(imports_of(module)) for module in FILES}


def test_imports_have_no_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


def test_neither_a_config_nor_a_predictor_needs_the_trainer_nor_warns():
    """Warnings of Detectron2's imports are not the user's."""
    code = (
        "import sys\n"
        "import smca, detectron2.modeling\n"
        "assert not {'smca.inference', 'smca.analysis', 'smca.checkpoint'} & set(sys.modules)\n"
        "import smca.analysis, smca.inference, smca.model_zoo\n"
        "from smca.config import load_config\n"
        "load_config(sys.argv[1])\n"
        "print([name for name in sys.modules if name.startswith('smca.engine')])\n"
    )
    env = child_environment()
    env.pop("PYTHONWARNINGS", None)
    command = [sys.executable, "-c", code, str(ROOT / "configs" / "smca_shapes.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


# Runs a script up to its first import of PyTorch and prints how OpenMP's threads wait by then.
SPY = """
import os, runpy, sys
class Spy:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Spy())
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("script", "settings", "expected"),
    [
        ("train_net.py", {}, "5000"),
        ("train_net.py", {"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
        ("demo.py", {}, "5000"),
    ],
)
def test_threads_are_told_how_to_wait_before_there_are_any(script, settings, expected):
    """Else a program beside a training on the CPU costs a time slice a wait."""
    env = child_environment()
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        env.pop(name, None)
    command = [sys.executable, "-c", SPY, str(ROOT / script)]
    run = subprocess.run(command, env=env | settings, capture_output=True, text=True)
    assert run.stdout.split() == [expected], run.stderr


# docs/architecture.md

TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
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
    files = {f"modeling/{path.name}" for path in (FOLDERS["smca"] / "modeling").glob("*.py")}
    assert {file for file, _ in ROWS} >= files - {"modeling/__init__.py"}


def test_every_room_has_its_row():
    rooms = {path.parent.name for path in FOLDERS["smca"].glob("*/__init__.py")} | {"configs"}
    rooms |= {path.stem for path in FOLDERS["smca"].glob("*.py")} - {"__init__", "version"}
    assert set(ROOMS) == rooms


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_the_document_allows(room):
    modules = [module for module in IMPORTS if f"{module}.".startswith(f"smca.{room}.")]
    named = {other for module in modules for other in IMPORTS[module]}
    rooms = {other.split(".")[1] for other in named} - {room, "version"}
    allowed = set(re.findall(r"`(\w+)`", ROOMS[room]))
    assert rooms <= allowed <= set(list(ROOMS)[: list(ROOMS).index(room)])  # which stand above it
