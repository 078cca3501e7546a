"""Checkpoints of other origin in Detectron2's format.

The official SMCA models, DETR's (as an initialization) and torchvision's ResNets are told apart by
their tensors' names and shapes.
"""

import argparse
import os
from typing import Any, Dict, List, Mapping, NamedTuple, Optional

import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from detectron2.utils.file_io import PathManager
from omegaconf import OmegaConf
from torch import Tensor, nn

from smca.checkpoint.files import load_tensors, reading, write_atomically
from smca.config import get_config
from smca.errors import CheckpointError, differing, some, writing
from smca.modeling import build_resnet
from smca.version import __version__

from .names import official_names
from .recognition import has, recognize_detr, recognize_smca, resnet_depth

CLASS_CHOICES = ("coco80", "keep")

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
