"""One scale, a weight map for each head, independent spread: 41.0 AP in the paper."""

from ..smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/multi_head"
