"""Data sets, reading and augmenting their images, and the training loader.

Importing this registers the embedded data set, and one like it whose objects differ ten times in
size.
"""

from smca.errors import DatasetError

from .coco import (
    as_list,
    category_ids,
    check_classes,
    class_names,
    dataset_dicts,
    image_ids,
    num_classes,
    num_images,
    register_coco,
    require_dataset,
)
from .coco_checks import (
    Problem,
    file_problems,
    forget_files,
    read_coco,
    record_problems,
    remarks_on,
    source_of,
)
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
from .mapper import DetrDatasetMapper, as_rgb, check_image, detr_augmentations, read_image
from .shapes import SHAPE_CLASSES, draw_scene, register_shapes, write_shapes
from .voc import coco_from_voc
from .yolo import coco_from_yolo, yolo_images

register_shapes()
register_shapes(prefix="smca_shapes_10x", lengths=(12, 120))
