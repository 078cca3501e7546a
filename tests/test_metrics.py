"""Metrics of detections against counts by hand; test_evaluate.py has Detectron2's AP."""

import math

import numpy as np
import pytest

from smca.analysis.evaluation import (
    RECALLS,
    Match,
    average_precision,
    best_threshold,
    confusion_matrix,
    count_by_image,
    load_truth,
    match,
)

CAT, DOG = 3, 7  # category ids


def truth_of(*objects, num_images=2):
    """Objects as (image id, category id, box[, crowd])."""
    annotations = [
        {"id": i + 1, "image_id": image_id, "category_id": category_id, "bbox": box}
        | {"area": box[2] * box[3], "iscrowd": int(bool(crowd))}
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


# Average precision


def test_a_precision_recall_curve_counted_by_hand():
    # In order of their scores: right, wrong, right, wrong. Two of the three cats are found:
    # precision 1 up to recall 1/3, 2/3 up to recall 2/3, nothing beyond.
    truth = truth_of((1, CAT, LEFT), (1, CAT, MIDDLE), (2, CAT, LEFT))
    found = [(1, LEFT, 0.9), (1, FAR, 0.8), (2, LEFT, 0.7), (2, FAR, 0.6)]
    found = [detection(image, CAT, box, score) for image, box, score in found]
    overall, classes, curves = average_precision(truth, found)
    expected = np.where(RECALLS <= 1 / 3, 1, np.where(RECALLS <= 2 / 3, 2 / 3, 0))
    assert curves[CAT] == pytest.approx(expected)
    assert np.isnan(curves[DOG]).all()
    assert classes[CAT]["AP50"] == pytest.approx(100 * expected.mean())
    assert overall["AP50"] == classes[CAT]["AP50"]


def test_without_detections_average_precision_is_zero():
    overall, _, _ = average_precision(TRUTH, [])
    assert overall["AP"] == overall["AR"] == 0
    assert math.isnan(overall["APl"])


# Matches, threshold, worst images


def test_an_object_is_found_once_and_by_the_surest_detection_of_its_class():
    matches = match(TRUTH, DETECTIONS)
    assert [each.score for each in matches] == [0.9, 0.8, 0.7, 0.6, 0.2]
    assert [each.found for each in matches] == [CAT, None, None, DOG, None]
    assert [each.image_id for each in matches] == [1, 1, 1, 2, 2]


def test_a_match_needs_its_iou():
    for width, is_match in ((20, True), (19, False)):  # of 40, the object's
        found = [detection(1, CAT, [0, 0, width, 40], 0.5)]
        (found,) = match(truth_of((1, CAT, LEFT)), found)
        assert (found.found == CAT) == is_match


def test_detections_in_a_crowd_do_not_count():
    crowd = (1, CAT, [90, 0, 200, 200], True)
    truth = truth_of((1, CAT, LEFT), crowd)
    found = [detection(1, CAT, box, 0.5) for box in (LEFT, MIDDLE, RIGHT, FAR)]
    matches = match(truth, found)
    assert [each.found for each in matches] in ([CAT, None], [None, CAT])
    assert count_by_image(truth, matches, 0) == {1: (1, 1, 0), 2: (0, 0, 0)}
    assert confusion_matrix(truth, found, 0).tolist() == [[1, 0, 0], [0, 0, 0], [1, 0, 0]]


def test_an_object_in_a_crowd_is_found_before_the_crowd():
    # The detection lies in the crowd wholly, and covers the object by 0.9 only.
    truth = truth_of((1, CAT, [0, 0, 200, 200], True), (1, CAT, LEFT))
    found = [detection(1, CAT, NEARLY_LEFT, 0.5)]
    assert [each.found for each in match(truth, found)] == [CAT]
    assert confusion_matrix(truth, found, 0)[:, 2].tolist() == [0, 0, 0]  # nothing is missed


def test_best_threshold_has_the_highest_f1():
    # F1 = 2 TP / (detections + objects), of 3 objects: 2/4, 2/5, 2/6, 4/7, 4/8.
    matches = match(TRUTH, DETECTIONS)
    assert best_threshold(TRUTH, matches) == 0.6
    # The right one of two detections of one score does not come without the wrong one.
    tie = [Match(score, 1, CAT, found) for score, found in ((0.9, CAT), (0.5, CAT), (0.5, None))]
    assert best_threshold(truth_of((1, CAT, LEFT), (1, CAT, MIDDLE)), tie) == 0.5
    assert best_threshold(TRUTH, matches[4:]) == 0.5  # where nothing is right
    assert best_threshold(TRUTH, []) == 0.5


def test_counts_of_each_image_are_found_false_and_missed():
    matches = match(TRUTH, DETECTIONS)
    assert count_by_image(TRUTH, matches, 0.6) == {1: (1, 2, 1), 2: (1, 0, 0)}
    assert count_by_image(TRUTH, matches, 0.1) == {1: (1, 2, 1), 2: (1, 1, 0)}
    assert count_by_image(TRUTH, matches, 0.95) == {1: (0, 0, 2), 2: (0, 0, 1)}


# Confusions


def test_a_confusion_matrix_counted_by_hand():
    # Rows cat, dog, background; columns cat, dog, nothing.
    assert confusion_matrix(TRUTH, DETECTIONS, 0.1).tolist() == [[1, 1, 0], [0, 1, 0], [2, 0, 0]]
    assert confusion_matrix(TRUTH, DETECTIONS, 0.75).tolist() == [[1, 0, 1], [0, 0, 1], [1, 0, 0]]
    assert confusion_matrix(TRUTH, [], 0.5).tolist() == [[0, 0, 2], [0, 0, 1], [0, 0, 0]]
