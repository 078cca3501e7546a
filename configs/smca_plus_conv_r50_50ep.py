"""`smca_plus_r50_50ep.py` with the convolutional encoder."""

from .smca_plus_conv_r50_12ep import model
from .smca_plus_r50_50ep import dataloader, lr_multiplier, optimizer, train
