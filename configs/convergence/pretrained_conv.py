"""`pretrained_multi_scale.py` with the convolutional encoder."""

from .pretrained_multi_scale import dataloader, lr_multiplier, model, optimizer, train
from .shapes_conv import model as _conv_model

model.encoder = _conv_model.encoder
