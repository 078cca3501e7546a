"""One scale, a weight map for each head, one spread for x and y (no published AP)."""

from ..smca_single_scale_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.modulation.map = "smca.modeling.SingleGaussian"
