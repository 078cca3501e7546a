"""Your own data in COCO format on a CPU, from scratch, with a few hundred photographs or more:

    python train_net.py --config-file configs/custom_small.py \
        data.train_json=train.json data.train_images=images \
        data.val_json=val.json data.val_images=images

The number of queries, the scales, the size of images and crops, and the number of iterations follow
from the data; the log says which they are, and each can be set.
"""

from detectron2.config import LazyCall as L

from smca.data import (
    fit_crop_range,
    fit_in_features,
    fit_max_size,
    fit_num_extra_scales,
    fit_num_iterations,
    fit_num_queries,
    fit_scales_to_read,
    fit_short_sides,
    num_classes,
)

from .common.models.smca_plus_small import model
from .common.muon import lr_multiplier, optimizer
from .custom_coco import data, dataloader, train

_stride = 4  # of the model's finest scale, where there are small objects
_names = "${dataloader.train.dataset.names}"

model.num_classes = L(num_classes)(json_file="${data.train_json}")
model.num_queries = L(fit_num_queries)(names=_names)
model.in_features = L(fit_in_features)(names=_names)
model.num_extra_scales = L(fit_num_extra_scales)(in_features="${model.in_features}")
model.decoder.read = L(fit_scales_to_read)(in_features="${model.in_features}")
# Stride 4 has many cells, for which linear heads save a tenth of a step.
model.dense_head.deep = model.queries.project = False


def _short_sides(*factors):
    return L(fit_short_sides)(names=_names, stride=_stride, factors=list(factors))


_max_size = L(fit_max_size)(names=_names, stride=_stride)
dataloader.test.mapper.augmentations.update(short_sides=_short_sides(1.0), max_size=_max_size)
dataloader.test.num_workers = 0
# No larger than in evaluation, which saves time; objects become larger in the crops.
_train = dict(short_sides=_short_sides(0.7, 0.8, 0.9, 1.0), max_size=_max_size, color_jitter=0.3)
dataloader.train.mapper.augmentations.update(_train)
dataloader.train.mapper.augmentations_with_crop.update(
    crop_short_sides=_short_sides(1.0, 1.2, 1.4),
    crop_range=L(fit_crop_range)(names=_names, stride=_stride, factors=(0.6, 1.0)),
    **_train,
)
dataloader.train.num_workers = 0
dataloader.train.total_batch_size = 8

# Some tens of epochs of a few hundred images overfit without it.
optimizer.weight_decay = 0.05
train.init_checkpoint = ""
train.clip_grad_norm = None
_steps = dict(names=_names, batch_size="${dataloader.train.total_batch_size}")
train.max_iter = L(fit_num_iterations)(share=1.0, **_steps)
train.eval_period = L(fit_num_iterations)(share=0.1, **_steps)
train.checkpointer.period = L(fit_num_iterations)(share=0.1, **_steps)  # eval_period may be 0
