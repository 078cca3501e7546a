"""Optimizer, learning rates and schedules, for configs."""

from .muon import Muon
from .recipe import (
    COCO_TRAIN_IMAGES,
    backbone_lr_factor,
    layer_lr_factor,
    step_schedule,
    steps_of_epochs,
)
