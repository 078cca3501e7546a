"""SMCA (Spatially Modulated Co-Attention, ICCV 2021) for Detectron2.

Importing this registers the meta-architecture ``SMCA`` and the embedded data set.
"""

try:
    import detectron2.config  # noqa: F401
except Exception as error:
    raise ImportError(
        f"SMCA needs Detectron2, which cannot be imported ({error}): run 'make setup' in SMCA's "
        "checkout, or install it with 'pip install --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2.git'."
    ) from error

from . import data, modeling  # noqa: F401
from .config import add_smca_config
from .version import __version__

__all__ = ["__version__", "add_smca_config"]
