"""Detectron2's COCO evaluation, whose result file has the ids of the user's own JSON."""

import json
from pathlib import Path
from typing import Any, Dict, Optional

import torch
from detectron2.evaluation import COCOEvaluator

from .coco import category_ids, image_ids


class CocoEvaluator(COCOEvaluator):
    """Detectron2's. Where `register_coco` had to make a JSON with other ids, this one evaluates
    with those, but the files that it writes (with `output_dir`) have those of the user."""

    def evaluate(self, img_ids: Optional[Any] = None) -> Optional[Dict[str, Any]]:
        """Same as in Detectron2."""
        results = super().evaluate(img_ids)
        # A data set that is not in COCO's format has no other ids.
        used = self._metadata.get("thing_dataset_id_to_contiguous_id")
        if not (results and self._output_dir and used):
            return results
        categories, images = category_ids(self._metadata.name), image_ids(self._metadata.name)
        path = Path(self._output_dir, "coco_instances_results.json")
        detections = json.loads(path.read_text(encoding="utf-8"))
        for detection in detections:
            detection["image_id"] = images.get(detection["image_id"], detection["image_id"])
            detection["category_id"] = categories[used[detection["category_id"]]]
        path.write_text(json.dumps(detections), encoding="utf-8")
        path = Path(self._output_dir, "instances_predictions.pth")
        predictions = torch.load(path, weights_only=True)  # with indices of classes
        for prediction in predictions:
            for item in (prediction, *prediction.get("instances", [])):
                item["image_id"] = images.get(item["image_id"], item["image_id"])
        torch.save(predictions, path)
        return results
