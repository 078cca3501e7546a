"""Your own data in Pascal VOC's format on a CPU, see `custom_small.py` and `custom_voc.py`:

    python train_net.py --config-file configs/custom_small_voc.py \
        data.train_images=train data.train_annotations=train \
        data.val_images=val data.val_annotations=val
"""

from .custom_small import dataloader, lr_multiplier, model, optimizer, train
from .custom_voc import data
