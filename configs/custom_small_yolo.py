"""Your own data in YOLO format on a CPU, see `custom_small.py` and `custom_yolo.py`:

python train_net.py --config-file configs/custom_small_yolo.py data.yaml=my_data/data.yaml
"""

from .custom_small import dataloader, lr_multiplier, model, optimizer, train
from .custom_yolo import data
