"""A small SMCA that learns from scratch on a CPU: one basic block a stage up to stride 16, group
norm, which small batches can train, and 128 channels."""

from detectron2.config import LazyCall as L

from smca.modeling import PyramidEncoder

from .smca_plus import model

model.backbone.update(depth=18, num_blocks=[1, 1, 1], norm="GN", freeze_at=0)
model.in_features = ["res2", "res3", "res4"]
model.num_extra_scales = 0
model.encoder = L(PyramidEncoder)(
    num_scales="${..decoder.num_scales}",
    embed_dim="${..embed_dim}",
    num_heads=8,
    ffn_dim=512,
    hidden_dim=64,
    dropout="${..dropout}",
)
# Queries come from stride 4 as well, whose cells are too many to attend to.
model.decoder.update(num_layers=3, ffn_dim=512, read=[1, 2])
model.denoising.groups = 1
model.num_queries = 40
model.embed_dim = 128
model.dropout = 0.0
