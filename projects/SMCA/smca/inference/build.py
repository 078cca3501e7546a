"""Finding and loading what a trained detector consists of."""

import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from smca.checkpoint import SMCACheckpointer
from smca.checkpoint.files import load_tensors, reading
from smca.config import build, dataset_names, get_config_file, list_configs, require_values
from smca.data import category_ids, require_dataset
from smca.errors import CheckpointError, ConfigError, UserError

# Those of a checkpoint: the trained ones, and their average over the training (model_ema).
WEIGHTS = ("model", "ema")


def load_weights(
    model: nn.Module, checkpoint: str, weights: Optional[str] = None
) -> Tuple[str, Dict[str, Any]]:
    """Load a detector's checkpoint, or the average of the weights in it, as `smca.Predictor` says;
    gives "model" or "ema", and what else the checkpoint holds. One that cannot be read, does not
    fit, or has no such weights is a UserError."""
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


def load_test_dataset(cfg: Optional[DictConfig]) -> List[Dict[str, Any]]:
    """The test data of the config of a `smca.Predictor`, in Detectron2's format. A published
    detector, which has no config, is a ConfigError, and data that are not there a DatasetError."""
    if cfg is None:
        raise ConfigError(
            "A published detector does not say what data it was tested on: give a checkpoint of "
            "its training."
        )
    require_values(cfg, ["dataloader.test.dataset"])
    require_dataset(dataset_names(cfg, "test"))
    return list(build(cfg.dataloader.test.dataset))


def find_config(weights: Optional[str], provenance: Mapping[str, Any]) -> Tuple[str, List[str]]:
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
            return get_config_file(known), list(map(str, provenance.get("overrides", [])))
    problem = "does not say which config it belongs to"
    if not name and not weights.endswith(".pkl"):
        with reading(weights):  # a file of another kind does not say it, either
            load_tensors(PathManager.get_local_path(weights))
    if name:
        problem = f"belongs to the config {name}, which is neither beside it nor in this package"
    raise ConfigError(f"{weights} {problem}: add --config-file (in code, config_file=FILE).")


def classes_of(
    provenance: Mapping[str, Any], datasets: Sequence[str], num_classes: Optional[int]
) -> Tuple[List[str], Dict[int, int]]:
    """Class names and category ids that the checkpoint says, else those of a data set with as
    many classes, of the same names where the checkpoint has names."""
    names = list(map(str, provenance.get("class_names", [])))
    ids = provenance.get("category_ids", [])
    if not ids and datasets and datasets[0] in MetadataCatalog.list():
        known = list(MetadataCatalog.get(datasets[0]).get("thing_classes") or [])
        if names in ([], known) and num_classes in (None, len(known)):
            names, ids = known, category_ids(datasets[0])
    return names, dict(enumerate(ids))
