"""The demo: a small SMCA plus learns the embedded data set from scratch in minutes on a CPU."""

from smca.data import SHAPE_CLASSES

from .common.models.smca_plus_small import model
from .common.muon import lr_multiplier, optimizer
from .smca_shapes import dataloader, train

# The shapes are large enough for stride 8.
model.in_features = ["res3", "res4"]
model.decoder.read = None
model.num_classes = len(SHAPE_CLASSES)

train.clip_grad_norm = None
train.max_iter = 1500
train.eval_period = train.checkpointer.period = 300
