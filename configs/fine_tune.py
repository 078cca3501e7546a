"""Trained weights onto your own data in COCO format, with no code:

    python train_net.py --config-file configs/fine_tune.py \
        base.config=smca_r50_50ep train.init_checkpoint=smca_r50.pth \
        data.train_json=train.json data.train_images=images \
        data.val_json=val.json data.val_images=images

``base.config`` names the config that the weights were trained with (or is its path); the model and
the sizes of images are its. Classes that the weights know by name keep what they learned, others
start anew. See docs/fine_tuning.md.
"""

from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler

from smca.data import num_images
from smca.solver import layer_lr_factor, steps_of_epochs

from .custom_coco import data, dataloader, model, optimizer, train

base = dict(config="smca_r50_50ep")

# Half of the rate that the weights were trained with, and that of each part is a setting.
optimizer.lr = 5e-5
optimizer.params.lr_factor_func = L(layer_lr_factor)(
    factors=dict(
        backbone=0.1,
        neck=1.0,
        encoder=1.0,
        decoder=1.0,
        query_embed=1.0,
        box_embed=1.0,
        class_embed=1.0,
    )
)
lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(CosineParamScheduler)(start_value=1.0, end_value=0.01),
    warmup_factor=0.01,
    warmup_length=0.05,
)


def in_steps(epochs):
    """Iterations of so many epochs of the training data."""
    return L(steps_of_epochs)(
        epochs=epochs,
        num_images=L(num_images)(json_file="${data.train_json}"),
        batch_size="${dataloader.train.total_batch_size}",
        accumulate="${train.accumulate}",
    )


train.init_checkpoint = "???"
train.max_epochs = 50
train.eval_epochs = 2  # an evaluation and a checkpoint after so many
train.max_iter = in_steps("${train.max_epochs}")
train.eval_period = in_steps("${train.eval_epochs}")
train.checkpointer.period = in_steps("${train.eval_epochs}")
train.early_stopping = 5  # evaluations in a row without a better train.best_metric
