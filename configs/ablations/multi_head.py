"""One scale, a weight map for each head, independent spread: 41.0 AP in the paper.

`smca_single_scale_r50_50ep.py` by another name."""

from ..smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
