"""SMCA with the convolutional encoder on strides 8, 16, 32 and 64 ("new multi scale")."""

from detectron2.config import LazyCall as L

from smca.modeling import ConvEncoder, count_scales

from .smca import model

model.in_features = ["res3", "res4", "res5"]
model.num_extra_scales = 1
model.encoder = L(ConvEncoder)(
    num_layers=6,
    kernel_size=7,
    share_cross_scale=True,
    pointwise=True,
    num_scales=L(count_scales)(
        in_features="${...in_features}", num_extra_scales="${...num_extra_scales}"
    ),
    reduce_finest=True,
    embed_dim="${..embed_dim}",
    ffn_dim=1024,
    dropout="${..dropout}",
    checkpointing=False,
)
