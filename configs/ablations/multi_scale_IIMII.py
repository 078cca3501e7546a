"""Three scales, two intra-scale, one multi-scale, two intra-scale layers: 43.7 AP in the paper."""

from ..smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

train.output_dir = "output/ablations/multi_scale_IIMII"
