"""`pretrained_single_scale.py` with three scales (strides 8, 16 and 32) and the encoder "IIMII"."""

from .pretrained_single_scale import dataloader, lr_multiplier, model, optimizer, train

model.in_features = ["res3", "res4"]
model.num_extra_scales = 1
model.encoder.pattern = "IIMII"
# With several scales a map's radius is sqrt(16 beta stride) pixels: 14 at stride 16.
model.decoder.modulation.beta = 0.75
