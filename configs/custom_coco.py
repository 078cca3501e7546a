"""Your own data in COCO format on a GPU, with no code (on a CPU, see `custom_small.py`):

    python train_net.py --config-file configs/custom_coco.py \
        data.train_json=train.json data.train_images=images \
        data.val_json=val.json data.val_images=images

Several files train together, ``'data.train_json=[a.json,b.json]'`` with one folder of images or
a list of as many; they must have the same categories.

The numbers of classes and of queries and the names follow from the training file. Everything can be
overridden, for instance ``model.backbone.depth=101``, ``train.max_iter=20000`` or
``optimizer.lr=5e-5``.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import MultiStepParamScheduler

from smca.data import fit_num_queries, num_classes, register_coco

from .common.coco import dataloader
from .common.models.smca_plus import model
from .common.optimizer import optimizer
from .common.train import train

data = dict(
    train_json="???",
    train_images="???",
    val_json="???",
    val_images="???",
    check_images=True,  # decode every image once before training starts
)

model.num_classes = L(num_classes)(json_file="${data.train_json}")
model.num_queries = L(fit_num_queries)(names="${dataloader.train.dataset.names}")

dataloader.train.dataset.names = L(register_coco)(
    json_file="${data.train_json}",
    image_root="${data.train_images}",
    check_images="${data.check_images}",
)
dataloader.test.dataset.names = L(register_coco)(
    json_file="${data.val_json}",
    image_root="${data.val_images}",
    check_images="${data.check_images}",
    categories_from="${data.train_json}",
)
dataloader.train.total_batch_size = 8

# The published recipe starts at the full rate, with which five encoder layers learn badly if little
# is pretrained or the rate is higher. A warm-up costs little.
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[8, 10]),
    warmup_factor=0.01,
    warmup_length=0.05,
)
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
train.max_iter = 10000
train.eval_period = train.checkpointer.period = 1000
