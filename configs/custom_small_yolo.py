"""Your own data in YOLO's format on a CPU:

    python train_net.py --config-file configs/custom_small_yolo.py data.yaml=my_data/data.yaml

See ``custom_small.py`` and ``custom_yolo.py``.
"""

from .custom_small import dataloader, lr_multiplier, model, optimizer, train
from .custom_yolo import data
