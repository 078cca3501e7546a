"""A trained detector as a function of images."""

import numbers
import os
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca import config
from smca.checkpoint import SMCACheckpointer, read_provenance
from smca.checkpoint.files import load_tensors, reading
from smca.data import category_ids, require_dataset
from smca.errors import CheckpointError, ConfigError, UserError
from smca.inference.detections import Detections
from smca.inference.images import ImageSource, rgb_array
from smca.inference.pretrained import load_pretrained

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
                "train.model_ema.enabled=True: take the kind of weights 'model'."
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
    config.require_values(cfg, ["dataloader.test.dataset"])
    require_dataset(config.dataset_names(cfg, "test"))
    return list(config.build(cfg.dataloader.test.dataset))


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
        names = ("model_best.pth", "model_final.pth")
        others = [os.path.join(os.path.dirname(weights), name) for name in names]
        found = next(filter(os.path.isfile, others), None)
        advice = f" Its folder has {found}: take that." if found else ""
        raise ConfigError(f"The checkpoint {weights} does not exist.{advice}")
    beside = os.path.join(os.path.dirname(weights), "config.yaml")
    if os.path.isfile(beside):
        return beside, []
    name = provenance.get("config")
    for known in config.list_configs():
        if name and Path(known).name == Path(name).stem:
            return config.get_config_file(known), list(map(str, provenance.get("overrides", [])))
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


class Predictor:
    """Detects objects in images, with a detector from its checkpoint's file alone:

        predictor = Predictor("output/demo/model_best.pth")
        detections = predictor("photo.jpg")  # Detectron2's Instances
        detections.names, detections.scores, detections.pred_boxes
        detections.draw().save("drawn.jpg")

    Channel order, resizing and class names are those of the checkpoint's config.

    Args:
        checkpoint: path or URL of a detector's checkpoint; None: the one that the config names.
        config_file: LazyConfig (.py or .yaml). None: the ``config.yaml`` that training wrote
            beside the checkpoint, else the config of that name that comes with this package, with
            the overrides of the training.
        overrides: texts ``key=value``.
        weights: "model" for the trained weights, "ema" for their average. None: the average where
            the checkpoint is the best one by the average's metric
            (``train.best_metric=ema/bbox/AP``), else the trained weights.
        device: "auto", "cpu", "cuda", ...; None: as the config says.
        dtype: "fp32", or "bf16" or "fp16" for mixed precision.

    Attributes:
        model: the detector, in evaluation mode.
        class_names: may be empty, if nothing says them.
        category_ids: from class index to the id in the data set's JSON; empty where the data set
            is not known, whose ids are then the indices.
        cfg: the config, overrides included; None if built from none.
        weights: "model" or "ema", which the model has.
        checkpoint: what the file says beside weights and optimizer: ``smca``, where it comes from,
            ``iteration`` and ``best``, if it has them.

    Raises:
        UserError: a file is missing, is of another kind, or does not fit the others.
    """

    cfg: Any = None
    weights = "model"
    checkpoint: Mapping[str, Any] = {}

    def __init__(
        self,
        checkpoint: Union[str, "os.PathLike[str]", None] = None,
        *,
        config_file: Union[str, "os.PathLike[str]", None] = None,
        overrides: Sequence[str] = (),
        weights: Optional[str] = None,
        device: Optional[str] = None,
        dtype: str = "fp32",
    ):
        path, file = (x if x is None else os.fspath(x) for x in (checkpoint, config_file))
        provenance = read_provenance(path)
        if not file:
            file, trained_with = find_config(path, provenance)
            overrides = [*trained_with, *overrides]
        # What only training needs may be missing, as in configs/fine_tune.py.
        cfg = config.load_config(file, overrides, needed=())
        path = path or OmegaConf.select(cfg, "train.init_checkpoint")
        if not path:
            raise ConfigError("No checkpoint given: add --weights with a trained detector's file.")
        config.use_classes(cfg, provenance)
        config.require_values(cfg, ["model", "dataloader.test.mapper", "train.device"], file)
        cfg.train.device = str(config.resolve_device(device or cfg.train.device))
        model, mapper = config.build_model(cfg), cfg.dataloader.test.mapper
        self.weights, others = load_weights(model, path, weights)
        num_classes = getattr(model, "num_classes", None)
        names, ids = classes_of(provenance, config.dataset_names(cfg, "test"), num_classes)
        augmentations = config.build(mapper.augmentations)
        self._use(model, augmentations, mapper.get("image_format", "RGB"), names, ids, dtype)
        self.cfg = cfg
        self.checkpoint = {k: others[k] for k in ("smca", "iteration", "best") if k in others}

    @classmethod
    def from_model(
        cls,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation] = (),
        *,
        image_format: str = "RGB",
        class_names: Sequence[str] = (),
        category_ids: Optional[Mapping[int, int]] = None,
        dtype: str = "fp32",
    ) -> "Predictor":
        """A predictor of a model in memory, which follows Detectron2's contract and is put in
        evaluation mode.

        Args:
            model: the model, on its device.
            augmentations: how images are resized, as in evaluation.
            image_format: "RGB" or "BGR", the order of channels that the model takes.
            class_names, category_ids, dtype: see the class.
        """
        predictor = cls.__new__(cls)
        predictor._use(model, augmentations, image_format, class_names, category_ids, dtype)
        return predictor

    @classmethod
    def from_pretrained(
        cls,
        name: Union[str, "os.PathLike[str]"],
        *,
        revision: Optional[str] = None,
        device: str = "auto",
        dtype: str = "fp32",
    ) -> "Predictor":
        """A published detector (``tools/publish.py``), from a folder or a repository on the Hugging
        Face Hub ("user/name") at a revision, which is a branch, a tag or a commit. No code of its
        author runs.

        Raises:
            UserError: there is none, it cannot be read, or asks for more than parts of detectors.
        """
        published = load_pretrained(os.fspath(name), revision)
        published["model"].to(config.resolve_device(device))
        weights = published.pop("weights")
        predictor = cls.from_model(**published, dtype=dtype)
        predictor.weights = weights
        return predictor

    def _use(
        self,
        model: nn.Module,
        augmentations: Sequence[T.Augmentation],
        image_format: str,
        class_names: Sequence[str],
        category_ids: Optional[Mapping[int, int]],
        dtype: str,
    ) -> None:
        if dtype not in ("fp32", *config.AMP_DTYPES):
            names = " or ".join(config.AMP_DTYPES)
            raise UserError(f"dtype has to be fp32, {names}, not {dtype!r}.")
        self.model: nn.Module = model.eval()
        self.augmentations = T.AugmentationList(list(augmentations))
        self.image_format = image_format
        self.class_names = list(class_names)
        self.category_ids = dict(category_ids or {})
        device = next(self.model.parameters(), torch.empty(0)).device
        self._amp_dtype = config.amp_dtype(dtype, device)

    def __call__(self, images: Any, *, threshold: float = 0.5, batch_size: int = 1) -> Any:
        """Detect objects.

        Args:
            images: one image, or a list or tuple of them, each a path, a URL, a PIL image, an
                array (height, width, 3) or a tensor (3, height, width), both uint8 RGB. Files and
                URLs are turned upright as their EXIF says, all others are taken as they are.
            threshold: lowest score of a detection, in [0, 1].
            batch_size: how many images of a list go through the model together. Their padding
                reaches the convolutions, so that in a batch of images of several sizes results
                can differ slightly from those of each alone.

        Returns:
            Detections (of Detectron2's type Instances) on the CPU, with ``pred_boxes`` in pixels
            of the image, best first. A list of images gives a list of them.

        Raises:
            UserError: an image cannot be read, or an argument has a wrong value.
        """
        if not isinstance(threshold, numbers.Real) or not 0 <= threshold <= 1:
            raise UserError(f"The threshold has to be a number in [0, 1], not {threshold!r}.")
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f"batch_size has to be a positive whole number, not {batch_size!r}.")
        if not isinstance(images, (list, tuple)):
            return self._detect([images], threshold)[0]
        batches = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        return [found for batch in batches for found in self._detect(batch, threshold)]

    @torch.no_grad()
    def _detect(self, images: Sequence[ImageSource], threshold: float) -> List[Detections]:
        inputs = [self._input(rgb_array(image)) for image in images]
        device = next(self.model.parameters(), torch.empty(0)).device
        with torch.autocast(device.type, self._amp_dtype, enabled=self._amp_dtype is not None):
            outputs = [output["instances"].to("cpu") for output in self.model(inputs)]
        return [
            Detections(found[found.scores >= threshold], image, self.class_names, self.category_ids)
            for found, image in zip(outputs, images)
        ]

    def _input(self, image: np.ndarray) -> Dict[str, Any]:
        """The model's input for an (H, W, 3) uint8 RGB image."""
        height, width = image.shape[:2]
        aug_input = T.AugInput(image if self.image_format == "RGB" else image[:, :, ::-1])
        self.augmentations(aug_input)
        pixels = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        return {"image": pixels, "height": height, "width": width}
