"""The paper's recipe in miniature: its rates, dropout and schedule, a pretrained backbone with a
frozen stem; one scale, the middle one (stride 16), of objects that differ ten times in size.

`benchmarks/train_backbone.py` makes the backbone.
"""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import MultiStepParamScheduler

from ..common.optimizer import optimizer
from ..smca_shapes import dataloader, model, train

dataloader.train.dataset.names = "smca_shapes_10x_train"
dataloader.test.dataset.names = "smca_shapes_10x_val"
# Images are few: smaller batches make more steps of them.
dataloader.train.total_batch_size = 4

model.backbone.update(num_blocks=[1, 1, 1], freeze_at=2)
model.in_features = ["res4"]
model.encoder.pattern = "IIIII"
model.dropout = 0.1
# A map's radius starts at 14 pixels, a tenth of an image's side. The published one starts at 64 of
# 800 pixels.
model.decoder.modulation.beta = 1.5

lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[8, 10])
train.init_checkpoint = "output/backbones/shapes_10x.pth"
train.max_iter = 1500
train.eval_period = train.checkpointer.period = 500
