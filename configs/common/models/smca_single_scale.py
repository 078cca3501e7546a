"""SMCA on one scale: stride 32, six encoder layers of width 2048."""

from .smca import model

model.in_features = ["res5"]
model.num_extra_scales = 0
model.encoder.pattern = "IIIIII"
model.encoder.ffn_dim = 2048
model.decoder.ffn_dim = 2048
