"""One thread a process (the tests' tensors are small, and pytest runs them in several processes),
and no test's loggers in the next one."""

import logging
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
from detectron2.utils.logger import setup_logger  # noqa: E402


@pytest.fixture(autouse=True)
def loggers_of_one_test():
    yield
    for name in ("detectron2", "fvcore", "smca"):
        logging.getLogger(name).handlers.clear()
    setup_logger.cache_clear()
