"""Writers of a training's metrics."""

from typing import List, Optional

from detectron2.engine import default_writers
from detectron2.utils.events import CommonMetricPrinter, EventStorage, EventWriter
from omegaconf import DictConfig

from smca.config import build


class ProgressPrinter(CommonMetricPrinter):
    """Detectron2's progress line."""

    def _get_eta(self, storage: EventStorage) -> Optional[str]:
        # Called twice in an iteration that fails early, the original divides by zero.
        if self._last_write is not None and self._last_write[0] == storage.iter:
            return None
        return super()._get_eta(storage)


def build_writers(train: DictConfig) -> List[EventWriter]:
    """Detectron2's writers, and those of the config's section `train`."""
    defaults = default_writers(train.output_dir, train.max_iter)[1:]
    # TensorBoard's is the last, since it clears the pictures.
    return [ProgressPrinter(train.max_iter), *build(train.writers, "train.writers"), *defaults]
