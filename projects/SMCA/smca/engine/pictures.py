"""Pictures of what a model detects during its training, and of where its queries look."""

import logging
from typing import Any, Dict, List

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.data import transforms as T
from detectron2.evaluation import inference_context
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig
from torch import nn

from smca.analysis import draw_pictures, evenly
from smca.config import build, dataset_names

__all__ = ["EvaluationPictures"]

logger = logging.getLogger(__name__)


class EvaluationPictures:
    """Draws the same images of the test data after each evaluation, for the writers.

    A picture is not worth a training: an error turns them off, with a warning.

    Args:
        cfg: a LazyConfig; ``dataloader.test`` gives the images and how the model gets them.
        num_images: 0 draws nothing.
    """

    def __init__(self, cfg: DictConfig, num_images: int):
        self._cfg = cfg
        self._num_images = num_images
        self._dataset_dicts: List[Dict[str, Any]] = []

    def put(self, model: nn.Module, storage: EventStorage) -> None:
        """Put ``pictures/detections`` (truth and detections) and ``pictures/weight_maps`` (of the
        surest detections; not for a model without modulation) into the storage."""
        if not self._num_images:
            return
        try:
            figures = self._draw(model)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("There will be no pictures of this training: %s", reason)
            self._num_images = 0
            return
        for name, figure in figures.items():
            storage.put_image(f"pictures/{name}", _pixels(figure).transpose(2, 0, 1))

    def _draw(self, model: nn.Module) -> Dict[str, Figure]:
        if not self._dataset_dicts:
            dataset = build(self._cfg.dataloader.test.dataset, "dataloader.test.dataset")
            self._dataset_dicts = evenly(list(dataset), self._num_images)
        has_maps = getattr(getattr(model, "decoder", None), "modulated", False)
        with inference_context(model), torch.no_grad():
            figures = draw_pictures(
                _Detector(model, self._cfg),
                self._dataset_dicts,
                num_images=self._num_images,
                num_detections=self._num_images if has_maps else 0,
            )
        names = {"validation.png": "detections", "gaussians.png": "weight_maps"}
        return {names[file]: figure for file, figure in figures.items()}


class _Detector:
    """A model in training as :class:`smca.analysis.detections.ImageDetector`."""

    def __init__(self, model: nn.Module, cfg: DictConfig):
        mapper = cfg.dataloader.test.mapper
        augmentations = build(mapper.augmentations, "dataloader.test.mapper.augmentations")
        self.model = model
        self.augmentations = T.AugmentationList(list(augmentations))
        self.is_rgb = mapper.get("image_format", "RGB") == "RGB"
        names = dataset_names(cfg, "test")
        self.class_names: List[str] = list(
            MetadataCatalog.get(names[0]).get("thing_classes", []) if names else []
        )

    def __call__(self, image: np.ndarray, *, threshold: float) -> Instances:
        aug_input = T.AugInput(image if self.is_rgb else image[:, :, ::-1])
        self.augmentations(aug_input)
        pixels = torch.from_numpy(np.ascontiguousarray(aug_input.image.transpose(2, 0, 1)))
        inputs = {"image": pixels, "height": image.shape[0], "width": image.shape[1]}
        found = self.model([inputs])[0]["instances"].to("cpu")
        return found[found.scores >= threshold]


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
