"""Data sets, reading and augmenting their images, and the training loader.

Importing this registers the embedded data set.
"""

from .coco import class_names, num_classes, register_coco, require_dataset
from .errors import DatasetError
from .loader import build_train_loader, set_start_batch
from .mapper import DetrDatasetMapper, as_rgb, check_image, detr_augmentations, read_image
from .shapes import SHAPE_CLASSES, draw_scene, register_shapes, write_shapes

register_shapes()

__all__ = [
    "DatasetError",
    "DetrDatasetMapper",
    "SHAPE_CLASSES",
    "as_rgb",
    "build_train_loader",
    "check_image",
    "class_names",
    "detr_augmentations",
    "draw_scene",
    "num_classes",
    "read_image",
    "register_coco",
    "register_shapes",
    "require_dataset",
    "set_start_batch",
    "write_shapes",
]
