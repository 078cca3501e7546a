"""The demo without modulation: everything else is `smca_shapes.py`."""

from .smca_shapes import dataloader, lr_multiplier, model, optimizer, train

model.decoder.modulation = None
