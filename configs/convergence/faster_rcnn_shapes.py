"""Detectron2's Faster R-CNN with a feature pyramid in the size of `smca_shapes.py`: the same
blocks, group norm, and 128 channels, from scratch, with the same images and schedule."""

from detectron2.model_zoo import get_config

from ..smca_shapes import dataloader, lr_multiplier, optimizer, train
from ..smca_shapes import model as _smca

model = get_config("common/models/mask_rcnn_fpn.py").model

model.backbone.bottom_up = _smca.backbone
model.backbone.bottom_up.update(num_blocks=[1, 1, 1], out_features=["res2", "res3", "res4"])
model.backbone.update(out_channels=128, norm="GN", top_block=None)
# Sizes, in pixels and in numbers, follow from images of 128 pixels in place of 800.
model.proposal_generator.update(
    in_features=["p2", "p3", "p4"],
    pre_nms_topk=(500, 300),
    post_nms_topk=(300, 100),
)
model.proposal_generator.head.update(in_channels=128, num_anchors=6)
model.proposal_generator.anchor_generator.update(
    sizes=[[16, 24], [32, 48], [64, 96]], strides=[4, 8, 16]
)
_heads = model.roi_heads
for part in ("mask_in_features", "mask_pooler", "mask_head"):
    _heads.pop(part)
_heads.update(num_classes=_smca.num_classes, batch_size_per_image=64)
_heads.box_in_features = ["p2", "p3", "p4"]
_heads.box_pooler.update(
    scales=[1 / 4, 1 / 8, 1 / 16], canonical_box_size=56, canonical_level=3, sampling_ratio=2
)
_heads.box_head.update(fc_dims=[256, 256])
_heads.box_head.input_shape.channels = 128
_heads.box_predictor.input_shape.channels = 256

model.update(pixel_mean=_smca.pixel_mean, pixel_std=_smca.pixel_std, input_format="RGB")
