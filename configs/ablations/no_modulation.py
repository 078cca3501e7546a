"""One scale, no modulation (DETR): 34.8 AP in the paper. `detr_r50_50ep.py` by another name."""

from ..detr_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
