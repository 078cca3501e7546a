"""SMCA (Spatially Modulated Co-Attention, ICCV 2021) for Detectron2.

Importing this registers the meta-architecture ``SMCA`` and the embedded data set. Before PyTorch
it also makes threads on the CPU wait in a way that bears other work on the machine.
"""

import os
import warnings

# Threads that wait for another one's part of an operation spin, by default for milliseconds. Where
# a second program runs on one of two cores, the waiting ones keep the last from it: a step takes 23
# times as long. Spinning for some 50 microseconds costs 3 % of a step on a quiet machine and bears
# that (docs/performance.md). Only GNU's OpenMP, as in PyTorch's own wheels, reads it.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

try:
    with warnings.catch_warnings():
        # fvcore and Detectron2 script a few functions when they are imported, in each process, and
        # newer versions of PyTorch warn each time: nothing that a user could do anything about.
        warnings.filterwarnings("ignore", ".*torch.jit.script")
        import detectron2.modeling  # noqa: F401
except Exception as error:
    raise ImportError(
        f"SMCA needs Detectron2, which cannot be imported ({error}): run 'make setup' in SMCA's "
        "checkout, or install it with 'pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git'."
    ) from error

from typing import TYPE_CHECKING, Any

from . import data, modeling  # noqa: F401
from .config import add_smca_config
from .version import __version__

if TYPE_CHECKING:
    from .inference import Predictor

__all__ = ["Predictor", "__version__", "add_smca_config"]


def __getattr__(name: str) -> Any:
    # Training needs neither the predictor nor what it draws with.
    if name == "Predictor":
        from .inference import Predictor

        return Predictor
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
