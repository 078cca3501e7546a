"""Reading and writing checkpoints, and conversion of those of other origin."""

from .checkpointer import SMCACheckpointer
from .provenance import provenance_of, read_provenance

__all__ = ["SMCACheckpointer", "provenance_of", "read_provenance"]
