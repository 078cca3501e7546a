"""Muon, with which models learn from scratch in far fewer steps than with AdamW. Nothing is
pretrained: all parts learn at one rate."""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler, get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler

from smca.solver import Muon

optimizer = L(Muon)(
    params=L(get_default_optimizer_params)(
        # params.model is filled in by the training script
        base_lr="${..lr}",
        weight_decay="${..weight_decay}",
    ),
    lr=4e-3,
    weight_decay=1e-4,
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_factor=0.01,
    warmup_length=0.1,
)
