"""DETR trained like SMCA: no modulation, one scale, 50 epochs: 34.8 AP in the paper."""

from .common.models.detr import model
from .smca_single_scale_r50_50ep import dataloader, lr_multiplier, optimizer, train
