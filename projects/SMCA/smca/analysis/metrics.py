"""What can be said of detections beside their average precision: curves, matches with objects,
confusions of classes, and whether scores can be trusted.

pycocotools matches detections and objects: in each image the detection with the highest score comes
first and takes the free object with which its IoU is highest. Detections in a crowd count neither
as right nor as wrong. Detections are COCO results: dicts with ``image_id``, ``category_id``,
``bbox`` ([x, y, width, height] in pixels) and ``score``.
"""

import collections
import contextlib
import io
from dataclasses import dataclass
from typing import Any, Dict, List, Mapping, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = [
    "AveragePrecision",
    "Calibration",
    "Matches",
    "average_precision",
    "best_threshold",
    "calibrate",
    "confusion_matrix",
    "count_by_image",
    "load_truth",
    "match",
]

Detection = Dict[str, Any]


def load_truth(annotations: Mapping[str, Any], image_ids: Optional[Sequence[int]] = None) -> COCO:
    """An index of COCO annotations.

    Args:
        annotations: a COCO JSON's content, with ``area`` and ``iscrowd`` in each annotation; it is
            not changed. Annotations get the ids 1, 2, ...
        image_ids: the images to keep; None keeps all.
    """
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


def _index(dataset: Mapping[str, Any]) -> COCO:
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


@dataclass
class AveragePrecision:
    """COCO's average precision in percent; nan where there is no object.

    Attributes:
        overall: ``AP`` (mean over IoU 0.5 to 0.95), ``AP50``, ``AP75``, those of small, medium and
            large objects ``APs``, ``APm``, ``APl``, and ``AR``, the recall of 100 detections.
        classes: by category id ``AP``, ``AP50``, ``AP75``, and ``objects``, their number.
        recalls: (101,) of the curves.
        curves: by category id (101,) precisions with IoU 0.5. Each is the best at its recall or a
            higher one.
    """

    overall: Dict[str, float]
    classes: Dict[int, Dict[str, float]]
    recalls: np.ndarray
    curves: Dict[int, np.ndarray]


def average_precision(truth: COCO, detections: Sequence[Detection]) -> AveragePrecision:
    """COCO's average precision of boxes, of up to 100 detections an image.

    Args:
        truth: from `load_truth`.
        detections: on its images.
    """
    evaluation = _evaluate(truth, detections)
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.accumulate()
        evaluation.summarize()
    stats = np.where(evaluation.stats < 0, np.nan, 100 * evaluation.stats)
    overall = dict(zip(("AP", "AP50", "AP75", "APs", "APm", "APl"), stats.tolist()))
    # (IoU, recall, class), of all areas and 100 detections; -1 for a class without objects
    precision = evaluation.eval["precision"][..., 0, -1]
    precision = np.where(precision < 0, np.nan, precision)
    objects = collections.Counter(
        each["category_id"] for each in truth.anns.values() if not each["iscrowd"]
    )
    classes, curves = {}, {}
    for key, values in zip(evaluation.params.catIds, precision.transpose(2, 0, 1)):
        parts = {"AP": values, "AP50": values[0], "AP75": values[5]}
        numbers = {name: 100 * float(part.mean()) for name, part in parts.items()}
        classes[key] = {**numbers, "objects": objects[key]}
        curves[key] = values[0]
    overall["AR"] = float(stats[8])
    return AveragePrecision(overall, classes, np.asarray(evaluation.params.recThrs), curves)


class Matches(NamedTuple):
    """N detections, those in crowds left out, by falling score, and the objects that they find.

    Attributes:
        scores: (N,).
        image_ids: N.
        classes: N category ids.
        found: N category ids of the objects; None for a detection that finds none.
        num_objects: of each image, by its id, without crowds.
    """

    scores: np.ndarray
    image_ids: List[int]
    classes: List[int]
    found: List[Optional[int]]
    num_objects: Dict[int, int]

    @property
    def correct(self) -> np.ndarray:
        """(N,) bool, whether a detection finds an object."""
        return np.array([category_id is not None for category_id in self.found], dtype=bool)


def match(
    truth: COCO, detections: Sequence[Detection], iou: float = 0.5, by_class: bool = True
) -> Matches:
    """Match detections and objects.

    Args:
        truth: from `load_truth`.
        detections: on its images.
        iou: the least one of a match.
        by_class: only within a class; False: with objects of any class.
    """
    evaluation = _evaluate(
        truth,
        detections,
        useCats=int(by_class),
        iouThrs=np.array([iou]),
        areaRng=[[0, np.inf]],
        areaRngLbl=["all"],
        maxDets=[len(detections)],
    )
    rows: List[Tuple[float, int, int, Optional[int]]] = []
    for image in filter(None, evaluation.evalImgs):
        columns = image["dtIds"], image["dtMatches"][0], image["dtIgnore"][0]
        for key, object_id, is_ignored in zip(*columns):
            if not is_ignored:
                detection = evaluation.cocoDt.anns[key]
                found = truth.anns[int(object_id)]["category_id"] if object_id else None
                place = detection["image_id"], detection["category_id"]
                rows.append((detection["score"], *place, found))
    rows.sort(key=lambda row: -row[0])
    num_objects = dict.fromkeys(truth.getImgIds(), 0)
    for annotation in truth.anns.values():
        num_objects[annotation["image_id"]] += not annotation["iscrowd"]
    scores, *others = map(list, zip(*rows)) if rows else ([], [], [], [])
    return Matches(np.array(scores, dtype=np.float64), *others, num_objects)  # type: ignore


def best_threshold(matches: Matches) -> Tuple[float, float]:
    """The score from which on detections have the highest F1, over all images and classes.

    Returns:
        The threshold, and F1 = 2 TP / (detections + objects) in percent. Where nothing is found,
        0.5 and 0.
    """
    if not matches.correct.any():
        return 0.5, 0.0
    counts = np.arange(1, len(matches.scores) + 1)
    f1 = 2 * matches.correct.cumsum() / (counts + sum(matches.num_objects.values()))
    # A threshold takes all detections of one score or none.
    is_last = np.append(matches.scores[1:] != matches.scores[:-1], True)
    best = int(np.where(is_last, f1, -1.0).argmax())
    return float(matches.scores[best]), 100 * float(f1[best])


def count_by_image(matches: Matches, threshold: float) -> Dict[int, Tuple[int, int, int]]:
    """By image id the numbers of objects found, of false detections and of objects missed, of the
    detections with at least the score `threshold`."""
    found, false = collections.Counter[int](), collections.Counter[int]()
    for score, image_id, is_correct in zip(matches.scores, matches.image_ids, matches.correct):
        if score >= threshold:
            (found if is_correct else false)[image_id] += 1
    return {
        key: (found[key], false[key], count - found[key])
        for key, count in matches.num_objects.items()
    }


def confusion_matrix(
    truth: COCO, detections: Sequence[Detection], threshold: float, iou: float = 0.5
) -> np.ndarray:
    """Which class objects are taken for, when they are matched with detections of any class.

    Args:
        truth, detections, iou: as in `match`.
        threshold: the least score of a detection that counts.

    Returns:
        (C + 1, C + 1) int64: a row for each class of the objects, by ascending category id, and
        one for the background; a column for each class of the detections and one for nothing. The
        last row has the false detections, the last column the missed objects.
    """
    indices = {category_id: index for index, category_id in enumerate(sorted(truth.getCatIds()))}
    matrix = np.zeros((len(indices) + 1, len(indices) + 1), dtype=np.int64)
    for annotation in truth.anns.values():
        matrix[indices[annotation["category_id"]], -1] += not annotation["iscrowd"]
    matches = match(truth, detections, iou, by_class=False)
    for score, detected, found in zip(matches.scores, matches.classes, matches.found):
        if score >= threshold:
            row = -1 if found is None else indices[found]
            matrix[row, indices[detected]] += 1
            matrix[row, -1] -= found is not None
    return matrix


class Calibration(NamedTuple):
    """Whether a score says how likely a detection is right.

    Attributes:
        bins: of equal width: ``low`` and ``high`` score; ``count`` of detections with scores in
            [low, high); their mean ``score``, and ``precision``, the share that is right, both nan
            in an empty bin.
        error: expected calibration error, the mean over detections of their bin's
            |score - precision|; nan without detections (Guo et al. 2017, "On Calibration of Modern
            Neural Networks", equation 3).
    """

    bins: List[Dict[str, float]]
    error: float


def calibrate(matches: Matches, min_score: float = 0.05, num_bins: int = 10) -> Calibration:
    """Compare scores with how often detections are right.

    Args:
        matches: of all detections.
        min_score: detections below are left out. A detector gives a fixed number of detections,
            nearly all with a score near 0, which would hide the others.
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
    columns = edges[:-1], edges[1:], counts, means, precisions
    names = "low", "high", "count", "score", "precision"
    bins = [dict(zip(names, row)) for row in zip(*(column.tolist() for column in columns))]
    return Calibration(bins, float(error))
