"""SMCA with the convolutional encoder, ResNet-101, 50 epochs: 45.7 AP in the authors' log.

Each pair of scales has its own convolutions."""

from .smca_conv_r50_50ep import dataloader, lr_multiplier, model, optimizer, train

model.backbone.depth = 101
model.encoder.share_cross_scale = False
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
