"""DETR in the same code: one scale, no modulation. (Its loss and queries are SMCA's.)"""

from .smca_single_scale import model

model.decoder.modulation = None
