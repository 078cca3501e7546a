"""How good detections are: average precision, curves, confusions, calibration, the worst images.

Truth and detections are in COCO's format, boxes [x, y, width, height] in pixels. Average precision
is COCO's, by faster-coco-eval where that is installed, else by pycocotools. All the rest counts
with a single IoU, 0.5 unless told otherwise.
"""

import contextlib
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

try:  # the same numbers several times as fast; the extra "report"
    from faster_coco_eval import COCOeval_faster
except ImportError:
    COCOeval_faster = None

__all__ = [
    "AveragePrecision",
    "Calibration",
    "Matches",
    "ScoreBin",
    "average_precision",
    "best_threshold",
    "calibrate",
    "confusion_matrix",
    "count_by_image",
    "load_truth",
    "match",
]

Detection = Dict[str, Any]  # image_id, category_id, bbox, score

# COCO's names of objects by area, by its index: from 0, from 32^2 and from 96^2 pixels.
_AREAS = {"AP": 0, "APs": 1, "APm": 2, "APl": 3}
_IOU_50, _IOU_75 = 0, 5  # indices in COCO's 0.5, 0.55, ..., 0.95


def load_truth(annotations: Mapping[str, Any], image_ids: Optional[Sequence[int]] = None) -> COCO:
    """An index of COCO annotations.

    Args:
        annotations: a COCO JSON's content, with ``id``, ``area`` and ``iscrowd`` in each
            annotation; stays as it is.
        image_ids: the images to keep; None keeps all.
    """
    kept = {image["id"] for image in annotations["images"]}
    if image_ids is not None:
        kept &= set(image_ids)
    truth = COCO()
    truth.dataset = {
        **annotations,
        "images": [image for image in annotations["images"] if image["id"] in kept],
        "annotations": [dict(a) for a in annotations["annotations"] if a["image_id"] in kept],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


# Average precision


@dataclass
class AveragePrecision:
    """COCO's average precision, in percent; nan where there is no object.

    Attributes:
        overall: ``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, of small, medium and large
            objects ``APs``, ``APm``, ``APl``, and the recall of 100 detections ``AR``: means over
            the classes.
        classes: the same for each class, by its category id, and ``objects``, their number.
        recalls: (101) of the curves.
        curves: of each class, by its category id, (101) precision at each recall with IoU 0.5,
            interpolated as COCO does: the best precision at that recall or a higher one.
    """

    overall: Dict[str, float]
    classes: Dict[int, Dict[str, float]]
    recalls: np.ndarray
    curves: Dict[int, np.ndarray]


def average_precision(
    truth: COCO, detections: Sequence[Detection], fast: bool = COCOeval_faster is not None
) -> AveragePrecision:
    """COCO's average precision of boxes, up to 100 detections an image.

    Args:
        truth: as of `load_truth`.
        detections: on its images.
        fast: by faster-coco-eval, which has to be installed; else by pycocotools.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = (COCOeval_faster if fast else COCOeval)(*_numbered(truth, detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
    # (IoU, recall, class, area, detections an image) and the same without recall; -1: no object
    precision = np.array(evaluation.eval["precision"], dtype=np.float64)[..., -1]
    recall = np.array(evaluation.eval["recall"], dtype=np.float64)[..., -1]
    category_ids = sorted(truth.getCatIds())
    objects = dict.fromkeys(category_ids, 0)
    for annotation in truth.dataset["annotations"]:
        objects[annotation["category_id"]] += not annotation.get("iscrowd", 0)
    classes = {
        category_id: {
            **_summary(precision[:, :, [index]], recall[:, [index]]),
            "objects": objects[category_id],
        }
        for index, category_id in enumerate(category_ids)
    }
    curves = {
        category_id: np.where(curve < 0, np.nan, curve)
        for category_id, curve in zip(category_ids, precision[_IOU_50, :, :, 0].T)
    }
    recalls = np.asarray(evaluation.params.recThrs)
    return AveragePrecision(_summary(precision, recall), classes, recalls, curves)


def _numbered(truth: COCO, detections: Sequence[Detection]) -> Tuple[COCO, COCO]:
    """Truth and detections with the ids 1, 2, ..., for evaluators keep ids in floats and in types
    of 32 bits."""
    images = {key: number for number, key in enumerate(truth.getImgIds(), 1)}
    categories = {key: number for number, key in enumerate(sorted(truth.getCatIds()), 1)}

    def index(annotations: Sequence[Detection]) -> COCO:
        numbered = COCO()
        numbered.dataset = {
            "info": {},
            "images": [{"id": number} for number in images.values()],
            "categories": [{"id": number} for number in categories.values()],
            "annotations": [
                {
                    **annotation,
                    "id": number,
                    "image_id": images[annotation["image_id"]],
                    "category_id": categories[annotation["category_id"]],
                }
                for number, annotation in enumerate(annotations, 1)
            ],
        }
        numbered.createIndex()
        return numbered

    objects = index(truth.dataset["annotations"])
    # `loadRes` gives detections their areas, but cannot load none.
    found = index(detections).dataset["annotations"]
    return objects, objects.loadRes(found) if found else index([])


def _summary(precision: np.ndarray, recall: np.ndarray) -> Dict[str, float]:
    """Means over what has objects, of (IoU, recall, class, area) and (IoU, class, area)."""
    values = {name: _mean(precision[..., area]) for name, area in _AREAS.items()}
    values["AP50"] = _mean(precision[_IOU_50, ..., 0])
    values["AP75"] = _mean(precision[_IOU_75, ..., 0])
    values["AR"] = _mean(recall[..., 0])
    return {name: values[name] for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR")}


def _mean(values: np.ndarray) -> float:
    values = values[values > -1]
    return 100 * float(values.mean()) if values.size else float("nan")


# Which detections are right


@dataclass
class Matches:
    """Detections and the objects that they find, best score first.

    Attributes:
        scores: (N).
        correct: (N) bool, whether a detection found an object of its class.
        image_ids: (N).
        objects: number of objects, crowds apart, of each image (by its id).
    """

    scores: np.ndarray
    correct: np.ndarray
    image_ids: np.ndarray
    objects: Dict[int, int]


def match(truth: COCO, detections: Sequence[Detection], iou: float = 0.5) -> Matches:
    """Match detections and objects of the same class by COCO's rule: in each image the surest
    detection comes first and takes the free object with which its IoU is highest.

    Detections without an object of their own that lie in a crowd count neither as right nor as
    wrong: they are left out.

    Args:
        truth: as of `load_truth`.
        detections: on its images.
        iou: the least one of a match.
    """
    rows: List[Tuple[float, bool, int]] = []
    for image_id, found, annotations in _by_image(truth, detections):
        for category_id in {detection["category_id"] for detection in found}:
            of_class = [d for d in found if d["category_id"] == category_id]
            objects = [a for a in annotations if a["category_id"] == category_id]
            for detection, taken in zip(of_class, _assign(of_class, objects, iou)):
                if taken is None or not objects[taken].get("iscrowd", 0):
                    rows.append((detection["score"], taken is not None, image_id))
    rows.sort(key=lambda row: -row[0])
    objects_by_image = dict.fromkeys(truth.getImgIds(), 0)
    for annotation in truth.dataset["annotations"]:
        objects_by_image[annotation["image_id"]] += not annotation.get("iscrowd", 0)
    return Matches(
        np.array([row[0] for row in rows], dtype=np.float64),
        np.array([row[1] for row in rows], dtype=bool),
        np.array([row[2] for row in rows], dtype=object),  # ids of any size
        objects_by_image,
    )


def _by_image(truth: COCO, detections: Sequence[Detection]) -> Any:
    """Of each image its id, its detections, best first, and its objects."""
    found: Dict[int, List[Detection]] = {image_id: [] for image_id in truth.getImgIds()}
    for detection in sorted(detections, key=lambda detection: -detection["score"]):
        found[detection["image_id"]].append(detection)
    for image_id, of_image in found.items():
        yield image_id, of_image, truth.imgToAnns[image_id]


def _assign(
    detections: Sequence[Detection], objects: Sequence[Detection], iou: float
) -> List[Optional[int]]:
    """The index of the object that each detection takes, or None; a crowd is taken by as many as
    lie in it, but only by those that find no object."""
    if not detections or not objects:
        return [None] * len(detections)
    crowds = np.array([bool(a.get("iscrowd", 0)) for a in objects])
    # With a crowd it is the share of the detection that lies in it.
    overlaps = coco_mask.iou(
        [d["bbox"] for d in detections], [a["bbox"] for a in objects], crowds.astype(np.uint8)
    )
    free = ~crowds
    assigned: List[Optional[int]] = []
    for row in overlaps:
        candidates = np.where(free, row, -1.0)
        if candidates.max() < iou:
            candidates = np.where(crowds, row, -1.0)
        best = int(candidates.argmax())
        if candidates[best] < iou:
            assigned.append(None)
            continue
        free[best] = False
        assigned.append(best)
    return assigned


def best_threshold(matches: Matches) -> Tuple[float, float]:
    """The score from which on detections have the highest F1, over all images and classes.

    Returns:
        The threshold, and F1 = 2 TP / (detections + objects) in percent. Where nothing is found,
        0.5 and 0.
    """
    num_objects = sum(matches.objects.values())
    if not matches.correct.any():
        return 0.5, 0.0
    counts = np.arange(1, len(matches.scores) + 1)
    f1 = 2 * matches.correct.cumsum() / (counts + num_objects)
    # A threshold takes all detections of one score or none.
    is_last = np.append(matches.scores[1:] != matches.scores[:-1], True)
    best = int(np.where(is_last, f1, -1.0).argmax())
    return float(matches.scores[best]), 100 * float(f1[best])


def count_by_image(matches: Matches, threshold: float) -> Dict[int, Tuple[int, int, int]]:
    """Objects found, false detections and objects missed of each image, by its id.

    Args:
        matches: of all detections.
        threshold: the least score of a detection that counts.
    """
    counts = {image_id: [0, 0] for image_id in matches.objects}
    chosen = matches.scores >= threshold
    for image_id, correct in zip(matches.image_ids[chosen].tolist(), matches.correct[chosen]):
        counts[image_id][0 if correct else 1] += 1
    return {
        image_id: (found, false, matches.objects[image_id] - found)
        for image_id, (found, false) in counts.items()
    }


def confusion_matrix(
    truth: COCO, detections: Sequence[Detection], threshold: float, iou: float = 0.5
) -> np.ndarray:
    """Which class objects are taken for.

    In each image the surest detection comes first and takes the free object, of any class, with
    which its IoU is highest. Detections in a crowd are left out.

    Args:
        truth: as of `load_truth`.
        detections: on its images.
        threshold: the least score of a detection that counts.
        iou: the least one of a match.

    Returns:
        (C + 1, C + 1) int64: a row for each class of the objects, by ascending category id, and
        one for the background; a column for each class of the detections and one for nothing. So
        the last row has the false detections, the last column the missed objects.
    """
    indices = {category_id: i for i, category_id in enumerate(sorted(truth.getCatIds()))}
    background = len(indices)
    matrix = np.zeros((background + 1, background + 1), dtype=np.int64)
    confident = [d for d in detections if d["score"] >= threshold]
    for _, found, objects in _by_image(truth, confident):
        assigned = _assign(found, objects, iou)
        for detection, taken in zip(found, assigned):
            row = background
            if taken is not None:
                if objects[taken].get("iscrowd", 0):
                    continue
                row = indices[objects[taken]["category_id"]]
            matrix[row, indices[detection["category_id"]]] += 1
        for index, annotation in enumerate(objects):
            if index not in assigned and not annotation.get("iscrowd", 0):
                matrix[indices[annotation["category_id"]], background] += 1
    return matrix


# Calibration


@dataclass
class ScoreBin:
    """Detections with scores in [low, high), the last bin's in [low, high].

    Attributes:
        low, high: of the scores.
        count: number of detections; the means are nan if there are none.
        score: their mean score.
        precision: the share of them that is right.
    """

    low: float
    high: float
    count: int
    score: float
    precision: float


@dataclass
class Calibration:
    """Whether a score says how likely a detection is right.

    Attributes:
        bins: of equal width.
        error: expected calibration error, the mean over detections of their bin's
            |score - precision|; nan without detections (Guo et al. 2017, "On Calibration of Modern
            Neural Networks", equation 3).
    """

    bins: List[ScoreBin]
    error: float


def calibrate(matches: Matches, min_score: float = 0.05, num_bins: int = 10) -> Calibration:
    """Compare scores with how often detections are right.

    Args:
        matches: of all detections.
        min_score: detections below are left out. A detector gives a fixed number of detections,
            nearly all of a score near 0, which would hide the others.
        num_bins: between 0 and 1.
    """
    chosen = matches.scores >= min_score
    scores, correct = matches.scores[chosen], matches.correct[chosen]
    edges = np.linspace(0, 1, num_bins + 1)
    indices = np.clip(np.searchsorted(edges, scores, side="right") - 1, 0, num_bins - 1)
    counts = np.bincount(indices, minlength=num_bins)
    with np.errstate(invalid="ignore"):  # nan in empty bins
        means, precisions = (
            np.bincount(indices, weights=values, minlength=num_bins) / counts
            for values in (scores, correct)
        )
        error = np.nansum(counts * np.abs(means - precisions)) / np.float64(len(scores))
    columns = (edges[:-1], edges[1:], counts, means, precisions)
    bins = [ScoreBin(*row) for row in zip(*(column.tolist() for column in columns))]
    return Calibration(bins, float(error))
