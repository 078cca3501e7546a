"""COCO 2017 through Detectron2's catalog (``DETECTRON2_DATASETS``), with DETR's augmentation."""

from detectron2.config import LazyCall as L
from detectron2.data import build_detection_test_loader, get_detection_dataset_dicts

from smca.data import CocoEvaluator, DetrDatasetMapper, build_train_loader, detr_augmentations

dataloader = dict(
    train=L(build_train_loader)(
        # Images without objects are kept: an epoch has all 118,287.
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_train", filter_empty=False),
        mapper=L(DetrDatasetMapper)(
            is_train=True,
            augmentations=L(detr_augmentations)(),
            augmentations_with_crop=L(detr_augmentations)(crop_range=(384, 600)),
        ),
        total_batch_size=16,
        num_workers=4,
        seed="${train.seed}",
    ),
    test=L(build_detection_test_loader)(
        dataset=L(get_detection_dataset_dicts)(names="coco_2017_val", filter_empty=False),
        mapper=L(DetrDatasetMapper)(
            is_train=False, augmentations=L(detr_augmentations)(short_sides=800, flip=False)
        ),
        num_workers=4,
    ),
    evaluator=L(CocoEvaluator)(dataset_name="${..test.dataset.names}"),
)
