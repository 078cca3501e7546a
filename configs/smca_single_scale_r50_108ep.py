"""SMCA on one scale, ResNet-50, 108 epochs: 42.7 AP in the paper."""

from smca.solver import step_schedule

from .smca_single_scale_r50_50ep import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = step_schedule(epochs=108, drop_epoch=80, batch_size=16)
