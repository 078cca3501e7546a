"""What config files compute with ``${smca....}``."""

from omegaconf import OmegaConf

# Of the encoder and the decoder, from the settings that decide it.
OmegaConf.register_new_resolver(
    "smca.num_scales",
    lambda in_features, num_extra_scales: len(in_features) + num_extra_scales,
    replace=True,
)
