"""SMCA, ResNet-50, 50 epochs: 43.7 AP in the paper."""

from smca.solver import step_schedule

from .common.coco import dataloader
from .common.models.smca import model
from .common.optimizer import optimizer
from .common.train import train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
dataloader.train.total_batch_size = 8
train.max_iter, lr_multiplier = step_schedule(epochs=50, drop_epoch=40, batch_size=8)
train.eval_period = train.checkpointer.period = train.max_iter // 50  # every epoch
