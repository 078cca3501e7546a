"""SMCA, ResNet-50, 108 epochs: 45.6 AP in the paper."""

from smca.solver import step_schedule

from .smca_r50_50ep import dataloader, model, optimizer, train

train.max_iter, lr_multiplier = step_schedule(epochs=108, drop_epoch=80, batch_size=8)
