"""`coco_single_scale.py` with the Faster R-CNN of `faster_rcnn_shapes.py`."""

from detectron2.config import LazyCall as L

from smca.data import num_classes

from .coco_single_scale import data, dataloader, lr_multiplier, optimizer, train
from .faster_rcnn_shapes import model

model.roi_heads.num_classes = L(num_classes)(json_file="${data.train_json}")
