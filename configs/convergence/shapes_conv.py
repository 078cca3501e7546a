"""`shapes_multi_scale.py` with the convolutional encoder. The decoder reads its three scales as
they are; a finer one, which the published model reduces first, would take most of the time."""

from detectron2.config import LazyCall as L

from smca.modeling import ConvEncoder

from ..smca_shapes import optimizer
from .shapes_multi_scale import dataloader, lr_multiplier, model, train

model.encoder = L(ConvEncoder)(
    num_layers=5,
    kernel_size=5,
    num_scales="${..decoder.num_scales}",
    reduce_finest=False,
    embed_dim="${..embed_dim}",
    ffn_dim="${..decoder.ffn_dim}",
    dropout="${..dropout}",
)
