"""SMCA as in the paper: ResNet-50, strides 16, 32 and 64, encoder "IIMII"."""

from detectron2.config import LazyCall as L

from smca.modeling import (
    SMCA,
    Decoder,
    Modulation,
    SetCriterion,
    TransformerEncoder,
    build_resnet,
    count_scales,
)

model = L(SMCA)(
    backbone=L(build_resnet)(
        depth=50,
        out_features="${..in_features}",
        norm="FrozenBN",
        freeze_at=2,
        dilated_res5=False,
    ),
    in_features=["res4", "res5"],
    num_extra_scales=1,
    encoder=L(TransformerEncoder)(
        pattern="IIMII",
        embed_dim="${..embed_dim}",
        num_heads=8,
        ffn_dim=1024,
        dropout="${..dropout}",
        checkpointing=False,
    ),
    decoder=L(Decoder)(
        num_layers=6,
        modulation=L(Modulation)(
            map="smca.modeling.Gaussian", per_head=True, beta=8.0, offset_gain=None
        ),
        refine=False,
        scale_selection=True,
        num_scales=L(count_scales)(
            in_features="${...in_features}", num_extra_scales="${...num_extra_scales}"
        ),
        embed_dim="${..embed_dim}",
        num_heads=8,
        ffn_dim=1024,
        dropout="${..dropout}",
    ),
    queries=None,
    denoising=None,
    dense_head=None,
    share_heads=True,
    criterion=L(SetCriterion)(),
    num_classes=80,
    num_queries=300,
    embed_dim=256,
    dropout=0.1,
    max_detections=None,
    pixel_mean=[123.675, 116.28, 103.53],
    pixel_std=[58.395, 57.12, 57.375],
)
