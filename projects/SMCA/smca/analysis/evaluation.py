"""A detector on a data set: its detections, and all that `metrics` says of them."""

import time
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.structures import BoxMode
from pycocotools.coco import COCO

from smca.analysis.detections import ImageDetector
from smca.analysis.metrics import (
    AveragePrecision,
    Calibration,
    Detection,
    average_precision,
    best_threshold,
    calibrate,
    confusion_matrix,
    count_by_image,
    match,
)
from smca.data import read_image
from smca.errors import UserError

__all__ = ["Evaluation", "detect", "device_name", "evaluate", "worst_images"]


@dataclass
class Evaluation:
    """What is known of a detector on a data set.

    Attributes:
        name: of the detector, for tables.
        class_names: by ascending category id.
        category_ids: in that order.
        detections: COCO results, of any score.
        seconds: of each image.
        average_precision: COCO's.
        threshold: the least score of the detections that the fields below count.
        f1: 2 TP / (detections + objects) in percent, with IoU 0.5.
        counts: of each image, by its id, objects found, false detections, objects missed.
        confusion: (C + 1, C + 1), see `smca.analysis.metrics.confusion_matrix`.
        calibration: of all detections but those of a score near 0.
        image_ids: from the ids of images to those of the user's JSON, where these are others.
    """

    name: str
    class_names: List[str]
    category_ids: List[int]
    detections: List[Detection]
    seconds: List[float]
    average_precision: AveragePrecision
    threshold: float
    f1: float
    counts: Dict[int, Tuple[int, int, int]]
    confusion: np.ndarray
    calibration: Calibration
    image_ids: Mapping[int, Union[int, str]] = field(default_factory=dict)

    @property
    def milliseconds(self) -> float:
        """Of an image, the median."""
        return 1000 * float(np.median(self.seconds)) if self.seconds else float("nan")

    def to_json(self) -> Dict[str, Any]:
        """All but the detections, in plain types; null for what is not a number."""
        names = dict(zip(self.category_ids, self.class_names))
        found = self.average_precision
        return _without_nan(
            {
                "name": self.name,
                "overall": found.overall,
                "classes": {names[key]: values for key, values in found.classes.items()},
                "recalls": found.recalls.tolist(),
                "precisions_at_iou_50": {
                    names[key]: curve.tolist() for key, curve in found.curves.items()
                },
                "threshold": self.threshold,
                "f1": self.f1,
                "confusion": {
                    "labels": [*self.class_names, "background"],
                    "truth_by_detection": self.confusion.tolist(),
                },
                "calibration": {
                    "expected_calibration_error": self.calibration.error,
                    "bins": [vars(score_bin) for score_bin in self.calibration.bins],
                },
                "images": {
                    str(self.image_ids.get(key, key)): {
                        "found": n[0],
                        "false": n[1],
                        "missed": n[2],
                    }
                    for key, n in self.counts.items()
                },
                "milliseconds_per_image": self.milliseconds,
            }
        )


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def detect(
    predictor: ImageDetector,
    dataset_dicts: Sequence[Dict[str, Any]],
    category_ids: Sequence[int],
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Tuple[List[Detection], List[float]]:
    """Run a detector on a data set, image by image.

    Args:
        predictor: gives all its detections, of whatever score.
        dataset_dicts: in Detectron2's format, with ``image_id``.
        category_ids: of the classes, by their index.
        progress: wraps the images to go through, as `tqdm.tqdm` does.

    Returns:
        COCO results, and the seconds that each image took, without reading its file.

    Raises:
        UserError: an image cannot be read, or the detector has classes that `category_ids` lacks.
    """
    detections: List[Detection] = []
    seconds: List[float] = []
    for item in progress(dataset_dicts):
        image = read_image(item["file_name"], item.get("height"), item.get("width"))
        start = time.perf_counter()
        found = predictor(image, threshold=0)
        seconds.append(time.perf_counter() - start)
        classes = found.pred_classes.tolist()
        if classes and max(classes) >= len(category_ids):
            raise UserError(
                f"The detector has a class of index {max(classes)}, the data set only "
                f"{len(category_ids)} classes: evaluate it on a data set with its own classes."
            )
        boxes = BoxMode.convert(found.pred_boxes.tensor, BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)
        detections += [
            {
                "image_id": item["image_id"],
                "category_id": category_ids[index],
                "bbox": box,
                "score": score,
            }
            for box, score, index in zip(boxes.tolist(), found.scores.tolist(), classes)
        ]
    return detections, seconds


def evaluate(
    name: str,
    truth: COCO,
    detections: List[Detection],
    seconds: Sequence[float] = (),
    threshold: Optional[float] = None,
    image_ids: Optional[Mapping[int, Union[int, str]]] = None,
) -> Evaluation:
    """Compute all metrics of detections.

    Args:
        name: of the detector.
        truth: as of `smca.analysis.metrics.load_truth`.
        detections: COCO results on its images.
        seconds: as of `detect`.
        threshold: the least score that counts where metrics need one; None: that of the best F1.
        image_ids: as of `smca.data.image_ids`.
    """
    categories = sorted(truth.dataset["categories"], key=lambda category: category["id"])
    matches = match(truth, detections)
    best, f1 = best_threshold(matches)
    if threshold is None:
        threshold = best
    counts = count_by_image(matches, threshold)
    found, false, missed = (sum(numbers) for numbers in zip(*counts.values()))
    f1 = 100 * 2 * found / max(2 * found + false + missed, 1)
    return Evaluation(
        name=name,
        class_names=[category["name"] for category in categories],
        category_ids=[category["id"] for category in categories],
        detections=detections,
        seconds=list(seconds),
        average_precision=average_precision(truth, detections),
        threshold=threshold,
        f1=f1,
        counts=counts,
        confusion=confusion_matrix(truth, detections, threshold),
        calibration=calibrate(matches),
        image_ids=image_ids or {},
    )


def worst_images(evaluation: Evaluation, count: int) -> List[int]:
    """Ids of the images with the lowest F1, those with most mistakes first among equals; images
    without a mistake are left out."""

    def quality(image_id: int) -> Tuple[float, int]:
        found, false, missed = evaluation.counts[image_id]
        return 2 * found / (2 * found + false + missed), -(false + missed)

    wrong = [
        image_id for image_id, (_, false, missed) in evaluation.counts.items() if false + missed
    ]
    return sorted(wrong, key=quality)[:count]


def device_name(model: torch.nn.Module) -> str:
    """The device that a model is on, for people."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, threads: {torch.get_num_threads()}"
