"""One scale, one weight map for all heads: 40.2 AP in the paper."""

from ..smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.modulation.per_head = False
