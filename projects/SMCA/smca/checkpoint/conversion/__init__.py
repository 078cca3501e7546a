"""Checkpoints of other origin in Detectron2's format."""

from .convert import CLASS_CHOICES, Conversion, convert, convert_file, read_state_dict
from .names import official_name

__all__ = [
    "CLASS_CHOICES",
    "Conversion",
    "convert",
    "convert_file",
    "official_name",
    "read_state_dict",
]
