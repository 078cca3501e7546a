"""SMCA with proposed queries, refined boxes, denoising, and a dense head; ResNet-50, 12 epochs."""

from smca.solver import step_schedule

from .common.models.smca_plus import model
from .smca_r50_50ep import dataloader, optimizer, train

train.max_iter, lr_multiplier = step_schedule(epochs=12, drop_epoch=11, batch_size=8)
train.eval_period = train.checkpointer.period = train.max_iter // 12  # every epoch
