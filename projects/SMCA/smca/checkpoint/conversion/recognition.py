"""Which model a checkpoint's tensors belong to, by their names and shapes."""

import re
from typing import Any, Dict, List, Tuple

import torch
from torch import Tensor

from smca.errors import CheckpointError
from smca.modeling.weight_map import MAPS

_NUM_HEADS = 8
_SPREADS = ("fixed", "single", "independent", "covariance")  # type1 to type4 of the official code
# (basic or bottleneck block, blocks in the third stage) of ResNets
_RESNET_DEPTHS = {(False, 2): 18, (False, 6): 34, (True, 6): 50, (True, 23): 101}


def recognize_smca(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    """The config's name, settings (by keys of the config), a description, and notes."""
    depth = resnet_depth(state_dict)
    settings, notes = _common_settings(state_dict, depth), []
    base = 101 if depth == 101 else 50
    if has(state_dict, r"input_proj\."):
        kind, num_scales, name = "one scale", 1, "smca_single_scale_r50_50ep"
    elif has(state_dict, r"input_proj_512\."):
        kind, num_scales, name = "convolutional encoder", 4, f"smca_conv_r{base}_50ep"
        kernel = _shape(state_dict, "transformer.encoder.layers.0.self_attn_8.weight")
        settings.update(
            {
                "model.encoder.pattern": None,
                "model.encoder.num_layers": _num_layers(state_dict, "transformer.encoder.layers."),
                "model.encoder.kernel_size": kernel[-1],
                "model.encoder.share_cross_scale": has(state_dict, r".*\.high_to_low\."),
                "model.encoder.pointwise": has(state_dict, r".*\.conv_1\."),
            }
        )
    else:
        kind, num_scales, name = "several scales", 3, f"smca_r{base}_50ep"
        # One multi-scale layer in the middle, as in the paper's best model.
        num_layers = len(settings["model.encoder.pattern"])
        pattern = "I" * (num_layers // 2) + "M" + "I" * (num_layers - num_layers // 2 - 1)
        settings["model.encoder.pattern"] = pattern
        notes.append(
            f'Weights do not show which encoder layers are multi-scale: "{pattern}" is assumed, '
            "set model.encoder.pattern if it is another."
        )
    has_offsets = has(state_dict, r".*\.point2\.")
    spread = _spread(state_dict, num_scales * (_NUM_HEADS if has_offsets else 1))
    settings["model.decoder.modulation.per_head"] = has_offsets
    settings["model.decoder.modulation.map"] = f"smca.modeling.{MAPS[spread].__name__}"
    if num_scales > 1:
        settings["model.decoder.scale_selection"] = has(state_dict, r".*\.point4\.")
    return name, settings, f"SMCA, {kind}, ResNet-{depth}, spread {spread}", notes


def recognize_detr(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    depth = resnet_depth(state_dict)
    notes = [
        "Weights do not show whether the last stage is dilated: for DC5 add "
        "model.backbone.dilated_res5=True."
    ]
    settings = _common_settings(state_dict, depth)
    return "detr_r50_50ep", settings, f"DETR, ResNet-{depth}", notes


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


def _spread(state_dict: Dict[str, Tensor], num_gaussians: int) -> str:
    outputs = {key: len(v) for key, v in state_dict.items() if key.endswith(".point3.bias")}
    if not outputs:
        return "fixed"
    # The layers have to agree; one that does not is found later.
    key, num_outputs = min(outputs.items())
    for spread in _SPREADS:
        if len(MAPS[spread].initial_spreads) * num_gaussians == num_outputs:
            return spread
    raise CheckpointError(f"has {num_outputs} outputs in {key}, which fits no kind of spread.")


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
