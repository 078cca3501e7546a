"""One scale, no modulation (DETR): 34.8 AP in the paper."""

from ..smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.modulation = "none"
train.output_dir = "output/ablations/no_modulation"
