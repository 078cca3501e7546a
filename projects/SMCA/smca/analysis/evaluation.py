"""What can be said of a detector on a data set: COCO's average precision, precision-recall curves,
matches with objects, and confusions of classes.

pycocotools matches detections and objects: in each image the detection with the highest score comes
first and takes the free object with which its IoU is highest. Detections in a crowd count neither
as right nor as wrong. Detections are COCO results: dicts with ``image_id``, ``category_id``,
``bbox`` ([x, y, width, height] in pixels) and ``score``.
"""

import collections
import contextlib
import io
import json
import time
from typing import TYPE_CHECKING, Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from smca.data import read_image
from smca.errors import UserError

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Predictor

Detection = Dict[str, Any]

RECALLS = np.linspace(0, 1, 101)  # of COCO's curves


class Evaluation:
    """All metrics of a detector on a data set. IoU is 0.5 where it is not said.

    Args:
        name: of the detector, for tables.
        truth, detections, seconds, image_ids: from `load_truth`, `detect`, `smca.data.image_ids`.
        threshold: the least score that counts where metrics need one; None: that of the best F1.
    """

    def __init__(
        self,
        name: str,
        truth: COCO,
        detections: List[Detection],
        seconds: Sequence[float] = (),
        threshold: Optional[float] = None,
        image_ids: Optional[Dict[int, Any]] = None,
    ):
        categories = sorted(truth.dataset["categories"], key=lambda category: category["id"])
        self.name = name
        self.class_names: List[str] = [category["name"] for category in categories]
        self.category_ids: List[int] = [category["id"] for category in categories]
        self.detections = detections
        self.milliseconds = 1000 * float(np.median(seconds)) if len(seconds) else float("nan")
        self.overall, self.classes, self.curves = average_precision(truth, detections)
        matches = match(truth, detections)
        self.threshold = best_threshold(truth, matches) if threshold is None else threshold
        self.counts = count_by_image(truth, matches, self.threshold)
        found, false, missed = (sum(numbers) for numbers in zip(*self.counts.values()))
        self.f1 = 100 * 2 * found / max(2 * found + false + missed, 1)
        self.confusion = confusion_matrix(truth, detections, self.threshold)
        self.image_ids = image_ids or {}  # to the ids of the user's JSON, where these are others

    def to_json(self) -> Dict[str, Any]:
        """All but the detections, in plain types; None for what is not a number."""
        names = dict(zip(self.category_ids, self.class_names))
        result = {
            "name": self.name,
            "overall": self.overall,
            "classes": {names[key]: values for key, values in self.classes.items()},
            "recalls": RECALLS.tolist(),
            "precisions_at_iou_50": {names[k]: v.tolist() for k, v in self.curves.items()},
            "threshold": self.threshold,
            "f1": self.f1,
            "confusion": {
                "labels": [*self.class_names, "background"],
                "truth_by_detection": self.confusion.tolist(),
            },
            "images": {
                str(self.image_ids.get(key, key)): dict(zip(("found", "false", "missed"), numbers))
                for key, numbers in self.counts.items()
            },
            "milliseconds_per_image": self.milliseconds,
        }
        return json.loads(json.dumps(result), parse_constant=lambda name: None)


def detect(
    predictor: "Predictor",
    dataset_dicts: Sequence[Dict[str, Any]],
    category_ids: Sequence[int],
    title: str = "",
) -> Tuple[List[Detection], List[float]]:
    """Run a detector on a data set in Detectron2's format, image by image, with a progress bar of
    that title; gives COCO results with the classes' `category_ids`, of whatever score, and the
    seconds that each image took, without reading its file. An image that cannot be read, or a class
    that `category_ids` lacks, is a UserError."""
    detections: List[Detection] = []
    seconds: List[float] = []
    for item in tqdm(dataset_dicts, title, unit="image", disable=None):
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


def load_truth(annotations: Dict[str, Any], image_ids: Optional[Sequence[int]] = None) -> COCO:
    """An index of a COCO JSON's content, with ``area`` and ``iscrowd`` in each annotation, and with
    these images; None keeps all. Annotations get the ids 1, 2, ..."""
    kept = {image["id"] for image in annotations["images"]}
    if image_ids is not None:
        kept &= set(image_ids)
    objects = (each for each in annotations["annotations"] if each["image_id"] in kept)
    return _index(
        {
            **annotations,
            "images": [image for image in annotations["images"] if image["id"] in kept],
            "annotations": [{**each, "id": number} for number, each in enumerate(objects, 1)],
        }
    )


def _index(dataset: Dict[str, Any]) -> COCO:
    coco = COCO()
    coco.dataset = dataset
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _evaluate(truth: COCO, detections: Sequence[Detection], **params: Any) -> COCOeval:
    """pycocotools' evaluation of boxes with these parameters, after `evaluate`."""
    with contextlib.redirect_stdout(io.StringIO()):
        if detections:
            found = truth.loadRes([dict(detection) for detection in detections])
        else:  # which `loadRes` cannot load
            found = _index({**truth.dataset, "annotations": []})
        evaluation = COCOeval(truth, found, "bbox")
        vars(evaluation.params).update(params)
        evaluation.evaluate()
    return evaluation


def average_precision(
    truth: COCO, detections: Sequence[Detection]
) -> Tuple[Dict[str, float], Dict[int, Dict[str, float]], Dict[int, np.ndarray]]:
    """COCO's average precision of boxes in percent, of up to 100 detections an image; nan where
    there is no object.

    Returns:
        overall: ``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, those of small, medium and
            large objects ``APs``, ``APm``, ``APl``, and ``AR``, the recall of 100 detections.
        classes: by category id ``AP``, ``AP50``, ``AP75``, and ``objects``, their number.
        curves: by category id (101,) precisions with IoU 0.5 at `RECALLS`. Each is the best at its
            recall or a higher one.
    """
    evaluation = _evaluate(truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)
    overall = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), stats.tolist()))
    overall["AR"] = float(stats[8])
    # (IoU, recall, class), of all areas and 100 detections; -1 for a class without objects
    precision = evaluation.eval["precision"][..., 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    objects = _count_objects(truth, "category_id")
    classes, curves = {}, {}
    for key, values in zip(evaluation.params.catIds, precision.transpose(2, 0, 1)):
        parts = {"AP": values, "AP50": values[0], "AP75": values[5]}
        numbers = {name: 100 * float(part.mean()) for name, part in parts.items()}
        classes[key] = {**numbers, "objects": objects[key]}
        curves[key] = values[0]
    return overall, classes, curves


def _count_objects(truth: COCO, key: str) -> Dict[int, int]:
    """The numbers of objects, without crowds, by their ``image_id`` or ``category_id``."""
    return collections.Counter(each[key] for each in truth.anns.values() if not each["iscrowd"])


class Match(NamedTuple):
    """A detection that is not in a crowd, and the object that it finds."""

    score: float
    image_id: int
    category_id: int
    found: Optional[int]  # category id of the object; None for a detection that finds none


def match(truth: COCO, detections: Sequence[Detection], by_class: bool = True) -> List[Match]:
    """Match detections and objects that have an IoU of at least 0.5, only within a class or, if
    `by_class` is false, with objects of any class. Detections are by falling score."""
    evaluation = _evaluate(
        truth,
        detections,
        useCats=int(by_class),
        iouThrs=np.array([0.5]),
        areaRng=[[0, np.inf]],
        areaRngLbl=["all"],
        maxDets=[len(detections)],
    )
    matches = []
    for image in filter(None, evaluation.evalImgs):
        columns = image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0]
        for key, object_id, is_ignored in zip(*columns):
            if not is_ignored:
                detection = evaluation.cocoDt.anns[key]
                place = detection["image_id"], detection["category_id"]
                found = truth.anns[int(object_id)]["category_id"] if object_id else None
                matches.append(Match(detection["score"], *place, found))
    return sorted(matches, key=lambda each: -each.score)


def best_threshold(truth: COCO, matches: Sequence[Match]) -> float:
    """The score from which on detections have the highest F1, over all images and classes; 0.5
    where nothing is found."""
    correct = np.array([each.found is not None for each in matches], dtype=bool)
    if not correct.any():
        return 0.5
    scores = np.array([each.score for each in matches])
    num_objects = sum(_count_objects(truth, "image_id").values())
    f1 = 2 * correct.cumsum() / (np.arange(1, len(scores) + 1) + num_objects)
    # A threshold takes all detections of one score or none.
    is_last = np.append(scores[1:] != scores[:-1], True)
    return float(scores[np.where(is_last, f1, -1.0).argmax()])


def count_by_image(
    truth: COCO, matches: Sequence[Match], threshold: float
) -> Dict[int, Tuple[int, int, int]]:
    """By image id the numbers of objects found, of false detections and of objects missed, of the
    detections with at least the score `threshold`."""
    counts = collections.Counter(
        (each.image_id, each.found is not None) for each in matches if each.score >= threshold
    )
    objects = _count_objects(truth, "image_id")
    return {
        key: (counts[key, True], counts[key, False], objects[key] - counts[key, True])
        for key in truth.getImgIds()
    }


def confusion_matrix(truth: COCO, detections: Sequence[Detection], threshold: float) -> np.ndarray:
    """Which class objects are taken for, when they are matched with detections of any class that
    have at least the score `threshold`.

    Returns:
        (C + 1, C + 1) int64: a row for each class of the objects, by ascending category id, and
        one for the background; a column for each class of the detections and one for nothing. The
        last row has the false detections, the last column the missed objects.
    """
    indices = {category_id: index for index, category_id in enumerate(sorted(truth.getCatIds()))}
    matrix = np.zeros((len(indices) + 1, len(indices) + 1), dtype=np.int64)
    for category_id, count in _count_objects(truth, "category_id").items():
        matrix[indices[category_id], -1] = count
    for each in match(truth, detections, by_class=False):
        if each.score >= threshold:
            row = -1 if each.found is None else indices[each.found]
            matrix[row, indices[each.category_id]] += 1
            matrix[row, -1] -= each.found is not None
    return matrix
