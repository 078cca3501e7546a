"""`coco_single_scale.py` with the model of `shapes_multi_scale.py`."""

from detectron2.config import LazyCall as L

from smca.data import num_classes

from .coco_single_scale import data, dataloader, lr_multiplier, train
from .shapes_multi_scale import model, optimizer

model.num_classes = L(num_classes)(json_file="${data.train_json}")
