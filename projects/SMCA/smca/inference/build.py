"""Building a trained detector from its checkpoint and config."""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import build_model as build_yacs_model
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca.checkpoint import SMCACheckpointer, read_provenance
from smca.config import (
    add_smca_config,
    build,
    build_model,
    dataset_names,
    get_config_file,
    list_configs,
    load_config,
    require_values,
    resolve_device,
    use_classes,
)
from smca.data import category_ids, require_dataset
from smca.errors import CheckpointError, ConfigError, UserError

# Those of a checkpoint: the trained ones, and their average over the training (model_ema).
WEIGHTS = ("model", "ema")

Config = Union[DictConfig, CfgNode]

# Model, test augmentations, channel order, names of the test data.
_Built = Tuple[nn.Module, Sequence[T.Augmentation], str, List[str]]

# Sections that only yacs configs have, at the beginning of a line.
_YACS_SECTION = re.compile(r"^(_BASE_|MODEL|INPUT|DATASETS|SOLVER|VERSION)\s*:", re.MULTILINE)


@dataclass
class TrainedDetector:
    """A detector with what it takes to use it, see `smca.Predictor`.

    Attributes:
        model: a model that follows Detectron2's contract.
        augmentations: how images are resized, as in evaluation.
        image_format: "RGB" or "BGR", the order of channels that the model takes.
        class_names: may be empty.
        category_ids: from class index to the id in the data set's JSON; may be empty.
        cfg: the config, overrides included.
        weights: "model" or "ema".
        checkpoint: what its file says beside weights and optimizer: ``smca``, where it comes from,
            ``iteration`` and ``best``, if it has them.
    """

    model: nn.Module
    augmentations: Sequence[T.Augmentation]
    image_format: str
    class_names: List[str]
    category_ids: Dict[int, int]
    cfg: Optional[Config] = None
    weights: str = "model"
    checkpoint: Mapping[str, Any] = field(default_factory=dict)


def load_detector(
    checkpoint: Optional[str],
    config_file: Optional[str] = None,
    overrides: Sequence[str] = (),
    weights: Optional[str] = None,
    device: Optional[str] = None,
) -> TrainedDetector:
    """Build a config's model and load its trained weights; `smca.Predictor` describes arguments
    and errors."""
    provenance = read_provenance(checkpoint)
    if not config_file:
        config_file, trained_with = _find_config(checkpoint, provenance)
        overrides = [*trained_with, *overrides]
    cfg = _load_any_config(config_file, overrides)
    is_lazy = isinstance(cfg, DictConfig)
    configured = OmegaConf.select(cfg, "train.init_checkpoint") if is_lazy else cfg.MODEL.WEIGHTS
    checkpoint = checkpoint or configured
    if not checkpoint:
        raise ConfigError("No checkpoint given: add --weights with the file of a trained detector.")
    if isinstance(cfg, DictConfig):
        built = _build_from_lazy(cfg, config_file, device, provenance)
    else:
        built = _build_from_yacs(cfg, device)
    model, augmentations, image_format, datasets = built
    weights, others = load_weights(model, checkpoint, weights)
    names, category_ids = _classes(provenance, datasets, getattr(model, "num_classes", None))
    return TrainedDetector(
        model,
        augmentations,
        image_format,
        names,
        category_ids,
        cfg=cfg,
        weights=weights,
        checkpoint={key: others[key] for key in ("smca", "iteration", "best") if key in others},
    )


def load_weights(
    model: nn.Module, checkpoint: str, weights: Optional[str] = None
) -> Tuple[str, Dict[str, Any]]:
    """Load a detector's checkpoint, or the average of the weights in it.

    Args:
        model: model of the checkpoint's architecture.
        checkpoint: path or URL.
        weights: "model", "ema" or None, see `smca.Predictor`.

    Returns:
        "model" or "ema", and what else the checkpoint holds.

    Raises:
        UserError: the checkpoint cannot be read, does not fit, or has no such weights.
    """
    if weights not in (None, *WEIGHTS):
        raise UserError(f"weights has to be {' or '.join(WEIGHTS)}, not {weights!r}.")
    others = SMCACheckpointer(model, need_detector=True).load(checkpoint)
    average = others.pop("model_ema", None)
    if weights is None:
        chosen_by = (others.get("best") or {}).get("metric", "")
        weights = "ema" if average is not None and chosen_by.startswith("ema/") else "model"
    if weights == "ema":
        if average is None:
            raise CheckpointError(
                f"{checkpoint} has no average of the weights, it was trained without "
                "train.model_ema.enabled=True: take the weights 'model'."
            )
        model.load_state_dict(average)
    return weights, others


def load_test_dataset(cfg: Optional[Config]) -> List[Dict[str, Any]]:
    """The test data of the config of a `smca.Predictor`, in Detectron2's format.

    Raises:
        ConfigError: there is none, for instance because the detector was published.
        DatasetError: they are not there.
    """
    if cfg is None:
        raise ConfigError(
            "A published detector does not say what data it was tested on: give a checkpoint of "
            "its training."
        )
    if isinstance(cfg, DictConfig):
        require_values(cfg, ["dataloader.test.dataset"])
        require_dataset(dataset_names(cfg, "test"))
        return list(build(cfg.dataloader.test.dataset, "dataloader.test.dataset"))
    require_dataset(list(cfg.DATASETS.TEST))
    return get_detection_dataset_dicts(list(cfg.DATASETS.TEST), filter_empty=False)


def _find_config(weights: Optional[str], provenance: Mapping[str, Any]) -> Tuple[str, List[str]]:
    """The config that a checkpoint belongs to, and the overrides that it was trained with."""
    if not weights:
        raise ConfigError("No model given: add --config-file, --weights or both.")
    if os.path.isdir(weights):
        raise ConfigError(
            f"{weights} is a folder: give a checkpoint in it (a published detector's folder is for "
            "Predictor.from_pretrained)."
        )
    if "://" not in weights and not os.path.isfile(weights):
        final = os.path.join(os.path.dirname(weights), "model_final.pth")
        advice = f" Its folder has {final}: take that." if os.path.isfile(final) else ""
        raise ConfigError(f"The checkpoint {weights} does not exist.{advice}")
    beside = os.path.join(os.path.dirname(weights), "config.yaml")
    if os.path.isfile(beside):
        return beside, []
    name = provenance.get("config")
    for known in list_configs():
        if name and Path(known).name == Path(name).stem:
            return get_config_file(known), list(provenance.get("overrides") or [])
    problem = f"belongs to the config {name}, which is neither beside it (as config.yaml) nor "
    problem += "among those of this package"
    raise ConfigError(
        f"{weights} {problem if name else 'does not say which config it belongs to'}: add "
        "--config-file FILE (in code, config_file=FILE)."
    )


def _load_any_config(config_file: str, overrides: Sequence[str]) -> Config:
    if config_file.endswith((".yaml", ".yml")) and os.path.isfile(config_file):
        with open(config_file, encoding="utf-8", errors="replace") as file:
            if _YACS_SECTION.search(file.read()):
                return _load_yacs_config(config_file, overrides)
    # What only training needs may be missing, as in configs/fine_tune.py.
    return load_config(config_file, list(overrides), needed=())


def _load_yacs_config(config_file: str, overrides: Sequence[str]) -> CfgNode:
    cfg = get_cfg()
    add_smca_config(cfg)
    try:
        cfg.merge_from_file(config_file)
        cfg.merge_from_list(list(overrides))
    except (AssertionError, KeyError, ValueError, yaml.YAMLError) as error:
        reason = error.args[0] if error.args else error
        raise ConfigError(f"{config_file} with its overrides cannot be used: {reason}") from error
    return cfg


def _build_from_lazy(
    cfg: DictConfig, config_file: str, device: Optional[str], provenance: Mapping[str, Any]
) -> _Built:
    use_classes(cfg, provenance)
    require_values(cfg, ["model", "dataloader.test.mapper", "train.device"], config_file)
    cfg.train.device = str(resolve_device(device or cfg.train.device))
    mapper = cfg.dataloader.test.mapper
    augmentations = build(mapper.augmentations, "dataloader.test.mapper.augmentations")
    image_format = mapper.get("image_format", "RGB")
    return build_model(cfg), augmentations, image_format, dataset_names(cfg, "test")


def _build_from_yacs(cfg: CfgNode, device: Optional[str]) -> _Built:
    cfg.MODEL.DEVICE = str(resolve_device(device or cfg.MODEL.DEVICE, "MODEL.DEVICE"))
    sides = [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST]
    augmentations = [T.ResizeShortestEdge(sides, cfg.INPUT.MAX_SIZE_TEST)]
    try:
        model = build_yacs_model(cfg)
    except UserError:
        raise
    except (AssertionError, KeyError, TypeError, ValueError) as error:
        reason = error.args[0] if error.args else type(error).__name__
        raise ConfigError(f"The config's model cannot be built: {reason}") from error
    return model, augmentations, cfg.INPUT.FORMAT, list(cfg.DATASETS.TEST)


def _classes(
    provenance: Mapping[str, Any], datasets: Sequence[str], num_classes: Optional[int]
) -> Tuple[List[str], Dict[int, int]]:
    """Class names and category ids that the checkpoint says, else those of a data set with as
    many classes, of the same names where the checkpoint has names."""
    names = list(provenance.get("class_names") or [])
    ids = list(provenance.get("category_ids") or [])
    if not ids and datasets and datasets[0] in MetadataCatalog.list():
        known = list(MetadataCatalog.get(datasets[0]).get("thing_classes") or [])
        if names in ([], known) and num_classes in (None, len(known)):
            names, ids = known, category_ids(datasets[0])
    return names, dict(enumerate(ids))
