"""The model and schedule of `smca_shapes.py` on your own data in COCO format at 160 pixels; the
files are given as for `custom_coco.py`."""

from detectron2.config import LazyCall as L

from smca.data import num_classes

from ..custom_coco import data, dataloader
from ..smca_shapes import lr_multiplier, model, optimizer, train

model.num_classes = L(num_classes)(json_file="${data.train_json}")
dataloader.train.mapper.augmentations.update(short_sides=[144, 160, 176], max_size=256)
dataloader.train.mapper.augmentations_with_crop = None
dataloader.test.mapper.augmentations.update(short_sides=160, max_size=256)
dataloader.train.total_batch_size = 8
dataloader.train.num_workers = dataloader.test.num_workers = 0
