#!/usr/bin/env python
"""Check every command and every piece of Python in the documentation, as it stands in the files:

    tools/check_docs.py                 # cheaply, without running them
    tools/check_docs.py --run           # also run the blocks marked to be run, on the embedded set
    tools/check_docs.py README.md --run

Of a command the script has to exist, its options to parse, and its config with its overrides to
load; a setting in the text, `key` or `key=value`, has to be one of the main configs'; of Python
the syntax, the imports and the names taken from them. A block without a language (or with bash) is
of commands; `text` is what something prints. Words in capitals are placeholders. Settings of other
projects stand in <code>.

A block after `<!-- run -->` is run with --run, in a folder with a short training of the demo in
output/demo, photo.jpg, and train.json, val.json and images as data of your own. What follows the
word, `<!-- run: train.fast_dev_run=True -->`, is added to each of its commands.
"""

import argparse
import ast
import builtins
import configparser
import contextlib
import functools
import glob
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple
from unittest import mock

from smca import model_zoo
from smca.config import load_config
from smca.config.lazy import _all_keys
from smca.errors import UserError, exit_code

from detectron2.data import DatasetCatalog, MetadataCatalog
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
PAGES = ["README.md", "configs/README.md", "projects/SMCA/README.md", "docs/*.md", "docs/*.ipynb"]
COMMANDS = ("", "bash", "sh")
_FENCE = re.compile(r"^(?:<!-- run(?::\s*(?P<more>[^>]*?))?\s*-->\n)?```(?P<language>\w*)\n", re.M)
# Of a notebook's cell: a command, whose lines may be kept in a variable.
_SHELL = re.compile(r"^(?P<indent> *)(?:\w+ = )?!(?P<command>(?:[^\n]*\\\n)*[^\n]*)", re.M)
_SPAN = re.compile(
    r"(?<!`)`((?:python|make|pip|torchrun|smca-\w+)\s[^`]+|tools/\w+\.py\s[^`]+)`(?!`)"
)
_INDENTED = re.compile(
    r"^ {4}((?:python|make|pip|torchrun|sbatch|smca-\w+)\s(?:[^\n]*\\\n)*[^\n]*)", re.M
)
_SETTING = re.compile(
    r"(?<!`)`'?((?:model|dataloader|optimizer|lr_multiplier|train|data)(?:\.(?!py`)\w+)+)"
    r"(?:=([^`'\s]*))?'?`(?!`)"
)
# Of which each setting in the text has to be one.
CONFIGS = (
    "smca_r50_50ep",
    "smca_conv_r50_50ep",
    "custom_coco",
    "custom_yolo",
    "custom_voc",
    "fine_tune",
)


class Block(NamedTuple):
    """A fenced block, or a command in a line of text.

    Attributes:
        page: path from the checkout's root.
        line: where it starts.
        language: after the fence.
        text: without the fences.
        is_run: marked for --run.
        more: what --run adds to each command.
    """

    page: str
    line: int
    language: str
    text: str
    is_run: bool = False
    more: str = ""

    @property
    def place(self) -> str:
        """As an editor wants it."""
        return f"{self.page}:{self.line}"


class Problem(Exception):
    """What is wrong with a block."""


class Unchecked(Exception):
    """What is missing here to check a command: an extra."""


def blocks_of(page: str) -> Iterator[Block]:
    """The blocks of a page in Markdown, and the commands in its text; of a notebook its cells.

    Raises:
        UserError: there is no such page, or where a block ends is not said.
    """
    if not (ROOT / page).is_file():
        raise UserError(f"The page {page} does not exist in {ROOT}.")
    text = (ROOT / page).read_text()
    if page.endswith(".ipynb"):
        yield from cells_of(page, json.loads(text))
        return
    outside, position = [], 0
    while start := _FENCE.search(text, position):
        end = text.find("\n```", start.end() - 1)
        if end < 0:
            raise UserError(f"{page} has a fence that is not closed.")
        line = text.count("\n", 0, start.end())
        body = text[start.end() : end]
        is_run = start.group().startswith("<!--")
        yield Block(page, line, start["language"], body, is_run, start["more"] or "")
        outside.append(text[position : start.start()])
        outside.append("\n" * text.count("\n", start.start(), end))
        position = end + len("\n```")
    outside.append(text[position:])
    text = "".join(outside)
    for indented in _INDENTED.finditer(text):
        yield Block(page, text.count("\n", 0, indented.start()) + 1, "", indented[1])
    for span in _SPAN.finditer(text):
        command = span[1] if not span[1].startswith("tools/") else f"python {span[1]}"
        line = text.count("\n", 0, span.start()) + 1
        yield Block(page, line, "", " ".join(command.split()))


def cells_of(page: str, notebook: dict[str, Any]) -> Iterator[Block]:
    """Of each cell with code what is Python, and the commands; its number stands for the line."""
    for number, cell in enumerate(notebook["cells"], 1):
        if cell["cell_type"] == "code":
            source = "".join(cell["source"])
            for command in _SHELL.finditer(source):
                yield Block(page, number, "", command["command"])
            yield Block(page, number, "python", _SHELL.sub(r"\g<indent>pass", source))


def commands_of(text: str) -> List[List[str]]:
    """The words of each command, without comments and variables set for it."""
    lines = re.sub(r"\\\n", " ", text).split("\n")
    commands = []
    for line in lines:
        words = shlex.split(line, comments=True)
        while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
            words = words[1:]
        if words:
            commands.append(words)
    return commands


# ---- Commands


def check_command(words: Sequence[str]) -> None:
    """
    Raises:
        Problem: it cannot be run as it stands.
    """
    program, rest = Path(words[0]).name, list(words[1:])
    if program in ("python", "python3"):
        check_python(rest)
    elif program == "pytest":
        check_pytest(rest)
    elif program == "make":
        check_make(rest)
    elif program == "pip":
        check_pip(rest)
    elif program in ("torchrun", "sbatch"):
        scripts = [i for i, word in enumerate(rest) if word.endswith((".py", ".sh"))]
        if not scripts:
            raise Problem(f"{program} without a script")
        script = rest[scripts[0]]
        if script.endswith(".sh"):
            need_file(script)
            script = "train_net.py"  # which tools/slurm_train.sh starts
        check_script(script, rest[scripts[0] + 1 :])
    elif program in entry_points():
        module = entry_points()[program].partition(":")[0]
        parse_with(module, rest, program)
    elif program.endswith(".sh"):
        need_file(words[0])
    elif program not in ("git", "cd"):
        raise Problem(f"{program} is no program that this tool knows")


def check_python(words: List[str]) -> None:
    """A script, or a module with -m."""
    if words[:2] == ["-m", "pytest"]:
        check_pytest(words[2:])
    elif words[:2] == ["-m", "pip"]:
        check_pip(words[2:])
    elif words[0] == "-m":
        importlib.import_module(words[1])
    else:
        check_script(words[0], words[1:])


def check_pytest(words: List[str]) -> None:
    """The files exist; the options are pytest's own."""
    for word in words:
        if word.startswith("tests/"):
            need_file(word.partition("::")[0])


def check_make(words: List[str]) -> None:
    """Targets and variables are the Makefile's."""
    text = (ROOT / "Makefile").read_text()
    for word in words:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        if not re.search(pattern, text, re.MULTILINE):
            raise Problem(f"the Makefile has no {name}")


def check_pip(words: List[str]) -> None:
    """The extras of this package exist."""
    extras = settings()["options.extras_require"]
    for word in words:
        if match := re.fullmatch(r"(?:\.|smca)\[(.*)\]", word):
            for extra in match[1].split(","):
                if extra not in extras:
                    raise Problem(f"setup.cfg has no extra {extra}")


def check_script(script: str, words: List[str]) -> None:
    """A script of this checkout, its options, its config and overrides."""
    if is_placeholder(script):
        return
    need_file(script)
    if re.search(r"ArgumentParser|smca\.cli", (ROOT / script).read_text()):
        parse_with(str(ROOT / script), words, script)
    elif words and "sys.argv" not in (ROOT / script).read_text():
        raise Problem(f"{script} has no options")


class _Parsed(BaseException):
    """Carries the options out of a script before it does anything with them."""


def parse_with(program: str, words: List[str], name: str) -> None:
    """Let a script (a path) or module read its options, and check the config that they name."""
    parse = argparse.ArgumentParser.parse_args
    parse_intermixed = argparse.ArgumentParser.parse_intermixed_args

    def stop(read: Any) -> Any:
        def parse_and_stop(self: Any, args: Any = None, namespace: Any = None) -> None:
            self.allow_abbrev = False  # a reader finds the whole names in --help
            raise _Parsed(read(self, args, namespace))

        return parse_and_stop

    # What a shell would have found: a name that stands for the files.
    words = [found for word in words for found in (glob.glob(word) or [word])]
    output = io.StringIO()
    patches: List[contextlib.AbstractContextManager[Any]] = [
        mock.patch.object(argparse.ArgumentParser, "parse_args", stop(parse)),
        mock.patch.object(argparse.ArgumentParser, "parse_intermixed_args", stop(parse_intermixed)),
        mock.patch.object(sys, "argv", [name, *words]),
        mock.patch.object(sys, "path", [str(ROOT / "tools"), *sys.path]),
        contextlib.redirect_stderr(output),
        contextlib.redirect_stdout(output),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        try:
            if program.endswith(".py"):
                runpy.run_path(program, run_name="__main__")
            else:
                importlib.import_module(program).main(words)
            raise Problem(f"{name} ended without reading its options")
        except ModuleNotFoundError as error:
            raise Unchecked(f"{name} needs {error.name}, which is not installed") from error
        except _Parsed as parsed:
            options = parsed.args[0]
        except SystemExit as error:
            lines = output.getvalue().strip().splitlines() or [str(error.code)]
            raise Problem(lines[-1]) from error
    check_config(options)


def check_config(options: argparse.Namespace) -> None:
    """The config that a command names loads with the command's overrides."""
    named = getattr(options, "config_file", None) or getattr(options, "config", None) or []
    files = [named] if isinstance(named, str) else named
    words = [*(getattr(options, "opts", None) or []), *(getattr(options, "what", None) or [])]
    overrides = [word for word in words if "=" in word]
    for path in files:
        if not is_placeholder(path):
            load_config(path, overrides)


def is_placeholder(word: str) -> bool:
    """FILE, CONFIG, ..."""
    return re.fullmatch(r"\.\.\.|[A-Z_]+", word) is not None


def need_file(path: str) -> None:
    """
    Raises:
        Problem: no file of the checkout has that name or pattern.
    """
    if not glob.glob(str(ROOT / path)):
        raise Problem(f"{path} does not exist")


def settings() -> configparser.ConfigParser:
    """setup.cfg."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def entry_points() -> dict[str, str]:
    """Of each command of an installation its function."""
    lines = settings()["options.entry_points"]["console_scripts"].strip().splitlines()
    return {name.strip(): target.strip() for name, _, target in (x.partition("=") for x in lines)}


# ---- Python


def check_code(text: str) -> None:
    """
    Raises:
        Problem: the syntax is wrong, or what is imported or taken from it does not exist.
    """
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise Problem(f"line {error.lineno}: {error.msg}") from error
    known: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                module = imported(alias.name)
                known[alias.asname or alias.name.split(".")[0]] = (
                    module if alias.asname else imported(alias.name.split(".")[0])
                )
        elif isinstance(node, ast.ImportFrom):
            source = str(node.module)
            # A config's relative import is of a config.
            module = None if node.level else imported(source)
            sections = model_zoo.get_config(source) if node.level else {}
            for alias in node.names:
                if not node.level:
                    known[alias.asname or alias.name] = member(module, source, alias.name)
                elif alias.name not in sections:
                    raise Problem(f"the config {source} has no {alias.name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            owner = known.get(node.value.id)
            if inspect.ismodule(owner) or inspect.isclass(owner):
                member(owner, node.value.id, node.attr)
        elif isinstance(node, ast.Call):
            check_keywords(node, known)


def check_keywords(call: ast.Call, known: dict[str, Any]) -> None:
    """The keywords of a call of something imported are its parameters."""
    function = call.func
    if isinstance(function, ast.Name):
        called = known.get(function.id)
    elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
        called = getattr(known.get(function.value.id), function.attr, None)
    else:
        return
    if called is None or called in vars(builtins).values() or not callable(called):
        return
    try:
        parameters = inspect.signature(called).parameters.values()
    except ValueError:
        return
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return
    unknown = {keyword.arg for keyword in call.keywords if keyword.arg} - {
        parameter.name for parameter in parameters
    }
    if unknown:
        raise Problem(f"{ast.unparse(function)} has no argument {sorted(unknown)[0]}")


def imported(name: str) -> Any:
    """A module by its name."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name == "IPython":  # comes with the extra 'notebook'
            raise Unchecked(f"{name} needs IPython, which is not installed") from error
        raise Problem(f"{name} cannot be imported: {error}") from error


def member(owner: Any, owner_name: str, name: str) -> Any:
    """What a module or class has under a name."""
    if not hasattr(owner, name):
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"{owner_name}.{name}")
        raise Problem(f"{owner_name} has no {name}")
    return getattr(owner, name)


# ---- Settings in the text


def settings_of(page: str) -> Iterator[Tuple[int, str, Optional[str]]]:
    """The settings, `key` or `key=value`, in a page's text: line, key, value if there is one."""
    text = (ROOT / page).read_text()
    for match in _SETTING.finditer(text):
        yield text.count("\n", 0, match.start()) + 1, match[1], match[2]


@functools.lru_cache(maxsize=None)
def keys_of(name: str) -> Set[str]:
    """Every key that may be set in a config."""
    return set(_all_keys(model_zoo.get_config(name)))


def check_setting(key: str, value: Optional[str]) -> None:
    """
    Raises:
        Problem: none of the main configs has the key.
        ConfigError: the value is not possible.
    """
    having = [name for name in CONFIGS if key in keys_of(name)]
    if not having:
        raise Problem(f"no config has the key {key}")
    if value and not is_placeholder(value):
        config = model_zoo.get_config(having[0])
        missing = [f"data.{name}=x" for name in config.get("data", ()) if f"data.{name}" != key]
        needed = [word for word in missing if OmegaConf.is_missing(config.data, word[5:-2])]
        load_config(model_zoo.get_config_file(having[0]), [*needed, f"{key}={value}"])


# ---- All pages


def check_block(block: Block) -> List[str]:
    """The problems of a block, each with its place."""
    problems = []
    if block.language == "python":
        checks: List[Any] = [(check_code, block.text)]
    elif block.language in COMMANDS:
        try:
            checks = [(check_command, words) for words in commands_of(block.text)]
        except ValueError as error:
            return [f"{block.place}: no commands ({error}); call what is printed ```text"]
    else:
        return []
    for check, what in checks:
        try:
            check(what)
        except Unchecked as error:
            print(f"{block.place}: not checked: {error}")
        except (Problem, UserError) as error:
            shown = what if isinstance(what, str) else " ".join(what)
            problems.append(f"{block.place}: {error}\n    {shown.splitlines()[0][:160]}")
    return problems


def prepare(folder: Path) -> None:
    """What marked blocks find: the checkout's files, a short training, images and data."""
    for path in ROOT.iterdir():
        if path.name not in (".git", "output", ".pytest_cache"):
            (folder / path.name).symlink_to(path)
    (folder / "images").mkdir()
    for split, num_images in (("train", 40), ("val", 20)):
        DatasetCatalog.get(f"smca_shapes_{split}")  # draws it where it is not there yet
        metadata = MetadataCatalog.get(f"smca_shapes_{split}")
        coco = json.loads(Path(metadata.json_file).read_text())
        coco["images"] = coco["images"][:num_images]
        ids = {image["id"] for image in coco["images"]}
        coco["annotations"] = [a for a in coco["annotations"] if a["image_id"] in ids]
        for image in coco["images"]:
            source = Path(metadata.image_root, image["file_name"])
            image["file_name"] = f"{split}_{image['file_name']}"
            shutil.copy(source, folder / "images" / image["file_name"])
        (folder / f"{split}.json").write_text(json.dumps(coco))
    shutil.copy(next((folder / "images").glob("val_*")), folder / "photo.jpg")
    settings = ["train.max_iter=20", "train.eval_period=20", "train.output_dir=output/demo"]
    train = [sys.executable, "train_net.py", "--config-file", "configs/smca_shapes.py", *settings]
    subprocess.run(train, cwd=folder, check=True, capture_output=True)


def run_block(block: Block, folder: Path) -> List[str]:
    """Run a marked block; gives what went wrong."""
    if block.language == "python":
        commands = [[sys.executable, "-c", block.text]]
    else:
        commands = [[*words, *shlex.split(block.more)] for words in commands_of(block.text)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for words in commands:
        print(f"{block.place}: {' '.join(words).splitlines()[0][:160]}", flush=True)
        done = subprocess.run(
            words, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True
        )
        if done.returncode:
            tail = "\n    ".join((done.stdout + done.stderr).strip().splitlines()[-5:])
            return [f"{block.place}: ended with {done.returncode}\n    {tail}"]
    return []


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pages", nargs="*", help="from the checkout's root; default: all")
    parser.add_argument("--run", action="store_true", help="run the blocks that are marked")
    args = parser.parse_args(argv)
    pages = args.pages or [
        str(path.relative_to(ROOT)) for pattern in PAGES for path in sorted(ROOT.glob(pattern))
    ]
    problems: List[str] = []
    num_checked = num_settings = 0
    os.chdir(ROOT)  # where the commands are meant to be given
    blocks = [block for page in pages for block in blocks_of(page)]
    for block in blocks:
        problems += check_block(block)
        num_checked += block.language in (*COMMANDS, "python")
    for page in pages:
        for line, key, value in settings_of(page):
            num_settings += 1
            try:
                check_setting(key, value)
            except (Problem, UserError) as error:
                problems.append(f"{page}:{line}: {error}")
    marked = [block for block in blocks if block.is_run]
    if args.run and marked:
        with tempfile.TemporaryDirectory() as name:
            prepare(Path(name))
            for block in marked:
                problems += run_block(block, Path(name))
    print("\n".join(problems), file=sys.stderr, end="\n" if problems else "")
    print(
        f"{len(pages)} pages, {num_checked} blocks and commands, {num_settings} settings, "
        f"{len(problems)} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
