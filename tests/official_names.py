"""
The tensors' names in the released checkpoints, written from these (golden/*.json lists them) and
independently of the package's converter.
"""

import re

NECK = {
    "neck.projections.res3": "input_proj_512",
    "neck.projections.res4": "input_proj_1024",
    "neck.projections.res5": "input_proj_2048",
    "neck.extra.0": "input_proj_2048_3",
}
SINGLE_SCALE_NECK = {"neck.projections.res5": "input_proj"}
HEADS = {
    "query_embed": "query_embed",
    "class_embed": "class_embed",
    "box_embed.0": "bbox_embed.layers.0",
    "box_embed.3": "bbox_embed.layers.1",
    "box_embed.6": "bbox_embed.layers.2",
    "encoder.reduce": "transformer.conv",
    "decoder.norm": "transformer.decoder.norm",
}
ENCODER_LAYER = {
    "self_attention": "self_attn",
    "norm": "norm1",
    "ffn.linear1": "linear1",
    "ffn.linear2": "linear2",
    "ffn.norm": "norm2",
    # Of the convolutional encoder, instead of attention; by stride.
    "intra.0": "self_attn_8",
    "intra.1": "self_attn_16",
    "intra.2": "self_attn_32",
    "intra.3": "self_attn_64",
    "conv_in": "conv_1",
    "conv_out": "conv_2",
}
CROSS_SCALE = {
    "down.0": "high_to_low_1",  # from stride 8 to 16
    "down.1": "high_to_low_2",
    "down.2": "high_to_low_3",
    "up.0": "low_to_high_1",  # from stride 16 to 8
    "up.1": "low_to_high_2",
    "up.2": "low_to_high_3",
}
SHARED_CROSS_SCALE = {"down.0": "high_to_low", "up.0": "low_to_high"}
DECODER_LAYER = {
    "self_attention": "self_attn",
    "norm1": "norm1",
    "co_attention": "multihead_attn",
    "norm2": "norm2",
    "ffn.linear1": "linear1",
    "ffn.linear2": "linear2",
    "ffn.norm": "norm3",
    "input_norm": "norm4",
    "center.0": "point1.layers.0",
    "center.3": "point1.layers.1",
    "center.6": "point1.layers.2",
    "modulation.offset": "point2",
    "modulation.spread": "point3",
    "scale_weight": "point4",
}
# torchvision's ResNet.
STEM = {"stem.conv1.norm": "bn1", "stem.conv1": "conv1"}
BLOCK = {
    "conv1.norm": "bn1",
    "conv1": "conv1",
    "conv2.norm": "bn2",
    "conv2": "conv2",
    "conv3.norm": "bn3",
    "conv3": "conv3",
    "shortcut.norm": "downsample.1",
    "shortcut": "downsample.0",
}


def translate(name, table):
    """The name with the first module of the table that it begins with in the official words."""
    for ours, official in table.items():
        if name.startswith(ours + "."):
            return official + name[len(ours) :]
    raise KeyError(name)


def official_names(names):
    """
    Args:
        names: all of a detector, or all of its encoder (``encoder....``) or decoder.

    Returns:
        dict[str, str]: the official name of each.
    """
    names = list(names)
    is_shared = not any(".down.1." in name for name in names)
    is_single = not any(name.startswith("neck.projections.res4.") for name in names)
    neck = SINGLE_SCALE_NECK if is_single else NECK
    encoder_layer = {**ENCODER_LAYER, **(SHARED_CROSS_SCALE if is_shared else CROSS_SCALE)}
    result = {}
    for name in names:
        if match := re.fullmatch(r"(encoder|decoder)\.layers\.(\d+)\.(.+)", name):
            part, number, rest = match.groups()
            table = encoder_layer if part == "encoder" else DECODER_LAYER
            official = f"transformer.{part}.layers.{number}.{translate(rest, table)}"
        elif match := re.fullmatch(r"backbone\.res(\d)\.(\d+)\.(.+)", name):
            stage, number, rest = match.groups()
            official = f"backbone.0.body.layer{int(stage) - 1}.{number}.{translate(rest, BLOCK)}"
        elif name.startswith("backbone."):
            official = f"backbone.0.body.{translate(name[len('backbone.') :], STEM)}"
        elif name == "scale_embed.weight":
            official = "transformer.level_embed"
        else:
            official = translate(name, {**neck, **HEADS})
        result[name] = official
    assert len(set(result.values())) == len(names)
    return result


def official_state_dict(module, part=""):
    """The parameters themselves, under the official names: gradients reach the module.

    Args:
        part: "encoder" or "decoder" if the module is that of a detector.
    """
    prefix = f"{part}." if part else ""
    parameters = {prefix + name: value for name, value in module.named_parameters()}
    return {official: parameters[name] for name, official in official_names(parameters).items()}
