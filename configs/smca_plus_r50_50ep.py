"""`smca_plus_r50_12ep.py` for 50 epochs."""

from .common.models.smca_plus import model
from .smca_r50_50ep import dataloader, lr_multiplier, optimizer, train
