"""Checkpoints of other origin in Detectron2's format."""

from .convert import CLASS_CHOICES, convert, convert_file, read_state_dict
