"""`smca_shapes.py` without modulation: a small DETR."""

from .smca_shapes import dataloader, lr_multiplier, model, optimizer, train

model.decoder.modulation = None
