"""Metrics of detections against counts by hand, and against pycocotools and Detectron2."""

import contextlib
import io
import math

import numpy as np
import pytest
from pycocotools.cocoeval import COCOeval

from smca.analysis.metrics import (
    COCOeval_faster,
    Matches,
    average_precision,
    best_threshold,
    calibrate,
    confusion_matrix,
    count_by_image,
    load_truth,
    match,
)

CAT, DOG = 3, 7  # category ids


def truth_of(*objects, num_images=2):
    """Objects as (image id, category id, box[, crowd])."""
    annotations = [
        {
            "id": i + 1,
            "image_id": image_id,
            "category_id": category_id,
            "bbox": box,
            "area": box[2] * box[3],
            "iscrowd": int(bool(crowd)),
        }
        for i, (image_id, category_id, box, *crowd) in enumerate(objects)
    ]
    images = [{"id": i + 1, "height": 500, "width": 500} for i in range(num_images)]
    categories = [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}]
    return load_truth({"images": images, "annotations": annotations, "categories": categories})


def detection(image_id, category_id, box, score):
    return {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}


LEFT, MIDDLE, RIGHT = [0, 0, 40, 40], [100, 0, 40, 40], [200, 0, 40, 40]
NEARLY_LEFT = [0, 0, 40, 36]  # IoU with LEFT 0.9
FAR = [300, 300, 20, 20]

# Image 1: two cats, the first found twice, the second taken for a dog; image 2: a dog, found, and
# a cat where nothing is.
TRUTH = truth_of((1, CAT, LEFT), (1, CAT, MIDDLE), (2, DOG, RIGHT))
DETECTIONS = [
    detection(1, CAT, LEFT, 0.9),
    detection(1, CAT, NEARLY_LEFT, 0.8),
    detection(1, DOG, MIDDLE, 0.7),
    detection(2, DOG, RIGHT, 0.6),
    detection(2, CAT, FAR, 0.2),
]


def random_case(seed, num_images=12, num_classes=4):
    """Truth with crowds, and detections near it, with other classes and elsewhere."""
    rng = np.random.default_rng(seed)
    categories = [{"id": 10 * i + 1, "name": str(i)} for i in range(num_classes)]
    annotations, detections = [], []
    for image_id in range(num_images):
        for _ in range(rng.integers(0, 9)):
            size = np.exp(rng.uniform(np.log(8), np.log(250), 2))
            box = np.concatenate([rng.uniform(0, 300, 2), size])
            category_id = 10 * int(rng.integers(num_classes - 1)) + 1  # the last has no objects
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image_id,
                    "category_id": category_id,
                    "bbox": box.tolist(),
                    "area": 0.7 * float(size.prod()),  # as with a mask
                    "iscrowd": int(rng.random() < 0.1),
                }
            )
            for _ in range(rng.integers(0, 4)):
                near = box + rng.normal(0, 0.06, 4) * np.tile(size, 2)
                if rng.random() < 0.2:
                    category_id = 10 * int(rng.integers(num_classes)) + 1
                score = round(float(rng.random()), 2)  # some are equal
                detections.append(detection(image_id, category_id, near.tolist(), score))
    images = [{"id": i, "height": 600, "width": 600} for i in range(num_images)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    return load_truth(content), detections


# Average precision


@pytest.mark.parametrize("fast", [False, True], ids=["pycocotools", "faster-coco-eval"])
@pytest.mark.parametrize("seed", range(4))
def test_average_precision_is_that_of_pycocotools(seed, fast):
    if fast and COCOeval_faster is None:
        pytest.skip("faster-coco-eval is not installed")
    truth, detections = random_case(seed)
    with contextlib.redirect_stdout(io.StringIO()):
        reference = COCOeval(truth, truth.loadRes([dict(d) for d in detections]), "bbox")
        reference.evaluate()
        reference.accumulate()
        reference.summarize()
    result = average_precision(truth, detections, fast=fast)
    names = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    expected = [*reference.stats[:6], reference.stats[8]]
    actual = [result.overall[name] / 100 for name in [*names, "AR"]]
    assert actual == pytest.approx(expected, abs=1e-6)
    precision = reference.eval["precision"]
    for index, category_id in enumerate(sorted(truth.getCatIds())):
        curve, of_class = precision[0, :, index, 0, -1], result.classes[category_id]
        if (curve < 0).all():
            assert math.isnan(of_class["AP"]) and of_class["objects"] == 0
            continue
        assert result.curves[category_id] == pytest.approx(curve, abs=1e-6)
        expected = precision[:, :, index, 0, -1].mean()
        assert of_class["AP"] / 100 == pytest.approx(expected, abs=1e-6)
    without_objects = [c for c, values in result.classes.items() if not values["objects"]]
    assert without_objects == [31]


def test_a_precision_recall_curve_counted_by_hand():
    # In order of their scores: right, wrong, right, wrong. Two of the three cats are found:
    # precision 1 up to recall 1/3, 2/3 up to recall 2/3, nothing beyond.
    truth = truth_of((1, CAT, LEFT), (1, CAT, MIDDLE), (2, CAT, LEFT))
    result = average_precision(
        truth,
        [
            detection(1, CAT, LEFT, 0.9),
            detection(1, CAT, FAR, 0.8),
            detection(2, CAT, LEFT, 0.7),
            detection(2, CAT, FAR, 0.6),
        ],
    )
    recalls = np.linspace(0, 1, 101)
    expected = np.where(recalls <= 1 / 3, 1, np.where(recalls <= 2 / 3, 2 / 3, 0))
    assert result.curves[CAT] == pytest.approx(expected)
    assert np.isnan(result.curves[DOG]).all()
    assert result.classes[CAT]["AP50"] == pytest.approx(100 * expected.mean())
    assert result.overall["AP50"] == result.classes[CAT]["AP50"]


@pytest.mark.parametrize("fast", [False, True])
def test_without_detections_average_precision_is_zero(fast):
    if fast and COCOeval_faster is None:
        pytest.skip("faster-coco-eval is not installed")
    result = average_precision(TRUTH, [], fast=fast)
    assert result.overall["AP"] == result.overall["AR"] == 0
    assert math.isnan(result.overall["APl"])


def test_truth_can_be_of_some_images_only():
    truth = load_truth(TRUTH.dataset, image_ids=[2])
    assert truth.getImgIds() == [2] and truth.getAnnIds() == [3]
    assert average_precision(truth, DETECTIONS[3:]).classes[DOG]["AP"] == pytest.approx(100)


# Matches, threshold, worst images


def test_an_object_is_found_once_and_by_the_surest_detection_of_its_class():
    matches = match(TRUTH, DETECTIONS)
    assert matches.scores.tolist() == [0.9, 0.8, 0.7, 0.6, 0.2]
    assert matches.correct.tolist() == [True, False, False, True, False]
    assert matches.image_ids.tolist() == [1, 1, 1, 2, 2]
    assert matches.objects == {1: 2, 2: 1}


def test_a_match_needs_its_iou():
    truth, found = truth_of((1, CAT, LEFT)), [detection(1, CAT, NEARLY_LEFT, 0.5)]
    assert match(truth, found, iou=0.9).correct.tolist() == [True]
    assert match(truth, found, iou=0.91).correct.tolist() == [False]


def test_detections_in_a_crowd_do_not_count():
    crowd = (1, CAT, [90, 0, 200, 200], True)
    truth = truth_of((1, CAT, LEFT), crowd)
    found = [detection(1, CAT, box, 0.5) for box in (LEFT, MIDDLE, RIGHT, FAR)]
    matches = match(truth, found)
    assert sorted(matches.correct.tolist()) == [False, True] and matches.objects == {1: 1, 2: 0}
    assert confusion_matrix(truth, found, 0).tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_an_object_in_a_crowd_is_found_before_the_crowd():
    # The detection lies in the crowd wholly, and covers the object by 0.9 only.
    truth = truth_of((1, CAT, [0, 0, 200, 200], True), (1, CAT, LEFT))
    found = [detection(1, CAT, NEARLY_LEFT, 0.5)]
    assert match(truth, found).correct.tolist() == [True]
    assert confusion_matrix(truth, found, 0)[:, 2].tolist() == [0, 0, 0]  # nothing is missed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("iou", [0.5, 0.75])
def test_matches_are_those_of_pycocotools(seed, iou):
    truth, detections = random_case(seed)
    for index, found in enumerate(detections):
        found["score"] += 1e-6 * index  # no two are equal
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes([dict(d) for d in detections])
        reference = COCOeval(truth, results, "bbox")
        reference.evaluate()
    row = {0.5: 0, 0.75: 5}[iou]
    expected = []
    for image in reference.evalImgs:
        if image is None or image["aRng"] != reference.params.areaRng[0]:
            continue
        columns = image["dtScores"], image["dtMatches"][row], image["dtIgnore"][row]
        for score, matched, ignored in zip(*columns):
            if not ignored:
                expected.append((score, matched > 0, image["image_id"]))
    matches = match(truth, detections, iou)
    actual = zip(matches.scores.tolist(), matches.correct.tolist(), matches.image_ids.tolist())
    assert list(actual) == sorted(expected, reverse=True)


def test_best_threshold_has_the_highest_f1():
    # F1 = 2 TP / (detections + objects), of 3 objects: 2/4, 2/5, 2/6, 4/7, 4/8.
    threshold, f1 = best_threshold(match(TRUTH, DETECTIONS))
    assert threshold == 0.6 and f1 == pytest.approx(400 / 7)


def test_best_threshold_takes_all_detections_of_one_score():
    # The right one of two detections of one score does not come without the wrong one.
    matches = Matches(
        np.array([0.9, 0.5, 0.5]), np.array([True, True, False]), np.array([1, 1, 1]), {1: 2}
    )
    assert best_threshold(matches) == (0.5, pytest.approx(80.0))


def test_best_threshold_where_nothing_is_right():
    assert best_threshold(match(TRUTH, DETECTIONS[4:])) == (0.5, 0.0)
    assert best_threshold(match(TRUTH, [])) == (0.5, 0.0)


def test_counts_of_each_image_are_found_false_and_missed():
    matches = match(TRUTH, DETECTIONS)
    assert count_by_image(matches, 0.6) == {1: (1, 2, 1), 2: (1, 0, 0)}
    assert count_by_image(matches, 0.1) == {1: (1, 2, 1), 2: (1, 1, 0)}
    assert count_by_image(matches, 0.95) == {1: (0, 0, 2), 2: (0, 0, 1)}


# Confusions


def test_a_confusion_matrix_counted_by_hand():
    # Rows cat, dog, background; columns cat, dog, nothing.
    assert confusion_matrix(TRUTH, DETECTIONS, 0.1).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    assert confusion_matrix(TRUTH, DETECTIONS, 0.75).tolist() == [[1, 0, 1], [0, 0, 1], [1, 0, 0]]
    assert confusion_matrix(TRUTH, [], 0.5).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]


@pytest.mark.parametrize("seed", range(2))
def test_a_confusion_matrix_has_every_object_and_every_detection_once(seed):
    truth, detections = random_case(seed)
    truth = load_truth(
        {
            **truth.dataset,
            "annotations": [a for a in truth.dataset["annotations"] if not a["iscrowd"]],
        }
    )
    matrix = confusion_matrix(truth, detections, 0.3)
    assert matrix[:-1].sum() == len(truth.anns)
    assert matrix[:, :-1].sum() == sum(d["score"] >= 0.3 for d in detections)


# Calibration


def test_calibration_counted_by_hand():
    scores = np.array([0.95, 0.91, 0.55, 0.52, 0.51, 0.02])
    correct = np.array([True, False, True, False, False, True])
    matches = Matches(scores, correct, np.ones(6, dtype=int), {1: 4})
    calibration = calibrate(matches, min_score=0.05)
    filled = {round(b.low, 1): b for b in calibration.bins if b.count}
    assert sorted(filled) == [0.5, 0.9]
    assert filled[0.9].count == 2 and filled[0.9].precision == 0.5
    assert filled[0.9].score == pytest.approx(0.93)
    assert filled[0.5].count == 3 and filled[0.5].precision == pytest.approx(1 / 3)
    low_error, high_error = (0.55 + 0.52 + 0.51) / 3 - 1 / 3, 0.93 - 0.5
    assert calibration.error == pytest.approx((3 * low_error + 2 * high_error) / 5)


@pytest.mark.parametrize(
    "scores, num_correct, low, error",
    [([0.75] * 4, 3, 0.7, 0), ([1.0], 1, 0.9, 0), ([0.5], 1, 0.5, 0.5), ([], 0, None, math.nan)],
)
def test_calibration_of_equal_scores(scores, num_correct, low, error):
    correct = np.arange(len(scores)) < num_correct
    matches = Matches(np.array(scores), correct, np.ones(len(scores), dtype=int), {1: 9})
    calibration = calibrate(matches)
    lows = [pytest.approx(each.low) for each in calibration.bins if each.count]
    assert lows == ([] if low is None else [low])
    assert calibration.error == pytest.approx(error, abs=1e-12, nan_ok=True)
