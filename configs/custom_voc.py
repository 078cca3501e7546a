"""Your own data in Pascal VOC's format, an XML file for each image:

    python train_net.py --config-file configs/custom_voc.py \
        data.train_images=train data.train_annotations=train \
        data.val_images=val data.val_annotations=val

With VOC's own folders, ``data.train_images=VOC2007/JPEGImages``,
``data.train_annotations=VOC2007/Annotations`` and
``data.train_list=VOC2007/ImageSets/Main/train.txt``, and so for val. The classes are those of the
training objects, by the alphabet, or ``'data.names=[cat,dog]'``. All else is as in
``custom_coco.py``.
"""

from detectron2.config import LazyCall as L

from smca.data import class_names, coco_from_voc

from .custom_coco import dataloader, lr_multiplier, model, optimizer, train

data = dict(
    train_images="???",
    train_annotations="???",
    train_list=None,
    val_images="???",
    val_annotations="???",
    val_list=None,
    names=None,
    train_json=L(coco_from_voc)(
        images="${data.train_images}",
        annotations="${data.train_annotations}",
        names="${data.names}",
        image_list="${data.train_list}",
    ),
    val_json=L(coco_from_voc)(
        images="${data.val_images}",
        annotations="${data.val_annotations}",
        names=L(class_names)(json_file="${data.train_json}"),
        image_list="${data.val_list}",
    ),
    check_images=True,  # decode every image once before training starts
)
