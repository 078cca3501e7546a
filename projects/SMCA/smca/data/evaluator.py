"""Detectron2's COCO evaluation, whose result file has the ids of the user's own JSON."""

import json
import os
from typing import Any, Dict, Optional

from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager

from .coco import category_ids, image_ids

__all__ = ["CocoEvaluator"]


class CocoEvaluator(COCOEvaluator):
    """Detectron2's. Where `register_coco` had to make a JSON with other ids, this one evaluates
    with those, but ``coco_instances_results.json`` (with `output_dir`) has those of the user."""

    def evaluate(self, img_ids: Optional[Any] = None) -> Optional[Dict[str, Any]]:
        """Same as in Detectron2."""
        results = super().evaluate(img_ids)
        path = os.path.join(self._output_dir or "", "coco_instances_results.json")
        if results and self._output_dir and PathManager.isfile(path):
            self._restore_ids(path)
        return results

    def _restore_ids(self, path: str) -> None:
        used = self._metadata.thing_dataset_id_to_contiguous_id
        categories = category_ids(self._metadata.name)
        images = image_ids(self._metadata.name)
        with PathManager.open(path) as file:
            detections = json.load(file)
        for detection in detections:
            detection["image_id"] = images.get(detection["image_id"], detection["image_id"])
            detection["category_id"] = categories[used[detection["category_id"]]]
        with PathManager.open(path, "w") as file:
            json.dump(detections, file)
