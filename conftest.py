"""What holds for all tests, and the tests of the pages.

The tests run the package of this checkout, one thread a process unless told otherwise (their
tensors are small, and pytest runs them in several processes), and none leaves its loggers or data
sets to the next one.

The pages' blocks of `python` are tests, and so are blocks of `bash`, which hold commands. They run
in a folder that has the files of the checkout, a small data set (train.json, val.json, images),
photo.jpg, and the result of a short training on it in output/demo. Commands that need other data,
or hours, stand in blocks of `sh`, and <!-- skip: next --> leaves a block of Python out.
"""

import json
import os
import runpy
import shlex
import shutil
import sys
from importlib.metadata import entry_points
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import smca.configs  # noqa: E402
import torch
import torch.utils.cpp_extension  # noqa: E402, F401  warns once where there is CUDA, but no GPU
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402
from sybil import Sybil  # noqa: E402
from sybil.parsers.markdown import (  # noqa: E402
    CodeBlockParser,
    PythonCodeBlockParser,
    SkipParser,
)

from helpers import close_logs  # noqa: E402
from smca.cli import train  # noqa: E402
from smca.data import register_shapes  # noqa: E402

ROOT = Path(__file__).resolve().parent


# At its first backward pass autograd starts a thread for each device that there is, and after
# torch.compile or an export there is a fake one. A process that tests fork could not train then.
torch.ones(1, requires_grad=True).backward()


def pytest_configure():
    for folder in (*smca.__path__, *smca.configs.__path__):
        if ROOT not in Path(folder).resolve().parents:
            pytest.exit(
                f"These tests are of {ROOT}, but the package is imported from {folder}: run "
                f"'pip install -e {ROOT}'.",
                returncode=pytest.ExitCode.USAGE_ERROR,
            )


@pytest.fixture(autouse=True)
def loggers_of_one_test():
    yield
    close_logs()


@pytest.fixture(autouse=True)
def data_sets_of_one_test():
    before = [(catalog, set(catalog)) for catalog in (DatasetCatalog, MetadataCatalog)]
    yield
    for catalog, names in before:
        for name in set(catalog) - names:
            catalog.remove(name)


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The package makes its files here, not in the user's folder."""
    os.environ["SMCA_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def few_shapes(monkeypatch):
    """The embedded data set's names stand for three of its images: it takes a minute to draw, and
    lies in the user's cache folder."""
    for split, name in zip(("train", "val"), register_shapes(1, 2, prefix="few_shapes")):
        for catalog in (DatasetCatalog, MetadataCatalog):
            monkeypatch.setitem(catalog.data, f"smca_shapes_{split}", catalog.data[name])


# ---- The pages


def run_commands(example):
    """Run each command of a block in this process, which has imported everything already."""
    commands = {script.name: script for script in entry_points(group="console_scripts")}
    for line in example.parsed.replace("\\\n", " ").splitlines():
        program, *words = shlex.split(line)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [program, *words] if program in commands else words)
            try:
                if program in commands:
                    sys.exit(commands[program].load()())
                assert program == "python", f"{line}: write sh instead of bash"
                runpy.run_path(words[0], run_name="__main__")
            except SystemExit as end:
                assert not end.code, f"{line} ended with {end.code}"


def write_data(folder):
    """A few of the embedded shapes as if they were the reader's own data."""
    (folder / "images").mkdir()
    for split, name in zip(("train", "val"), register_shapes(16, 4, prefix="pages")):
        DatasetCatalog.get(name)
        metadata = MetadataCatalog.get(name)
        coco = json.loads(Path(metadata.json_file).read_text())
        for image in coco["images"]:
            source = Path(metadata.image_root, image["file_name"])
            image["file_name"] = f"{split}_{source.name}"
            shutil.copy(source, folder / "images" / image["file_name"])
        (folder / f"{split}.json").write_text(json.dumps(coco))
    shutil.copy(source, folder / "photo.jpg")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory, cache):
    folder = tmp_path_factory.mktemp("pages")
    for path in ROOT.iterdir():
        if path.name not in (".git", "output"):
            (folder / path.name).symlink_to(path)
    settings = ["train.max_iter=2", "train.output_dir=output/demo"]
    for split in ("train", "val"):
        settings += [f"data.{split}_json={split}.json", f"data.{split}_images=images"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_data(folder)
        assert train.main(["--config-file", "convergence/coco_single_scale", *settings]) == 0
    (folder / "output" / "demo" / "examples").symlink_to(folder / "images")
    return folder


@pytest.fixture
def in_workspace(workspace, monkeypatch, loggers_of_one_test, data_sets_of_one_test):
    monkeypatch.chdir(workspace)


pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), CodeBlockParser("bash", run_commands), SkipParser()],
    patterns=["README.md", "docs/*.md", "configs/*.md"],
    fixtures=["in_workspace"],
).pytest()
