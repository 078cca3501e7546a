"""Three scales, without scale selection: 42.6 AP in the paper."""

from ..smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.decoder.scale_selection = False
