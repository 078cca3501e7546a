"""A detector on a data set: its detections, and all that `metrics` says of them."""

import json
import time
from dataclasses import dataclass, field
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    Iterable,
    List,
    Mapping,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import numpy as np
import torch
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO

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

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Predictor

__all__ = ["Evaluation", "detect", "device_name", "evaluate", "worst_images"]


@dataclass
class Evaluation:
    """What is known of a detector on a data set. IoU is 0.5 where it is not said.

    Attributes:
        name: of the detector, for tables.
        class_names, category_ids: by ascending id.
        detections: COCO results with any score.
        seconds: of each image.
        threshold: the least score of the detections that `f1`, `counts` and `confusion` count.
        f1: 2 TP / (detections + objects) in percent.
        counts, confusion: see `count_by_image` and `confusion_matrix`.
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
        """The median of an image's."""
        return 1000 * float(np.median(self.seconds)) if self.seconds else float("nan")

    def to_json(self) -> Dict[str, Any]:
        """All but the detections, in plain types; None for what is not a number."""
        names = dict(zip(self.category_ids, self.class_names))
        found = self.average_precision
        counts = {
            str(self.image_ids.get(key, key)): dict(zip(("found", "false", "missed"), numbers))
            for key, numbers in self.counts.items()
        }
        result = {
            "name": self.name,
            "overall": found.overall,
            "classes": {names[key]: values for key, values in found.classes.items()},
            "recalls": found.recalls.tolist(),
            "precisions_at_iou_50": {names[k]: v.tolist() for k, v in found.curves.items()},
            "threshold": self.threshold,
            "f1": self.f1,
            "confusion": {
                "labels": [*self.class_names, "background"],
                "truth_by_detection": self.confusion.tolist(),
            },
            "calibration": {
                "expected_calibration_error": self.calibration.error,
                "bins": self.calibration.bins,
            },
            "images": counts,
            "milliseconds_per_image": self.milliseconds,
        }
        return json.loads(json.dumps(result), parse_constant=lambda name: None)


def detect(
    predictor: "Predictor",
    dataset_dicts: Sequence[Dict[str, Any]],
    category_ids: Sequence[int],
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> Tuple[List[Detection], List[float]]:
    """Run a detector on a data set, image by image.

    Args:
        predictor: gives all its detections, of whatever score.
        dataset_dicts: in Detectron2's format, with ``image_id``.
        category_ids: of the classes, by their index.
        progress: wraps the images, as `tqdm.tqdm` does.

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
        for detection in instances_to_coco_json(found, item["image_id"]):
            detections.append({**detection, "category_id": category_ids[detection["category_id"]]})
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
        truth: from `smca.analysis.metrics.load_truth`.
        detections, seconds: from `detect`.
        threshold: the least score that counts where metrics need one; None: that of the best F1.
        image_ids: from `smca.data.image_ids`.
    """
    categories = sorted(truth.dataset["categories"], key=lambda category: category["id"])
    matches = match(truth, detections)
    if threshold is None:
        threshold, _ = best_threshold(matches)
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

    wrong = [key for key, (_, false, missed) in evaluation.counts.items() if false + missed]
    return sorted(wrong, key=quality)[:count]


def device_name(model: torch.nn.Module) -> str:
    """The device that a model is on, for people."""
    device = next(model.parameters()).device
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, threads: {torch.get_num_threads()}"
