"""SMCA with the convolutional encoder, ResNet-50, 50 epochs: 44.4 AP in the authors' log.

Six layers, kernel 7, one downward and one upward convolution for all pairs of scales."""

from .common.models.smca_conv import model
from .smca_r50_50ep import dataloader, lr_multiplier, optimizer, train
