"""The official names of this project's tensors."""

import re
from typing import Callable, Dict, Iterable, List, Match, Tuple, Union

# What turns a name here into an official one: every rule is applied, in this order.
_RULES: List[Tuple[str, Union[str, Callable[[Match[str]], str]]]] = [
    (r"^backbone\.", r"backbone.0.body."),
    (r"body\.stem\.", r"body."),
    (r"body\.res2\.", r"body.layer1."),
    (r"body\.res3\.", r"body.layer2."),
    (r"body\.res4\.", r"body.layer3."),
    (r"body\.res5\.", r"body.layer4."),
    (r"(body\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"(body\..*)shortcut\.norm\.", r"\1downsample.1."),
    (r"(body\..*)shortcut\.", r"\1downsample.0."),
    (r"^neck\.projections\.res3\.", r"input_proj_512."),
    (r"^neck\.projections\.res4\.", r"input_proj_1024."),
    (r"^neck\.projections\.res5\.", r"input_proj_2048."),
    (r"^neck\.extra\.0\.", r"input_proj_2048_3."),
    (r"^scale_embed\.weight$", r"transformer.level_embed"),
    (r"^encoder\.reduce\.", r"transformer.conv."),
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"\.self_attention\.", r".self_attn."),
    (r"\.co_attention\.", r".multihead_attn."),
    (r"\.intra\.0\.", r".self_attn_8."),
    (r"\.intra\.1\.", r".self_attn_16."),
    (r"\.intra\.2\.", r".self_attn_32."),
    (r"\.intra\.3\.", r".self_attn_64."),
    (r"\.down\.(\d)\.", lambda match: f".high_to_low_{int(match[1]) + 1}."),
    (r"\.up\.(\d)\.", lambda match: f".low_to_high_{int(match[1]) + 1}."),
    (r"\.conv_in\.", r".conv_1."),
    (r"\.conv_out\.", r".conv_2."),
    (r"(encoder\.layers\.\d+)\.norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.ffn\.norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.ffn\.norm\.", r"\1.norm3."),
    (r"\.ffn\.linear", r".linear"),
    (r"\.input_norm\.", r".norm4."),
    (r"\.center\.", r".point1."),
    (r"\.modulation\.offset\.", r".point2."),
    (r"\.modulation\.spread\.", r".point3."),
    (r"\.scale_weight\.", r".point4."),
    (r"^box_embed\.", r"bbox_embed."),
    # torchvision's MLP has an activation and a dropout after each linear layer.
    (r"(bbox_embed|point1)\.(\d)\.", lambda match: f"{match[1]}.layers.{int(match[2]) // 3}."),
]


def official_names(names: Iterable[str]) -> Dict[str, str]:
    """The official name of each tensor of a model here, or of its encoder or decoder."""
    names, rules = list(names), list(_RULES)
    # The only projection has no number, nor has the only convolution between scales.
    if not any(name.startswith("neck.projections.res4") for name in names):
        rules.append((r"input_proj_2048\.", "input_proj."))
    if not any(".down.1." in name for name in names):
        rules.append((r"\.(high_to_low|low_to_high)_1\.", r".\1."))
    result = {}
    for name in names:
        result[name] = name
        for pattern, replacement in rules:
            result[name] = re.sub(pattern, replacement, result[name])
    return result
