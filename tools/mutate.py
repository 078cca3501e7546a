#!/usr/bin/env python
"""
Plant bugs, one at a time, and see whether the tests that belong to them notice:

    mutate.py                                   # every bug listed in tests/mutants/*.yaml
    mutate.py --only modeling engine --jobs 2   # some lists
    mutate.py --only modeling --match decoder   # bugs whose file or name has that text
    mutate.py --random 60 --seed 1              # bugs that nobody listed, drawn from the package
    mutate.py --output docs/figures/mutants.json   # the table of docs/testing.md, and each outcome

A list is a YAML file of

    - bug: later layers predict a centre of their own     # in words
      file: projects/SMCA/smca/modeling/decoder.py
      old: predicts_centre=index == 0                     # has to be in the file once
      new: predicts_centre=True
      tests: [tests/test_modeling_decoder.py]             # left out: see tests/mutants/tests.yml

Each bug is planted in a copy of the checkout, never in the checkout itself. The tests run first
without a bug, for a bug counts as caught only by tests that pass without it. A bug with which
they do not end in time counts as caught.
"""

import argparse
import ast
import compileall
import contextlib
import fnmatch
import functools
import json
import os
import py_compile
import random
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import Queue
from typing import Any

from smca.errors import UserError, at_least, exit_code

import yaml
from tabulate import tabulate
from tqdm import tqdm

from figures import command_line, write_figures

ROOT = Path(__file__).resolve().parents[1]
LISTS = ROOT / "tests" / "mutants"
_TIMEOUT_S = 300.0
_FORKED_PYTEST = Path(__file__).with_name("forked_pytest.py")
# Imported once and not for each bug, which would take seconds.
_LIBRARIES = [
    "detectron2.config",
    "detectron2.data",
    "detectron2.engine",
    "detectron2.evaluation",
    "detectron2.modeling",
    "matplotlib.pyplot",
    "scipy.optimize",
    "torch.optim.swa_utils",
    "torchvision.ops",
]
_RANDOM = "random"


@dataclass
class Mutant:
    """A bug to plant.

    Attributes:
        bug: in words. list_name: name of the list that it is in.
        file: to change, relative to the checkout.
        old, new: the text to replace, which has to be in the file once, and what replaces it.
        tests: files (or pytest's node ids) that should notice.
        outcome: "caught", "survived" or "late" (the tests did not end in time).
        seconds: that the tests took.
    """

    bug: str
    list_name: str
    file: str
    old: str
    new: str
    tests: list[str] = field(default_factory=list)
    outcome: str = ""
    seconds: float = 0.0

    def apply(self, root: Path) -> None:
        """
        Raises:
            UserError: the text to replace is not in the file, or more than once.
        """
        path = root / self.file
        text = path.read_text()
        count = text.count(self.old)
        if count != 1:
            raise UserError(
                f"The bug {self.bug!r} of tests/mutants/{self.list_name}.yaml does not fit any "
                f"more: {self.old!r} is {count} times in {self.file}, not once."
            )
        path.write_text(text.replace(self.old, self.new))


def read_mutants(names: list[str], match: str) -> list[Mutant]:
    """The bugs of some lists (all, without names) whose file or words have the text `match`."""
    known = {path.stem: path for path in sorted(LISTS.glob("*.yaml"))}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UserError(f"There is no list {unknown[0]}: choose among {', '.join(known)}.")
    mutants = []
    for name in names or known:
        for entry in _read_yaml(known[name]) or []:
            mutant = Mutant(list_name=name, **entry)
            mutant.tests = mutant.tests or tests_of(mutant.file)
            mutants.append(mutant)
    return [m for m in mutants if match in m.file or match in m.bug]


@functools.cache
def _read_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def tests_of(file: str) -> list[str]:
    """The tests that belong to a file, by the first fitting pattern of tests/mutants/tests.yml."""
    for pattern, tests in _read_yaml(LISTS / "tests.yml").items():
        if fnmatch.fnmatch(file, pattern):
            return list(tests)
    raise UserError(f"No tests belong to {file}: name them in tests/mutants/tests.yml.")


# ---- Bugs that nobody listed

_SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Lt: ast.GtE,
    ast.LtE: ast.Gt,
    ast.Gt: ast.LtE,
    ast.GtE: ast.Lt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
}


class _Changes(ast.NodeVisitor):
    """Collects (line, column, end column, text) of changes in a module, outside of messages."""

    def __init__(self, source: str) -> None:
        self.lines = source.splitlines(keepends=True)
        self.found: list[tuple[ast.expr, str, str]] = []
        self.visit(ast.parse(source))

    def _add(self, node: ast.expr, changed: ast.expr, what: str) -> None:
        if node.lineno == node.end_lineno:
            self.found.append((node, f"({ast.unparse(changed)})", what))

    def visit_Raise(self, node: ast.Raise) -> None:
        """Messages are for readers."""

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """As above."""

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        for part in [*node.body, *node.args.defaults, *node.args.kw_defaults]:
            if part is not None:
                self.visit(part)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        self.generic_visit(node)
        swap = _SWAPS.get(type(node.op))
        if swap:
            self._add(node, ast.BinOp(node.left, swap(), node.right), "operator")

    def visit_Compare(self, node: ast.Compare) -> None:
        self.generic_visit(node)
        swap = _SWAPS.get(type(node.ops[0]))
        if swap and len(node.ops) == 1:
            self._add(node, ast.Compare(node.left, [swap()], node.comparators), "comparison")

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.generic_visit(node)
        self._add(node, ast.BoolOp(_SWAPS[type(node.op)](), node.values), "and / or")

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._add(node, ast.Constant(not node.value), "constant")
        elif isinstance(node.value, (int, float)):
            changed = node.value + 1 if node.value in (0, 1) else node.value * 2
            self._add(node, ast.Constant(changed), "constant")

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        for index, keyword in enumerate(node.keywords):
            if keyword.arg:
                rest = node.keywords[:index] + node.keywords[index + 1 :]
                changed = ast.Call(node.func, node.args, rest)
                self._add(node, changed, f"without {keyword.arg}=")


def random_mutants(count: int, seed: int, match: str) -> list[Mutant]:
    """Changes of an operator, comparison or constant, or an argument left out, drawn evenly from
    all places in the package."""
    places = []
    for path in sorted((ROOT / "projects" / "SMCA" / "smca").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        if match in file and path.name != "__init__.py":
            changes = _Changes(path.read_text())
            places += [(file, changes.lines, *change) for change in changes.found]
    mutants = []
    for file, lines, node, text, what in random.Random(seed).sample(
        places, min(count, len(places))
    ):
        # Columns count bytes.
        line = lines[node.lineno - 1].encode()
        changed = line[: node.col_offset] + text.encode() + line[node.end_col_offset :]
        before, after = "".join(lines[: node.lineno - 1]), "".join(lines[node.lineno :])
        mutants.append(
            Mutant(
                bug=f"line {node.lineno}, {what}: {changed.decode().strip()}",
                list_name=_RANDOM,
                file=file,
                old=before + line.decode() + after,
                new=before + changed.decode() + after,
                tests=tests_of(file),
            )
        )
    return mutants


# ---- Running


def copy_checkout(folder: Path) -> Path:
    """The tracked files and those that git does not ignore, in a folder from which they import."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout
    for name in filter(None, listing.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    # Compiled once, by the sources' hashes: a changed file may have the time and size of before.
    compileall.compile_dir(
        folder, quiet=1, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH
    )
    # Installed, smca.configs would be that of the checkout.
    (folder / "projects" / "SMCA" / "smca" / "configs").symlink_to(folder / "configs")
    return folder


class Checkout:
    """A copy of the checkout to plant bugs in, and a process that runs its tests."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: to copy to; created.
        """
        folder.mkdir()
        self.folder = copy_checkout(folder)
        package = str(folder / "projects" / "SMCA")
        path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(_FORKED_PYTEST), *_LIBRARIES],
            cwd=folder,
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def close(self) -> None:
        self._process.communicate()

    def run_tests(self, tests: list[str]) -> str:
        """
        Returns:
            What became of them: "survived" if all pass, "caught" or "late".
        """
        assert self._process.stdin and self._process.stdout
        arguments = ["-x", "-q", "-n0", "--tb=no", "--assert=plain", "-p", "no:cacheprovider"]
        job = json.dumps([_TIMEOUT_S, [*arguments, *tests]])
        print(job, file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline().strip()
        if not answer:
            raise UserError("The process that runs the tests is gone.")
        # Exit codes other than 1: a bug with which nothing can be imported.
        return answer if answer == "late" else "survived" if answer == "0" else "caught"

    def try_bug(self, mutant: Mutant) -> None:
        """Fill in what becomes of a bug."""
        path = self.folder / mutant.file
        original = path.read_text()
        start = time.perf_counter()
        try:
            mutant.apply(self.folder)
            mutant.outcome = self.run_tests(mutant.tests)
        finally:
            path.write_text(original)
        mutant.seconds = round(time.perf_counter() - start, 1)


def check_tests(checkout: Checkout, mutants: list[Mutant]) -> None:
    """
    Raises:
        UserError: tests fail without any bug.
    """
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    if tests and checkout.run_tests(tests) != "survived":
        raise UserError(f"The tests fail without a bug: run pytest {' '.join(tests)}.")


def plant(mutants: list[Mutant], num_jobs: int) -> None:
    """Fill in what becomes of each, in `num_jobs` copies of the checkout at a time."""
    with tempfile.TemporaryDirectory(prefix="mutants_") as temporary:
        checkouts: Queue[Checkout] = Queue()
        with contextlib.ExitStack() as stack:
            for index in range(num_jobs):
                checkout = Checkout(Path(temporary, str(index)))
                stack.callback(checkout.close)
                checkouts.put(checkout)
            check_tests(checkout, mutants)
            progress = stack.enter_context(tqdm(total=len(mutants), unit="bug", disable=None))

            def try_one(mutant: Mutant) -> None:
                checkout = checkouts.get()
                try:
                    checkout.try_bug(mutant)
                finally:
                    checkouts.put(checkout)
                progress.update()
                if mutant.outcome == "survived":
                    progress.write(f"survived: {mutant.file}: {mutant.bug}")

            with ThreadPoolExecutor(num_jobs) as pool:
                list(pool.map(try_one, mutants))


COLUMNS = ["list", "planted", "caught", "survived"]


def make_rows(mutants: list[Mutant]) -> list[list[str]]:
    """For each list how many were planted, caught and survived."""
    counts: list[tuple[int, ...]] = []
    for name in dict.fromkeys(m.list_name for m in mutants):
        of_list = [m for m in mutants if m.list_name == name]
        survived = sum(m.outcome == "survived" for m in of_list)
        counts.append((len(of_list), len(of_list) - survived, survived))
    names = [*dict.fromkeys(m.list_name for m in mutants), "all"]
    counts.append(tuple(map(sum, zip(*counts))))
    return [[name, *map(str, row)] for name, row in zip(names, counts)]


def get_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="LIST", help="names of lists")
    parser.add_argument("--match", default="", metavar="TEXT", help="in the bug's words or file")
    parser.add_argument(
        "--random", type=at_least(1), metavar="N", help="plant N bugs that nobody listed"
    )
    parser.add_argument("--seed", type=int, default=0, help="of --random; default: %(default)s")
    parser.add_argument(
        "--jobs", type=at_least(1), default=os.cpu_count(), help="default: %(default)s"
    )
    parser.add_argument("--output", metavar="FILE", help="JSON with the table and every outcome")
    parser.add_argument("--check", action="store_true", help="only see that every bug still fits")
    return parser


def run(args: argparse.Namespace) -> int:
    if args.random:
        mutants = random_mutants(args.random, args.seed, args.match)
    else:
        mutants = read_mutants(args.only, args.match)
    if not mutants:
        raise UserError(f"--match {args.match!r} is in no bug's words or file.")
    if args.check:
        check_fit(mutants)
        print(f"{len(mutants)} bugs fit.")
        return 0
    plant(mutants, args.jobs)
    rows = make_rows(mutants)
    print(tabulate(rows, COLUMNS, tablefmt="github"))
    survivors = [m for m in mutants if m.outcome == "survived"]
    for mutant in survivors:
        print(f"survived: {mutant.file}: {mutant.bug}")
    if args.output:
        bugs = {f"{m.file}: {m.bug}": m.outcome for m in mutants}
        write_figures(args.output, args.command, COLUMNS, rows, bugs=bugs)
    return 1 if survivors else 0


def check_fit(mutants: list[Mutant]) -> None:
    """
    Raises:
        UserError: a bug cannot be planted in today's code.
    """
    with tempfile.TemporaryDirectory() as temporary:
        for mutant in mutants:
            target = Path(temporary, mutant.file)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / mutant.file, target)
            mutant.apply(Path(temporary))


def main(argv: list[str] | None = None) -> int:
    args = get_parser().parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    args.command = command_line(__file__, words)
    return exit_code(run, args)


if __name__ == "__main__":
    sys.exit(main())
