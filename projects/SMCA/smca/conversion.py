"""Checkpoints of other origin in Detectron2's format.

The official SMCA models, DETR's (as an initialisation) and torchvision's ResNets are told apart by
their tensors' names and shapes.
"""

import argparse
import os
import pickle
import re
import tempfile
from dataclasses import dataclass, field
from typing import Any, Dict, List, Mapping, Optional, Tuple

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf
from torch import Tensor, nn

from . import model_zoo
from .errors import CheckpointError
from .modeling import build_resnet
from .modeling.weight_map import SPREADS
from .version import __version__

__all__ = ["CLASS_CHOICES", "Conversion", "convert", "convert_file", "official_name"]

CLASS_CHOICES = ("coco80", "keep")

# COCO's category ids up to 90; 80 of them are used. The official class heads have an output for
# each id, and one or two more.
_COCO_NAMES = {c["id"]: c["name"] for c in COCO_CATEGORIES if c["isthing"]}
_COCO_OUTPUTS = (91, 92)
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

# What turns a name here into an official one: every rule is applied, in this order.
_RULES = [
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
    (r"\.centre\.", r".point1."),
    (r"\.modulation\.offset\.", r".point2."),
    (r"\.modulation\.spread\.", r".point3."),
    (r"\.scale_weight\.", r".point4."),
    (r"^box_embed\.", r"bbox_embed."),
    # torchvision's MLP has an activation and a dropout after each linear layer.
    (r"(bbox_embed|point1)\.(\d)\.", lambda match: f"{match[1]}.layers.{int(match[2]) // 3}."),
]


@dataclass
class Conversion:
    """
    Attributes:
        model: tensors under this project's names.
        description: what was recognised, in words.
        config: name of the config whose model it is; None for a backbone.
        overrides: ``key=value``, to add to that config.
        class_names: of the class outputs, None if they are not COCO's.
        notes: sentences on what was assumed, changed or left out.
    """

    model: Dict[str, Tensor]
    description: str
    config: Optional[str] = None
    overrides: List[str] = field(default_factory=list)
    class_names: Optional[List[str]] = None
    notes: List[str] = field(default_factory=list)


def convert_file(input_path: str, output_path: str, classes: str = "coco80") -> Conversion:
    """Read a checkpoint of another origin and write it as one of Detectron2's.

    The output appears whole or not at all. Beside the weights it says, under the key ``smca``,
    which config it belongs to.

    Args:
        input_path: a .pth file or its URL. It is only read.
        output_path: a .pth file.
        classes: see `convert`.

    Raises:
        CheckpointError: see `read_state_dict` and `convert`; or the output cannot be written.
    """
    if not output_path.endswith(".pth"):
        raise CheckpointError(f"The output {output_path} needs a name that ends in .pth.")
    local_path = _local_path(input_path)
    if os.path.realpath(local_path) == os.path.realpath(output_path):
        raise CheckpointError(f"The output {output_path} is the input: give it another name.")
    try:
        conversion = convert(read_state_dict(local_path), classes)
    except CheckpointError as error:
        raise CheckpointError(f"{input_path} {error}") from error
    provenance = {
        "config": None if conversion.config is None else f"{conversion.config}.py",
        "overrides": conversion.overrides,
        "class_names": conversion.class_names or [],
        "converted_from": os.path.basename(input_path),
        "version": __version__,
    }
    if "class_embed.bias" in conversion.model:
        provenance["num_classes"] = len(conversion.model["class_embed.bias"])
    _save({"model": conversion.model, "smca": provenance}, output_path)
    return conversion


def convert(state_dict: Mapping[str, Tensor], classes: str = "coco80") -> Conversion:
    """
    Args:
        state_dict: tensors of an official SMCA or DETR model, or of a torchvision ResNet.
        classes: "coco80" picks the class outputs of COCO's 80 classes, in Detectron2's order;
            "keep" leaves all.

    Raises:
        CheckpointError: the tensors are not exactly those of such a model. The message is a
            sentence without its subject, the file.
    """
    if classes not in CLASS_CHOICES:
        raise ValueError(f"classes={classes!r} must be one of {', '.join(CLASS_CHOICES)}.")
    # Batch norms' counters are in some files, and nothing uses them.
    state_dict = {k: v for k, v in state_dict.items() if not k.endswith("num_batches_tracked")}
    if _has(state_dict, r"layer1\."):
        return _convert_backbone(state_dict)
    if not _has(state_dict, r"transformer\.decoder\.layers\."):
        raise CheckpointError(
            "is no checkpoint of an official SMCA or DETR model nor of a torchvision ResNet: its "
            f"tensors are called {_some(sorted(state_dict))}."
        )
    return _convert_detector(state_dict, classes)


def read_state_dict(path: str) -> Dict[str, Tensor]:
    """
    The tensors of a checkpoint: of its entry ``model`` or ``state_dict`` if it has one.

    Raises:
        CheckpointError: the file cannot be read, holds something else than tensors there, or would
            run code when it is opened. The message is a sentence without its subject, the file.
    """
    # Command line arguments, which the official training script keeps beside the weights.
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign is None:
            raise CheckpointError("cannot be read, perhaps it was cut short.") from error
        raise CheckpointError(
            f"would run code when it is opened ({foreign[1]}), which is refused: only files of "
            "tensors and plain values are converted."
        ) from error
    except (EOFError, IndexError, KeyError, OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            "cannot be read, perhaps it was cut short or is of another kind."
        ) from error
    for key in ("model", "state_dict"):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(key), Mapping):
            checkpoint = checkpoint[key]
    if not isinstance(checkpoint, Mapping) or not checkpoint:
        raise CheckpointError("holds no tensors by name.")
    wrong = [str(key) for key, value in checkpoint.items() if not isinstance(value, Tensor)]
    if wrong:
        raise CheckpointError(f"holds other things than tensors: {_some(wrong)}.")
    return dict(checkpoint)


def official_name(name: str, single_scale: bool, shared_cross_scale: bool) -> str:
    """The official name of a tensor of this project's model.

    Args:
        single_scale: that model's only projection has a name without a number.
        shared_cross_scale: one convolution between scales has a name without a number, too.
    """
    for pattern, replacement in _RULES:
        name = re.sub(pattern, replacement, name)
    if single_scale:
        name = name.replace("input_proj_2048.", "input_proj.")
    if shared_cross_scale:
        name = re.sub(r"\.(high_to_low|low_to_high)_1\.", r".\1.", name)
    return name


def _convert_detector(state_dict: Dict[str, Tensor], classes: str) -> Conversion:
    is_smca = _has(state_dict, r".*\.point1\.")
    find = _find_smca if is_smca else _find_detr
    name, settings, description, notes = find(state_dict)
    model = _match(state_dict, _expected(name, settings))
    if not is_smca:
        notes.append(_softmax_to_sigmoid(model))
    class_names = _choose_classes(model, classes, notes)
    settings["model.num_classes"] = len(model["class_embed.bias"])
    return Conversion(
        model, description, name, _overrides(name, settings), class_names, notes
    )


def _convert_backbone(state_dict: Dict[str, Tensor]) -> Conversion:
    notes = []
    if _has(state_dict, r"fc\."):
        notes.append("The classifier (fc) is left out.")
    state_dict = {
        f"backbone.0.body.{key}": value
        for key, value in state_dict.items()
        if not key.startswith("fc.")
    }
    depth = _resnet_depth(state_dict)
    with torch.device("meta"):
        expected = nn.ModuleDict({"backbone": build_resnet(depth)}).state_dict()
    model = _match(state_dict, expected)
    notes.append(f"It fits any config with model.backbone.depth={depth}.")
    return Conversion(model, f"torchvision's ResNet-{depth}", notes=notes)


# --------------------------------------------------------------------------- which model is it?


def _find_smca(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    """Config, settings (keys of the config), description and notes."""
    depth = _resnet_depth(state_dict)
    settings, notes = _common_settings(state_dict, depth), []
    base = 101 if depth == 101 else 50
    if _has(state_dict, r"input_proj\."):
        kind, num_scales, name = "one scale", 1, "smca_single_scale_r50_50ep"
    elif _has(state_dict, r"input_proj_512\."):
        kind, num_scales, name = "convolutional encoder", 4, f"smca_conv_r{base}_50ep"
        settings.update(_conv_encoder_settings(state_dict))
    else:
        kind, num_scales, name = "several scales", 3, f"smca_r{base}_50ep"
        notes.append(_assume_pattern(settings))
    has_offsets = _has(state_dict, r".*\.point2\.")
    spread = _spread(state_dict, num_scales * (_NUM_HEADS if has_offsets else 1))
    settings["model.decoder.modulation"] = "multi_head" if has_offsets else "head_shared"
    settings["model.decoder.spread"] = spread
    if num_scales > 1:
        settings["model.decoder.scale_selection"] = _has(state_dict, r".*\.point4\.")
    description = (
        f"SMCA, {kind} ({_STRIDES_OF_SCALES[num_scales]}), spread {spread} "
        f"({_OFFICIAL_SPREADS[spread]}), {_describe(settings)}"
    )
    return name, settings, description, notes


def _find_detr(state_dict: Dict[str, Tensor]) -> Tuple[str, Dict[str, Any], str, List[str]]:
    settings = _common_settings(state_dict, _resnet_depth(state_dict))
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
        "model.encoder.share_cross_scale": _has(state_dict, r".*\.high_to_low\."),
        "model.encoder.pointwise": _has(state_dict, r".*\.conv_1\."),
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
        if len(SPREADS[spread].initial_spreads) * num_gaussians == num_outputs:
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


def _resnet_depth(state_dict: Dict[str, Tensor]) -> int:
    prefix = "backbone.0.body."
    is_bottleneck = f"{prefix}layer1.0.conv3.weight" in state_dict
    num_blocks = _num_layers(state_dict, f"{prefix}layer3.")
    depth = _RESNET_DEPTHS.get((is_bottleneck, num_blocks))
    if depth is None:
        raise CheckpointError(
            f"has another backbone than a ResNet-18, 34, 50 or 101 ({num_blocks} blocks in layer3)."
        )
    return depth


def _has(state_dict: Dict[str, Tensor], pattern: str) -> bool:
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


# --------------------------------------------------------------------- its tensors and its config


def _overrides(name: str, settings: Dict[str, Any]) -> List[str]:
    """What of the settings differs from the config."""
    config = model_zoo.get_config(name)
    return [
        f"{key}={value}"
        for key, value in settings.items()
        if value is not None and OmegaConf.select(config, key) != value
    ]


def _expected(name: str, settings: Dict[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of the model of that config and those settings, without their values."""
    config = LazyConfig.apply_overrides(model_zoo.get_config(name), _overrides(name, settings))
    with torch.device("meta"):
        return instantiate(config.model).state_dict()


def _match(state_dict: Dict[str, Tensor], expected: Mapping[str, Tensor]) -> Dict[str, Tensor]:
    """The official tensors under the expected names; each has to be there, and no other."""
    single_scale = not any(name.startswith("neck.projections.res4") for name in expected)
    shared = not any(".down.1." in name for name in expected)
    names = {
        official_name(name, single_scale, shared): name
        for name in expected
        if not name.endswith("num_batches_tracked")
    }
    wrong_shapes = [
        f"{key} ({tuple(state_dict[key].shape)}, not {tuple(expected[name].shape)})"
        for key, name in names.items()
        if key in state_dict and state_dict[key].shape != expected[name].shape
    ]
    problems = [
        f"{len(keys)} {what} ({_some(keys)})"
        for what, keys in (
            ("missing", [key for key in names if key not in state_dict]),
            ("unknown", [key for key in state_dict if key not in names]),
            ("of another shape", wrong_shapes),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(f"does not have the tensors of its model: {'; '.join(problems)}.")
    return {name: state_dict[key].detach().clone() for key, name in names.items()}


def _softmax_to_sigmoid(model: Dict[str, Tensor]) -> str:
    """Turn a soft-max class head whose last output means no object into one for the sigmoid."""
    for key in ("class_embed.weight", "class_embed.bias"):
        # sigmoid(l_c - l_none) = p_c / (p_c + p_none).
        model[key] = model[key][:-1] - model[key][-1:]
    return (
        "It is an initialisation for training with focal loss. The class head's last output (no "
        "object) is subtracted from the others and left out, so that a class's sigmoid is its "
        "probability against no object; all other weights are kept as they are."
    )


def _choose_classes(model: Dict[str, Tensor], classes: str, notes: List[str]) -> List[str]:
    """Keep the chosen outputs of the class head; returns their names, if they are COCO's."""
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


# --------------------------------------------------------------------------------------- files


def _local_path(path: str) -> str:
    try:
        local_path = PathManager.get_local_path(path)
    except (OSError, AssertionError) as error:
        raise CheckpointError(f"{path} cannot be downloaded: {error}") from error
    if not os.path.isfile(local_path):
        raise CheckpointError(f"The checkpoint {path} does not exist.")
    return local_path


def _save(checkpoint: Dict[str, Any], path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))
    temporary = None
    try:
        os.makedirs(folder, exist_ok=True)
        # In the same folder, so that it can be renamed in one step.
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
            temporary = file.name
            torch.save(checkpoint, file)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(f"The output {path} cannot be written: {error}") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.remove(temporary)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _some(keys: List[str], num: int = 4) -> str:
    """The first few, in words."""
    return ", ".join(keys[:num]) + (f" and {len(keys) - num} more" if len(keys) > num else "")
