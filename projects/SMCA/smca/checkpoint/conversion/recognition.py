"""Which model a checkpoint's tensors belong to, by their names and shapes."""

import re
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from smca.errors import CheckpointError
from smca.modeling.weight_map import MAPS

__all__ = ["recognize_detr", "recognize_smca", "has", "resnet_depth"]

_NUM_HEADS = 8
_OFFICIAL_SPREADS = {
    "fixed": "type1",
    "single": "type2",
    "independent": "type3",
    "covariance": "type4",
}
_STRIDES_OF_SCALES = {1: "stride 32", 3: "strides 16, 32, 64", 4: "strides 8, 16, 32, 64"}
# (basic or bottleneck block, blocks in the third stage) of ResNets
_RESNET_DEPTHS = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}


def recognize_smca(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    """Config, settings (keys of the config), description and notes."""
    depth = resnet_depth(state_dict)
    settings, notes = _common_settings(state_dict, depth), []
    base = 101 if depth == 101 else 50
    if has(state_dict, r"input_proj\."):
        kind, num_scales, name = "one scale", 1, "smca_single_scale_r50_50ep"
    elif has(state_dict, r"input_proj_512\."):
        kind, num_scales, name = "convolutional encoder", 4, f"smca_conv_r{base}_50ep"
        settings.update(_conv_encoder_settings(state_dict))
    else:
        kind, num_scales, name = "several scales", 3, f"smca_r{base}_50ep"
        notes.append(_assume_pattern(settings))
    has_offsets = has(state_dict, r".*\.point2\.")
    spread = _spread(state_dict, num_scales * (_NUM_HEADS if has_offsets else 1))
    settings["model.decoder.modulation.per_head"] = has_offsets
    settings["model.decoder.modulation.map"] = f"smca.modeling.{MAPS[spread].__name__}"
    if num_scales > 1:
        settings["model.decoder.scale_selection"] = has(state_dict, r".*\.point4\.")
    description = (
        f"SMCA, {kind} ({_STRIDES_OF_SCALES[num_scales]}), spread {spread} "
        f"({_OFFICIAL_SPREADS[spread]}), {_describe(settings)}"
    )
    return name, settings, description, notes


def recognize_detr(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    settings = _common_settings(state_dict, resnet_depth(state_dict))
    notes = [
        "Weights do not show whether the last stage is dilated: for DC5 add "
        "model.backbone.dilated_res5=True."
    ]
    return "detr_r50_50ep", settings, f"DETR, {_describe(settings)}", notes


def _common_settings(state_dict: Dict[str, Tensor], depth: int) -> Dict[str, Any]:
    encoder, decoder = "transformer.encoder.layers.", "transformer.decoder.layers."
    num_queries, embed_dim = _shape(state_dict, "query_embed.weight")
    return {
        "model.backbone.depth": depth,
        "model.embed_dim": embed_dim,
        "model.num_queries": num_queries,
        "model.num_classes": _shape(state_dict, "class_embed.weight")[0],
        "model.encoder.pattern": "I" * _num_layers(state_dict, encoder),
        "model.encoder.ffn_dim": _shape(state_dict, encoder + "0.linear1.weight")[0],
        "model.decoder.num_layers": _num_layers(state_dict, decoder),
        "model.decoder.ffn_dim": _shape(state_dict, decoder + "0.linear1.weight")[0],
    }


def _conv_encoder_settings(state_dict: Dict[str, Tensor]) -> Dict[str, Any]:
    kernel = _shape(state_dict, "transformer.encoder.layers.0.self_attn_8.weight")
    return {
        "model.encoder.pattern": None,
        "model.encoder.num_layers": _num_layers(state_dict, "transformer.encoder.layers."),
        "model.encoder.kernel_size": kernel[-1],
        "model.encoder.share_cross_scale": has(state_dict, r".*\.high_to_low\."),
        "model.encoder.pointwise": has(state_dict, r".*\.conv_1\."),
    }


def _assume_pattern(settings: Dict[str, Any]) -> str:
    """One multi-scale layer in the middle, as in the paper's best model."""
    num_layers = len(settings["model.encoder.pattern"])
    pattern = "I" * (num_layers // 2) + "M" + "I" * (num_layers - num_layers // 2 - 1)
    settings["model.encoder.pattern"] = pattern
    return (
        f'Weights do not show which encoder layers are multi-scale: "{pattern}" is assumed, '
        "set model.encoder.pattern if it is another."
    )


def _spread(state_dict: Dict[str, Tensor], num_gaussians: int) -> str:
    outputs = {key: len(v) for key, v in state_dict.items() if key.endswith(".point3.bias")}
    if not outputs:
        return "fixed"
    # The layers have to agree; one that does not is found later.
    key, num_outputs = min(outputs.items())
    for spread in _OFFICIAL_SPREADS:
        if len(MAPS[spread].initial_spreads) * num_gaussians == num_outputs:
            return spread
    raise CheckpointError(f"has {num_outputs} outputs in {key}, which fits no kind of spread.")


def _describe(settings: Dict[str, Any]) -> str:
    conv = ""
    if settings["model.encoder.pattern"] is None:
        shared = "shared" if settings["model.encoder.share_cross_scale"] else "separate"
        conv = (
            f"{settings['model.encoder.num_layers']} encoder layers of kernel "
            f"{settings['model.encoder.kernel_size']}, {shared} convolutions between scales, "
            f"{'with' if settings['model.encoder.pointwise'] else 'without'} 1x1 convolutions, "
        )
    return (
        f"{conv}ResNet-{settings['model.backbone.depth']}, {settings['model.num_queries']} queries,"
        f" {settings['model.num_classes']} class outputs"
    )


def resnet_depth(state_dict: Dict[str, Tensor]) -> int:
    prefix = "backbone.0.body."
    is_bottleneck = f"{prefix}layer1.0.conv3.weight" in state_dict
    num_blocks = _num_layers(state_dict, f"{prefix}layer3.")
    depth = _RESNET_DEPTHS.get((is_bottleneck, num_blocks))
    if depth is None:
        raise CheckpointError(
            f"has another backbone than a ResNet-18, 34, 50 or 101 ({num_blocks} blocks in layer3)."
        )
    return depth


def has(state_dict: Dict[str, Tensor], pattern: str) -> bool:
    return any(re.match(pattern, key) for key in state_dict)


def _num_layers(state_dict: Dict[str, Tensor], prefix: str) -> int:
    names = [key[len(prefix) :].split(".")[0] for key in state_dict if key.startswith(prefix)]
    return 1 + max((int(name) for name in names if name.isdigit()), default=-1)


def _shape(state_dict: Dict[str, Tensor], key: str) -> torch.Size:
    if key not in state_dict:
        raise CheckpointError(f"lacks {key}.")
    if state_dict[key].dim() < 2:
        raise CheckpointError(f"has {key} with a shape of {tuple(state_dict[key].shape)}.")
    return state_dict[key].shape
