"""SMCA on one scale, ResNet-50, 250 epochs: 43.5 AP in the paper.

The paper does not say when its learning rate drops; after 200 epochs here."""

from smca.solver import step_schedule

from .smca_single_scale_r50_50ep import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = step_schedule(epochs=250, drop_epoch=200, batch_size=16)
