"""The model of `smca_shapes.py` with three scales (strides 8, 16, 32) and the encoder "IIMII"."""

from ..smca_shapes import dataloader, lr_multiplier, model, optimizer, train

model.backbone.num_blocks = [1, 1, 1]
model.in_features = ["res3", "res4"]
model.num_extra_scales = 1
model.encoder.pattern = "IIMII"
# With several scales a map's radius starts at sqrt(16 beta stride) pixels: 8 pixels at stride 8,
# as in `smca_shapes.py`.
model.decoder.modulation.beta = 0.5
# Five layers of attention do not learn from scratch at the rate of `smca_shapes.py`.
optimizer.lr = 2e-4
