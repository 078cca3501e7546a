"""Reading and writing checkpoints, and conversion of those of other origin."""

from .checkpointer import SMCACheckpointer
from .provenance import read_provenance

__all__ = ["SMCACheckpointer", "read_provenance"]
