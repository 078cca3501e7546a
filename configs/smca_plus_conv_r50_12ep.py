"""`smca_plus_r50_12ep.py` with the convolutional encoder."""

from .common.models.smca_conv import model
from .common.models.smca_plus import plus as _plus
from .smca_plus_r50_12ep import dataloader, lr_multiplier, optimizer, train

model.update(_plus)
model.decoder.refine = True
