"""AdamW; the backbone at a tenth of the learning rate."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

from smca.solver import backbone_lr_factor

optimizer = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        # params.model is filled in by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
        lr_factor_func=L(backbone_lr_factor)(factor=0.1),
    ),
    lr=1e-4,
    weight_decay=1e-4,
    fused=True,
)
