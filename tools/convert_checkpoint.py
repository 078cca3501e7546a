#!/usr/bin/env python
"""
Convert a checkpoint of another origin into one that the configs of this project can load:

    convert_checkpoint.py --input official.pth --output smca.pth
    convert_checkpoint.py --input official.pth --output smca.pth --classes keep

It takes the official SMCA models, DETR's as an initialization for the detr configs, and
torchvision's ResNets as a backbone, finds out which model it is, and says with which config to use
it.
"""

import argparse
import os
import re
import sys
from typing import Any, Dict, Iterable, List, Mapping, NamedTuple, Optional, Sequence, Tuple

from smca.checkpoint.files import load_tensors, reading, write_atomically
from smca.config import get_config
from smca.errors import CheckpointError, command_line, differing, exit_code, some, writing
from smca.modeling import build_resnet
from smca.modeling.weight_map import MAPS
from smca.version import __version__

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf
from torch import Tensor, nn

# COCO's category ids up to 90; 80 of them are used. The official class heads have an output for
# each id, and one or two more.
_COCO_NAMES = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
_COCO_OUTPUTS = (91, 92)


class Conversion(NamedTuple):
    model: Dict[str, Tensor]  # under this project's names
    description: str  # what was recognized, in words
    config: Optional[str]  # name of the one whose model it is, None for a backbone
    overrides: List[str]  # texts ``key=value``, to add to that config
    class_names: List[str]  # of the class outputs, none if they are not COCO's
    notes: List[str]  # sentences on what was assumed, changed or left out


def convert_file(input_path: str, output_path: str, classes: str = "coco80") -> Conversion:
    """Read a checkpoint of another origin, a path or URL of a .pth file, and write it as one of
    Detectron2's, whole or not at all. Beside the weights it says, under the key ``smca``, which
    config it belongs to. `classes` and errors are those of `convert`."""
    if not output_path.endswith(".pth"):
        raise CheckpointError(f"The output {output_path} needs a name that ends in .pth.")
    with reading(input_path):
        local_path = PathManager.get_local_path(input_path)
        if os.path.realpath(local_path) == os.path.realpath(output_path):
            raise CheckpointError(f"The output {output_path} is the input: give it another name.")
        state_dict = read_state_dict(local_path)
    try:
        conversion = convert(state_dict, classes)
    except CheckpointError as error:
        raise CheckpointError(f"{input_path} {error}") from error
    provenance = {
        "config": conversion.config and f"{conversion.config}.py",
        "overrides": conversion.overrides,
        "class_names": conversion.class_names,
        "converted_from": os.path.basename(input_path),
        "version": __version__,
    }
    checkpoint = {"model": conversion.model, "smca": provenance}
    with writing(f"The output {output_path}"):
        write_atomically(output_path, lambda file: torch.save(checkpoint, file))
    return conversion


def convert(state_dict: Mapping[str, Tensor], classes: str = "coco80") -> Conversion:
    """Tensors of an official SMCA or DETR model, or a torchvision ResNet, in this project's form.

    Args:
        state_dict: the tensors.
        classes: "coco80" picks the class outputs of COCO's 80 classes, in Detectron2's order;
            "keep" leaves all.

    Raises:
        CheckpointError: they are no such model. The message lacks its subject, the file.
    """
    # Batch norms' counters are in some files, and nothing uses them.
    state_dict = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    if has(state_dict, r"layer1\."):
        return _convert_resnet(state_dict)
    if not has(state_dict, r"transformer\.decoder\.layers\."):
        raise CheckpointError(
            "is no checkpoint of an official SMCA or DETR model nor of a torchvision ResNet: its "
            f"tensors are called {some(sorted(state_dict))}."
        )
    is_smca = has(state_dict, r".*\.point1\.")
    find = recognize_smca if is_smca else recognize_detr
    name, settings, description, notes = find(state_dict)
    config = LazyConfig.apply_overrides(get_config(name), _overrides(name, settings))
    with torch.device("meta"):
        expected = instantiate(config.model).state_dict()
    model = _match(state_dict, expected)
    if not is_smca:
        notes.append(_softmax_to_sigmoid(model))
    class_names = _choose_classes(model, classes, notes)
    settings["model.num_classes"] = len(model["class_embed.bias"])
    return Conversion(model, description, name, _overrides(name, settings), class_names, notes)


def _convert_resnet(state_dict: Mapping[str, Tensor]) -> Conversion:
    tensors = {f"backbone.0.body.{k}": v for k, v in state_dict.items() if not k.startswith("fc.")}
    depth = resnet_depth(tensors)
    with torch.device("meta"):
        resnet = build_resnet(depth=depth, out_features=["res5"], norm="FrozenBN", freeze_at=2)
        expected = nn.ModuleDict({"backbone": resnet}).state_dict()
    notes = [f"It fits any config with model.backbone.depth={depth}; a classifier is left out."]
    model = _match(tensors, expected)
    return Conversion(model, f"torchvision's ResNet-{depth}", None, [], [], notes)


def read_state_dict(path: str) -> Dict[str, Tensor]:
    """The tensors in a checkpoint, or in its entry ``model`` or ``state_dict`` if it has one."""
    # Command line arguments, which the official training script keeps beside the weights.
    with reading(path), torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = load_tensors(path)
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise CheckpointError(f"{path} holds no tensors by name.")
    wrong = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"{path} holds other things than tensors: {some(wrong)}.")
    return dict(checkpoint)


def _overrides(name: str, settings: Dict[str, Any]) -> List[str]:
    """Those of the settings that differ from the config."""
    config = get_config(name)
    return [
        f"{key}={value}"
        for key, value in settings.items()
        if value is not None and OmegaConf.select(config, key) != value
    ]


def _match(state_dict: Dict[str, Tensor], expected: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The official tensors under the expected names; each has to be there, and no other."""
    names = {
        official: name
        for name, official in official_names(expected).items()
        if not name.endswith("num_batches_tracked")
    }
    wrong_shapes = [
        f"{key} ({tuple(state_dict[key].shape)}, not {tuple(expected[name].shape)})"
        for key, name in names.items()
        if key in state_dict and state_dict[key].shape != expected[name].shape
    ]
    problems = differing(
        {
            "missing": [key for key in names if key not in state_dict],
            "unknown": [key for key in state_dict if key not in names],
            "of another shape": wrong_shapes,
        }
    )
    if problems:
        raise CheckpointError(f"does not have the tensors of its model: {problems}.")
    return {name: state_dict[key].detach().clone() for key, name in names.items()}


def _softmax_to_sigmoid(model: Dict[str, Tensor]) -> str:
    """Turn a softmax class head whose last output means no object into one for the sigmoid."""
    for key in ("class_embed.weight", "class_embed.bias"):
        # sigmoid(l_c - l_none) = p_c / (p_c + p_none).
        model[key] = model[key][:-1] - model[key][-1:]
    return (
        "It is an initialization for training with focal loss. The class head's last output (no "
        "object) is subtracted from the others and left out, so that a class's sigmoid is its "
        "probability against no object; all other weights are kept as they are."
    )


def _choose_classes(model: Dict[str, Tensor], classes: str, notes: List[str]) -> List[str]:
    """Keep the chosen outputs of the class head, and return their names if they are COCO's."""
    num_outputs = len(model["class_embed.bias"])
    if classes == "keep":
        if num_outputs not in _COCO_OUTPUTS:
            return []
        return [_COCO_NAMES.get(index, f"unused {index}") for index in range(num_outputs)]
    if num_outputs not in _COCO_OUTPUTS:
        raise CheckpointError(
            f"has {num_outputs} class outputs, from which COCO's 80 cannot be picked: convert it "
            "with --classes keep."
        )
    rows = sorted(_COCO_NAMES)
    for key in ("class_embed.weight", "class_embed.bias"):
        model[key] = model[key][rows].clone()
    notes.append(
        f"Of {num_outputs} class outputs the 80 of COCO's classes are kept, in Detectron2's order."
    )
    return [_COCO_NAMES[row] for row in rows]


# Which model it is, by the names and shapes of its tensors

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


# Names

# What turns a name here into an official one: every rule is applied, in this order.
_RULES: List[Tuple[str, Any]] = [
    (r"^backbone\.", r"backbone.0.body."),
    (r"body\.stem\.", r"body."),
    (r"body\.res(\d)\.", lambda match: f"body.layer{int(match[1]) - 1}."),
    (r"(body\..*)conv(\d)\.norm\.", r"\1bn\2."),
    (r"(body\..*)shortcut\.norm\.", r"\1downsample.1."),
    (r"(body\..*)shortcut\.", r"\1downsample.0."),
    (r"^neck\.projections\.res(\d)\.", lambda match: f"input_proj_{64 << int(match[1])}."),
    (r"^neck\.extra\.0\.", r"input_proj_2048_3."),
    (r"^scale_embed\.weight$", r"transformer.level_embed"),
    (r"^encoder\.reduce\.", r"transformer.conv."),
    (r"^(encoder|decoder)\.", r"transformer.\1."),
    (r"\.self_attention\.", r".self_attn."),
    (r"\.co_attention\.", r".multihead_attn."),
    (r"\.intra\.(\d)\.", lambda match: f".self_attn_{8 << int(match[1])}."),
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


# The command line


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    parser.add_argument("--input", required=True, metavar="FILE", help="checkpoint to read")
    parser.add_argument("--output", required=True, metavar="FILE", help=".pth file to write")
    parser.add_argument(
        "--classes",
        choices=("coco80", "keep"),
        default="coco80",
        help="coco80: the outputs of COCO's 80 classes, in Detectron2's order (default); "
        "keep: all outputs, which are COCO's category ids",
    )
    return parser


def run(args: argparse.Namespace) -> None:
    conversion = convert_file(args.input, args.output, args.classes)
    print(f"{args.input} is {conversion.description}.")
    for note in conversion.notes:
        print(note)
    print(f"Written: {args.output}")
    config = f"--config-file configs/{conversion.config or 'NAME'}.py"
    weights = f"train.init_checkpoint={args.output}"
    print("Use it with", " ".join([config, weights, *conversion.overrides]))


def main(argv: Optional[Sequence[str]] = None) -> int:
    return exit_code(run, get_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
