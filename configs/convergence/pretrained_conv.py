"""`pretrained_multi_scale.py` with the convolutional encoder."""

from .pretrained_multi_scale import dataloader, lr_multiplier, model, optimizer, train
from .shapes_conv import model as conv_model

model.encoder = conv_model.encoder
