"""Reading and writing checkpoints, and conversion of those of other origin."""

from .checkpointer import SMCACheckpointer

__all__ = ["SMCACheckpointer"]
