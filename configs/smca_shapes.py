"""A small SMCA of the paper learns the embedded data set from scratch in minutes on a CPU."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from smca.data import SHAPE_CLASSES

from .common.coco import dataloader
from .common.models.smca_single_scale import model
from .common.optimizer import optimizer
from .common.train import train

# One basic block a stage up to stride 8, and group norm, which small batches can train.
model.backbone.update(depth=18, num_blocks=[1, 1], norm="GN", freeze_at=0)
model.in_features = ["res3"]
model.encoder.update(pattern="I", ffn_dim=512)
model.decoder.update(num_layers=3, ffn_dim=512)
model.num_classes = len(SHAPE_CLASSES)
model.num_queries = 40
model.embed_dim = 128
model.dropout = 0.0
# A map's radius starts at sqrt(beta / 2) cells: now 8 pixels, half a small object. beta = 8 is
# made for images of 800 pixels.
model.decoder.modulation.beta = 2.0

dataloader.train.dataset.names = "smca_shapes_train"
dataloader.test.dataset.names = "smca_shapes_val"
dataloader.train.mapper.augmentations.update(short_sides=128, max_size=176)
dataloader.train.mapper.augmentations_with_crop = None
dataloader.test.mapper.augmentations.update(short_sides=128, max_size=176)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 0

# Nothing is pretrained: the backbone learns at the same rate.
optimizer.lr = 5e-4
optimizer.params.lr_factor_func.factor = 1.0
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_factor=0.01,
    warmup_length=0.2,
)
train.max_iter = 2700
train.eval_period = train.checkpointer.period = 540
