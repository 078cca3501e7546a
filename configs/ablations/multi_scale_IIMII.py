"""Three scales, two intra-scale, one multi-scale, two intra-scale layers: 43.7 AP in the paper.

`smca_r50_50ep.py` by another name."""

from ..smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train
