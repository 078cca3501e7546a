"""Reading and writing checkpoints, and conversion of those of other origin."""

from .checkpointer import SMCACheckpointer, provenance_of, read_provenance
from .timm_weights import TimmWeights
