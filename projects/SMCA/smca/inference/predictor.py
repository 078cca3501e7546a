"""A trained detector as a function of one image."""

import os
import re
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import yaml
from detectron2.config import CfgNode, get_cfg, instantiate
from detectron2.data import MetadataCatalog, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.modeling import build_model as build_yacs_model
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from smca.analysis.detections import class_name
from smca.checkpoint import SMCACheckpointer
from smca.config import (
    add_smca_config,
    build_model,
    dataset_names,
    get_config_file,
    list_configs,
    load_config,
    resolve_device,
)
from smca.data import require_dataset
from smca.errors import ConfigError

__all__ = ["Predictor", "load_predictor", "load_test_dataset"]

Config = Union[DictConfig, CfgNode]

# Model, test augmentations, channel order, names of the test data.
_Built = Tuple[nn.Module, Sequence[T.Augmentation], str, List[str]]

# Sections that only yacs configs have, at the beginning of a line.
_YACS_SECTION = re.compile(r"^(_BASE_|MODEL|INPUT|DATASETS|SOLVER|VERSION)\s*:", re.MULTILINE)


class Predictor:
    """Detects objects in one image at a time.

    Args:
        model: follows Detectron2's contract; put in evaluation mode, used on the device that it
            is on.
        augmentations: of the image, as in evaluation.
        image_format: "RGB" or "BGR", the order of channels that the model takes.
        class_names: may be empty, if nothing says them.
        category_ids: from class index to the id in the data set's JSON; empty where the data set
            is not known, whose ids are then the indices.
    """

    def __init__(
        self,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation] = (),
        *,
        image_format: str = "RGB",
        class_names: Sequence[str] = (),
        category_ids: Optional[Mapping[int, int]] = None,
    ):
        self.model = model.eval()
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.class_names = list(class_names)
        self.category_ids = dict(category_ids or {})

    @torch.no_grad()
    def __call__(self, image: np.ndarray) -> Instances:
        """Detect objects.

        Args:
            image: (height, width, 3) uint8, RGB, as of `smca.data.read_image`.

        Returns:
            Detections on the CPU, with ``pred_boxes`` in pixels of `image`, best first.
        """
        height, width = image.shape[:2]
        aug_input = T.AugInput(image if self.image_format == "RGB" else image[:, :, ::-1])
        self.augmentations(aug_input)
        pixels = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        inputs = {"image": pixels, "height": height, "width": width}
        return self.model([inputs])[0]["instances"].to("cpu")

    def class_name(self, index: int) -> str:
        """The name of a class, or its index if it has none."""
        return class_name(self.class_names, index)


def load_predictor(
    config_file: Optional[str] = None,
    weights: Optional[str] = None,
    overrides: Sequence[str] = (),
    device: Optional[str] = None,
) -> Tuple[Predictor, Config]:
    """Build a config's model and load its trained weights.

    Args:
        config_file: LazyConfig (.py or .yaml) or yacs (.yaml) config. None: the ``config.yaml``
            that training wrote beside the weights, else the config of that name that comes with
            this package, with the overrides of the training.
        weights: a detector's checkpoint; None: the one that the config names.
        overrides: ``key=value``; of a yacs config ``KEY VALUE`` pairs.
        device: "auto", "cpu", "cuda", ...; None: as the config says.

    Returns:
        The predictor, and the config, overrides included.

    Raises:
        UserError: a file is missing, is of another kind, or does not fit the others.
    """
    provenance = _provenance(weights)
    trained_with: List[str] = []
    if not config_file:
        config_file, trained_with = _find_config(weights, provenance)
    cfg = _load_any_config(config_file, [*trained_with, *overrides])
    is_lazy = isinstance(cfg, DictConfig)
    weights = weights or (cfg.train.init_checkpoint if is_lazy else cfg.MODEL.WEIGHTS)
    if not weights:
        raise ConfigError("No checkpoint given: add --weights with the file of a trained detector.")
    build = _build_from_lazy if is_lazy else _build_from_yacs
    model, augmentations, image_format, datasets = build(cfg, device, provenance)
    SMCACheckpointer(model, need_detector=True).load(weights)
    class_names, category_ids = _classes(provenance, datasets)
    predictor = Predictor(
        model,
        augmentations,
        image_format=image_format,
        class_names=class_names,
        category_ids=category_ids,
    )
    return predictor, cfg


def load_test_dataset(cfg: Config) -> List[Dict[str, Any]]:
    """A config's test data in Detectron2's format.

    Args:
        cfg: as of `load_predictor`.

    Raises:
        DatasetError: they are not there.
    """
    if isinstance(cfg, DictConfig):
        names = dataset_names(cfg, "test")
        if names:
            require_dataset(names)
        return list(instantiate(cfg.dataloader.test.dataset))
    require_dataset(list(cfg.DATASETS.TEST))
    return get_detection_dataset_dicts(list(cfg.DATASETS.TEST), filter_empty=False)


def _provenance(weights: Optional[str]) -> Dict[str, Any]:
    """What the checkpoint says about itself; nothing if it is of another origin or cannot be read,
    of which loading it into the model gives a better error."""
    try:
        path = PathManager.get_local_path(weights)
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        provenance = dict(checkpoint.get("smca") or {})
    except Exception:
        return {}
    # A stranger's file may hold anything under these names.
    texts = {name: provenance.get(name) for name in ("overrides", "class_names")}
    result: Dict[str, Any] = {
        name: value
        for name, value in texts.items()
        if isinstance(value, list) and all(isinstance(text, str) for text in value)
    }
    if isinstance(provenance.get("config"), str):
        result["config"] = provenance["config"]
    return result


def _find_config(weights: Optional[str], provenance: Mapping[str, Any]) -> Tuple[str, List[str]]:
    """The config that a checkpoint belongs to, and the overrides that it was trained with."""
    if not weights:
        raise ConfigError("No model given: add --config-file, --weights or both.")
    if "://" not in weights and not os.path.isfile(weights):
        raise ConfigError(f"The checkpoint {weights} does not exist.")
    beside = os.path.join(os.path.dirname(weights), "config.yaml")
    if os.path.isfile(beside):
        return beside, []
    name = provenance.get("config")
    if not name:
        raise ConfigError(f"{weights} does not say which config it belongs to: add --config-file.")
    for known in list_configs():
        if Path(known).name == Path(name).stem:
            return get_config_file(known), list(provenance.get("overrides") or [])
    raise ConfigError(
        f"{weights} belongs to the config {name}, which is neither beside it (as config.yaml) nor "
        "among those of this package: add --config-file."
    )


def _load_any_config(config_file: str, overrides: Sequence[str]) -> Config:
    if config_file.endswith((".yaml", ".yml")) and PathManager.isfile(config_file):
        with PathManager.open(config_file) as file:
            if _YACS_SECTION.search(file.read()):
                return _load_yacs_config(config_file, overrides)
    return load_config(config_file, list(overrides))


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
    cfg: DictConfig, device: Optional[str], provenance: Mapping[str, Any]
) -> _Built:
    """The model on its device, and what else of the config a predictor needs."""
    if isinstance(cfg.model.get("num_classes"), DictConfig) and provenance.get("class_names"):
        # A function counts the classes in the training data, which need not be here.
        cfg.model.num_classes = len(provenance["class_names"])
    cfg.train.device = str(resolve_device(device or cfg.train.device))
    mapper = cfg.dataloader.test.mapper
    augmentations = instantiate(mapper.augmentations)
    image_format = mapper.get("image_format", "RGB")
    return build_model(cfg), augmentations, image_format, dataset_names(cfg, "test")


def _build_from_yacs(cfg: CfgNode, device: Optional[str], provenance: Mapping[str, Any]) -> _Built:
    """As `_build_from_lazy`."""
    cfg.MODEL.DEVICE = str(resolve_device(device or cfg.MODEL.DEVICE))
    augmentation = T.ResizeShortestEdge(
        [cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MIN_SIZE_TEST], cfg.INPUT.MAX_SIZE_TEST
    )
    model = build_yacs_model(cfg)
    return model, [augmentation], cfg.INPUT.FORMAT, list(cfg.DATASETS.TEST)


def _classes(
    provenance: Mapping[str, Any], datasets: Sequence[str]
) -> Tuple[List[str], Dict[int, int]]:
    """Class names, of the checkpoint if it says them, else of the data set; category ids of the
    data set if it has the same classes."""
    names = list(provenance.get("class_names") or [])
    if not datasets or datasets[0] not in MetadataCatalog.list():
        return names, {}
    metadata = MetadataCatalog.get(datasets[0])
    known = list(metadata.get("thing_classes") or [])
    if names and names != known:
        return names, {}
    ids = metadata.get("thing_dataset_id_to_contiguous_id") or {}
    return known, {index: category_id for category_id, index in ids.items()}
