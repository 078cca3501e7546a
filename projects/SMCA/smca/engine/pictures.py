"""Pictures of what a model detects during its training, and of where its queries look."""

import logging
from typing import Any, Dict, List

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import inference_context
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from omegaconf import DictConfig, OmegaConf
from torch import nn

from smca.analysis import draw_pictures, evenly
from smca.config import build, dataset_names
from smca.inference import Predictor

logger = logging.getLogger(__name__)


class EvaluationPictures:
    """Draws ``train.num_pictures`` images of ``dataloader.test`` after each evaluation, always the
    same, for the writers; only in the main process. An error turns them off, with a warning.
    """

    def __init__(self, cfg: DictConfig):
        self._cfg = cfg
        self._dataset_dicts: List[Dict[str, Any]] = []
        dataset = OmegaConf.select(cfg, "dataloader.test.dataset")
        if cfg.train.num_pictures and dataset is not None and comm.is_main_process():
            dataset_dicts = list(build(dataset, "dataloader.test.dataset"))
            self._dataset_dicts = evenly(dataset_dicts, cfg.train.num_pictures)

    def put(self, model: nn.Module, storage: EventStorage) -> None:
        """Put ``pictures/detections`` (truth and detections) and ``pictures/weight_maps`` (of the
        surest detections; not for a model without modulation) into the storage."""
        if not self._dataset_dicts:
            return
        try:
            figures = self._draw(model)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("There will be no pictures of this training: %s", reason)
            self._dataset_dicts = []
            return
        for name, figure in figures.items():
            storage.put_image(f"pictures/{name}", _pixels(figure).transpose(2, 0, 1))

    def _draw(self, model: nn.Module) -> Dict[str, Figure]:
        count = len(self._dataset_dicts)
        has_maps = getattr(getattr(model, "decoder", None), "modulated", False)
        mapper, datasets = self._cfg.dataloader.test.mapper, dataset_names(self._cfg, "test")
        metadata = MetadataCatalog.get(datasets[0]) if datasets else {}
        with inference_context(model), torch.no_grad():
            detector = Predictor.from_model(
                model,
                build(mapper.augmentations, "dataloader.test.mapper.augmentations"),
                image_format=mapper.get("image_format", "RGB"),
                class_names=metadata.get("thing_classes", []),
            )
            figures = draw_pictures(
                detector,
                self._dataset_dicts,
                num_images=count,
                num_detections=count if has_maps else 0,
            )
        names = {"validation.png": "detections", "gaussians.png": "weight_maps"}
        return {names[file]: figure for file, figure in figures.items()}


def _pixels(figure: Figure) -> np.ndarray:
    """(height, width, 3) uint8, RGB."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
