"""Where a training keeps its metrics until they are written."""

import collections
from typing import Dict

from detectron2.utils.events import EventStorage
from fvcore.common.history_buffer import HistoryBuffer

__all__ = ["BoundedStorage"]


class BoundedStorage(EventStorage):
    """Detectron2's, with the last thousand values of each metric, the most that any writer looks
    at. A million, as there, would be gigabytes in a training on COCO."""

    def __init__(self, start_iter: int = 0) -> None:
        super().__init__(start_iter)
        self._history: Dict[str, HistoryBuffer] = collections.defaultdict(
            lambda: HistoryBuffer(max_length=1000)
        )
