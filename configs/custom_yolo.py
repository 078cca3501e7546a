"""Your own data in YOLO's format, a text file of boxes for each image:

    python train_net.py --config-file configs/custom_yolo.py data.yaml=my_data/data.yaml

The file names the folders of the images (``train``, ``val``) and the classes (``names``). All else
is as in ``custom_coco.py``.
"""

from detectron2.config import LazyCall as L

from smca.data import coco_from_yolo, yolo_images

from .custom_coco import dataloader, lr_multiplier, model, optimizer, train

data = dict(
    yaml="???",
    train_json=L(coco_from_yolo)(data_yaml="${data.yaml}", split="train"),
    train_images=L(yolo_images)(data_yaml="${data.yaml}", split="train"),
    val_json=L(coco_from_yolo)(data_yaml="${data.yaml}", split="val"),
    val_images=L(yolo_images)(data_yaml="${data.yaml}", split="val"),
    check_images=True,  # decode every image once before training starts
)
