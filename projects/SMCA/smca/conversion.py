"""The official checkpoints' tensors under this project's names."""

import re
from typing import Dict, Mapping

from torch import Tensor

# What an official name turns into, step by step: every substitution is applied, in this order.
_SUBSTITUTIONS = [
    # torchvision's ResNet; a batch norm belongs to its convolution
    (r"^backbone\.0\.body\.", r"backbone."),
    (r"^backbone\.(conv1|bn1)\.", r"backbone.stem.\1."),
    (r"^backbone\.layer1\.", r"backbone.res2."),
    (r"^backbone\.layer2\.", r"backbone.res3."),
    (r"^backbone\.layer3\.", r"backbone.res4."),
    (r"^backbone\.layer4\.", r"backbone.res5."),
    (r"^(backbone\..+)\.bn(\d)\.", r"\1.conv\2.norm."),
    (r"^(backbone\..+)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone\..+)\.downsample\.1\.", r"\1.shortcut.norm."),
    # projections and scale embedding
    (r"^input_proj\.", r"neck.projections.res5."),
    (r"^input_proj_512\.", r"neck.projections.res3."),
    (r"^input_proj_1024\.", r"neck.projections.res4."),
    (r"^input_proj_2048\.", r"neck.projections.res5."),
    (r"^input_proj_2048_3\.", r"neck.extra.0."),
    (r"^transformer\.level_embed$", r"scale_embed.weight"),
    # encoder, with attention or convolutions
    (r"^transformer\.conv\.", r"encoder.reduce."),
    (r"^transformer\.encoder\.", r"encoder."),
    (r"^(encoder\.layers\.\d+)\.self_attn_8\.", r"\1.intra.0."),
    (r"^(encoder\.layers\.\d+)\.self_attn_16\.", r"\1.intra.1."),
    (r"^(encoder\.layers\.\d+)\.self_attn_32\.", r"\1.intra.2."),
    (r"^(encoder\.layers\.\d+)\.self_attn_64\.", r"\1.intra.3."),
    (r"^(encoder\.layers\.\d+)\.high_to_low(_1)?\.", r"\1.down.0."),
    (r"^(encoder\.layers\.\d+)\.high_to_low_2\.", r"\1.down.1."),
    (r"^(encoder\.layers\.\d+)\.high_to_low_3\.", r"\1.down.2."),
    (r"^(encoder\.layers\.\d+)\.low_to_high(_1)?\.", r"\1.up.0."),
    (r"^(encoder\.layers\.\d+)\.low_to_high_2\.", r"\1.up.1."),
    (r"^(encoder\.layers\.\d+)\.low_to_high_3\.", r"\1.up.2."),
    (r"^(encoder\.layers\.\d+)\.conv_1\.", r"\1.conv_in."),
    (r"^(encoder\.layers\.\d+)\.conv_2\.", r"\1.conv_out."),
    (r"^(encoder\.layers\.\d+)\.norm1\.", r"\1.norm."),
    (r"^(encoder\.layers\.\d+)\.norm2\.", r"\1.ffn.norm."),
    # decoder
    (r"^transformer\.decoder\.", r"decoder."),
    (r"^(decoder\.layers\.\d+)\.multihead_attn\.", r"\1.co_attention."),
    (r"^(decoder\.layers\.\d+)\.norm3\.", r"\1.ffn.norm."),
    (r"^(decoder\.layers\.\d+)\.norm4\.", r"\1.input_norm."),
    (r"^(decoder\.layers\.\d+)\.point1\.", r"\1.centre."),
    (r"^(decoder\.layers\.\d+)\.point2\.", r"\1.modulation.offset."),
    (r"^(decoder\.layers\.\d+)\.point3\.", r"\1.modulation.spread."),
    (r"^(decoder\.layers\.\d+)\.point4\.", r"\1.scale_weight."),
    # both
    (r"^((?:en|de)coder\.layers\.\d+)\.self_attn\.", r"\1.self_attention."),
    (r"^((?:en|de)coder\.layers\.\d+)\.linear(\d)\.", r"\1.ffn.linear\2."),
    # heads
    (r"^bbox_embed\.", r"box_embed."),
    # torchvision's MLP has an activation and a dropout after each linear layer
    (r"^(box_embed|.+\.centre)\.layers\.0\.", r"\1.0."),
    (r"^(box_embed|.+\.centre)\.layers\.1\.", r"\1.3."),
    (r"^(box_embed|.+\.centre)\.layers\.2\.", r"\1.6."),
]


def official_to_ours(key: str) -> str:
    """The name here of an official tensor; a name that no official model has stays foreign."""
    for pattern, replacement in _SUBSTITUTIONS:
        key = re.sub(pattern, replacement, key)
    return key


def rename_official(state_dict: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The tensors of an official SMCA checkpoint under this project's names.

    Batch norms' counters, which nothing uses, are left out."""
    return {
        official_to_ours(key): tensor
        for key, tensor in state_dict.items()
        if not key.endswith("num_batches_tracked")
    }
