"""Imports of the package: no circle, nothing that is not needed, and what comes before PyTorch."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, Set

import pytest

from helpers import child_environment

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = {"smca": ROOT / "projects" / "SMCA" / "smca", "smca.configs": ROOT / "configs"}


def module_files() -> Dict[str, Path]:
    """Of each module of the package its file; a package has its own name."""
    files = {}
    for package, folder in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            files[".".join(parts).removesuffix(".__init__")] = path
    return files


FILES = module_files()


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


def room_of(module: str) -> str:
    return module.split(".")[1]


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
