"""Data sets, reading and augmenting their images, and the training loader.

Importing this registers the embedded data set, and one like it whose objects differ ten times in
size.
"""

from smca.errors import DatasetError

from .coco import (
    as_list,
    category_ids,
    class_names,
    image_ids,
    num_classes,
    num_images,
    register_coco,
    require_dataset,
)
from .coco_checks import forget_files, read_coco
from .evaluator import CocoEvaluator
from .fitted import (
    fit_crop_range,
    fit_in_features,
    fit_max_size,
    fit_num_extra_scales,
    fit_num_iterations,
    fit_num_queries,
    fit_scales_to_read,
    fit_short_sides,
)
from .loader import build_train_loader, set_start_sample, spare_shared_memory
from .mapper import DetrDatasetMapper, as_rgb, detr_augmentations, read_image
from .shapes import SHAPE_CLASSES, draw_scene, register_shapes
from .voc import coco_from_voc
from .yolo import coco_from_yolo, yolo_images

register_shapes()
register_shapes(prefix="smca_shapes_10x", lengths=(12, 120))
