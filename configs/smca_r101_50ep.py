"""SMCA, ResNet-101, 50 epochs: 44.4 AP in the paper."""

from .smca_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
