"""The package of this checkout, one thread a process unless told otherwise (the tests' tensors are
small, and pytest runs them in several processes), and no test's loggers or data sets in the next
one."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import smca.configs  # noqa: E402
import torch
import torch.utils.cpp_extension  # noqa: E402, F401  warns once where there is CUDA, but no GPU
from detectron2.data import DatasetCatalog, MetadataCatalog  # noqa: E402

from helpers import close_logs  # noqa: E402
from smca.data import register_shapes  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def few_shapes(tmp_path_factory, monkeypatch):
    """The embedded data set's names stand for three of its images: it takes a minute to draw, and
    lies in the user's cache folder."""
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for split, name in zip(("train", "val"), register_shapes(1, 2, prefix="few_shapes")):
        for catalog in (DatasetCatalog, MetadataCatalog):
            monkeypatch.setitem(catalog.data, f"smca_shapes_{split}", catalog.data[name])
