"""Names of the official checkpoints' tensors."""

import re

# Where the package's names differ from the official checkpoints'. Norms have their own rules below.
OFFICIAL_NAMES = [
    (r"self_attention\.", r"self_attn."),
    (r"co_attention\.", r"multihead_attn."),
    (r"ffn\.linear", r"linear"),
    (r"input_norm\.", r"norm4."),
    (r"modulation\.offset\.", r"point2."),
    (r"modulation\.spread\.", r"point3."),
    (r"scale_weight\.", r"point4."),
    (r"conv_in\.", r"conv_1."),
    (r"conv_out\.", r"conv_2."),
]


def official_name(name, part, module):
    """A parameter of the encoder or decoder (`part`) in the official checkpoint."""
    if name.startswith("reduce."):
        return name.replace("reduce.", "transformer.conv.")
    for pattern, official in OFFICIAL_NAMES:
        name = re.sub(pattern, official, name)
    name = re.sub(r"ffn\.norm\.", "norm2." if part == "encoder" else "norm3.", name)
    if part == "encoder":
        name = re.sub(r"(layers\.\d+)\.norm\.", r"\1.norm1.", name)
    name = re.sub(r"centre\.(\d)\.", lambda m: f"point1.layers.{int(m[1]) // 3}.", name)
    name = re.sub(r"intra\.(\d)\.", lambda m: f"self_attn_{8 << int(m[1])}.", name)
    shared = not any(".down.1." in key for key, _ in module.named_parameters())
    for ours, theirs in (("down", "high_to_low"), ("up", "low_to_high")):
        name = re.sub(
            rf"\b{ours}\.(\d)\.",
            lambda m: f"{theirs}." if shared else f"{theirs}_{int(m[1]) + 1}.",
            name,
        )
    return f"transformer.{part}.{name}"


def official_state_dict(module, part):
    """The parameters themselves, under the official names: gradients reach the module."""
    return {official_name(n, part, module): p for n, p in module.named_parameters()}
