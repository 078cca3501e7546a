"""What a predictor found in an image: Detectron2's Instances with names, COCO form and drawing."""

from typing import Any, Dict, List, Mapping, Optional, Sequence

import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image

from smca.analysis.detections import class_name, draw_instances
from smca.inference.images import ImageSource, rgb_array


class Detections(Instances):
    """Detectron2's `Instances` of one image, on the CPU, best first, with the classes' names.

    The fields are ``pred_boxes`` (XYXY in pixels of the image), ``scores``, ``pred_classes`` and
    ``query_indices``. Indexing, as in ``detections[detections.scores > 0.9]``, gives Detections.

    Args:
        instances: the fields.
        image: the image, which `draw` reads.
        class_names, category_ids: by class index its name, and its id in the data set's JSON; a
            class without one has its index.
    """

    def __init__(
        self,
        instances: Instances,
        image: ImageSource,
        class_names: Sequence[str] = (),
        category_ids: Optional[Mapping[int, int]] = None,
    ):
        super().__init__(instances.image_size, **instances.get_fields())
        self._image = image
        self._class_names = class_names
        self._category_ids = category_ids or {}

    @property
    def names(self) -> List[str]:
        """The class name of each detection."""
        return [class_name(self._class_names, index) for index in self.pred_classes.tolist()]

    def to_coco(self, **image: Any) -> List[Dict[str, Any]]:
        """The detections as in COCO's result files: for each a dict with the given entries, such as
        ``image_id=7``, ``category_id``, ``category_name``, ``bbox`` ([x, y, width, height] in
        pixels) and ``score``."""
        boxes = self.pred_boxes.tensor
        boxes = BoxMode.convert(boxes, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS).tolist()
        classes, scores = self.pred_classes.tolist(), self.scores.tolist()
        ids = [self._category_ids.get(index, index) for index in classes]
        return [
            dict(**image, category_id=id, category_name=name, bbox=box, score=score)
            for id, name, box, score in zip(ids, self.names, boxes, scores)
        ]

    def draw(self) -> Image.Image:
        """The image with boxes, class names and scores; a small image is enlarged by a whole
        factor. A file is read again for this.

        Raises:
            UserError: the image's file is not there any more.
        """
        image = np.ascontiguousarray(rgb_array(self._image))
        return Image.fromarray(draw_instances(image, self, self._class_names))

    def __getitem__(self, item: Any) -> "Detections":
        return self._with(super().__getitem__(item))

    def to(self, *args: Any, **kwargs: Any) -> "Detections":
        """Same as in Detectron2."""
        return self._with(super().to(*args, **kwargs))

    def _with(self, instances: Instances) -> "Detections":
        return Detections(instances, self._image, self._class_names, self._category_ids)
