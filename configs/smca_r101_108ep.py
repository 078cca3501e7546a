"""SMCA, ResNet-101, 108 epochs (not in the paper)."""

from .smca_r50_108ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
