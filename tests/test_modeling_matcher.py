"""Hungarian matching and GIoU against the reference."""

import pytest
import torch

import reference
from helpers import assert_close, leaves, random_predictions, random_targets
from smca.modeling.box_ops import iou_and_giou
from smca.modeling.matcher import HungarianMatcher

C = 6
WEIGHTS = dict(class_weight=2.0, box_weight=5.0, giou_weight=2.0, alpha=0.25, gamma=2.0)


def generalized_iou(boxes1, boxes2):
    return iou_and_giou(boxes1, boxes2)[1]


def pairs(matching, layer, image):
    """Pairs (query, target) of one layer and image; targets count through all images."""
    chosen = (matching.layers == layer) & (matching.images == image)
    return sorted(zip(matching.queries[chosen].tolist(), matching.targets[chosen].tolist()))


@pytest.mark.parametrize(
    "num_queries, num_objects",
    [(5, [3, 0, 4]), (5, [5, 1]), (1, [1]), (3, [5, 2]), (2, [0, 6, 1]), (4, [0, 4])],
    ids=str,
)
def test_equals_the_reference(num_queries, num_objects):
    for seed in range(5):
        logits, boxes = random_predictions(3, len(num_objects), num_queries, C, seed)
        targets = random_targets(num_objects, C, seed)
        matching = HungarianMatcher(**WEIGHTS)(logits, boxes, targets)
        for layer in range(3):
            first = 0
            for image, target in enumerate(targets):
                expected = reference.match(logits[layer, image], boxes[layer, image], *target)
                expected = [(query, first + index) for query, index in expected]
                assert pairs(matching, layer, image) == expected
                first += num_objects[image]


@pytest.mark.parametrize("term", ["class", "box", "giou"])
def test_each_cost_term_has_its_weight(term):
    logits, boxes = random_predictions(1, 1, 4, C)
    (target,) = random_targets([3], C)
    weights = {"class_weight": 0.0, "box_weight": 0.0, "giou_weight": 0.0, f"{term}_weight": 3.0}
    cost = HungarianMatcher(**{**WEIGHTS, **weights}).cost(logits, boxes, [target])[0, 0]
    expected = {
        "class": reference.class_cost(logits[0, 0][:, target.labels]),
        "box": (boxes[0, 0][:, None] - target.boxes_cxcywh).abs().sum(-1),
        "giou": -reference.generalized_iou(boxes[0, 0], target.boxes_cxcywh),
    }[term]
    assert_close(cost, 3 * expected, 1e-4)


def test_certain_predictions_have_finite_costs():
    logits, boxes = random_predictions(1, 1, 4, C)
    targets = random_targets([3], C)
    assert HungarianMatcher(**WEIGHTS).cost(logits.sign() * 200, boxes, targets).isfinite().all()
    assert len(HungarianMatcher(**WEIGHTS)(logits.sign() * 200, boxes, targets).queries) == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("which", ["logits", "boxes"])
@pytest.mark.parametrize("queries", [[2], [0, 1, 2, 3]], ids=["one query", "every query"])
def test_predictions_that_are_not_finite_are_matched_all_the_same(which, value, queries):
    # Raising is for the trainer, which all processes do together.
    predictions = dict(zip(("logits", "boxes"), random_predictions(2, 2, 4, C)))
    targets = random_targets([2, 1], C)
    expected = HungarianMatcher(**WEIGHTS)(*predictions.values(), targets)
    predictions[which][1, 0, queries] = value
    matching = HungarianMatcher(**WEIGHTS)(*predictions.values(), targets)
    assert len(matching.queries) == 2 * 3
    for layer, image in ((0, 0), (0, 1), (1, 1)):
        assert pairs(matching, layer, image) == pairs(expected, layer, image)
    chosen = [query for query, _ in pairs(matching, 1, 0)]
    assert len(set(chosen)) == 2
    if value != value and len(queries) == 1:
        assert 2 not in chosen


def test_giou_equals_the_reference():
    _, boxes = random_predictions(1, 1, 12, C)
    first, second = leaves({"first": boxes[0, 0, :6], "second": boxes[0, 0, 6:]}).values()
    expected = reference.generalized_iou(first, second)
    corners = [reference.corners(x) for x in (first, second)]
    actual = generalized_iou(corners[0][:, None], corners[1])
    assert_close(actual, expected, 1e-5)
    actual_gradient = torch.autograd.grad(actual.sum(), [first, second], retain_graph=True)
    expected_gradient = torch.autograd.grad(expected.sum(), [first, second])
    for got, wanted in zip(actual_gradient, expected_gradient, strict=True):
        assert_close(got, wanted, 1e-4)


def test_giou_of_empty_boxes_is_finite():
    boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.2, 0.2, 0.2, 0.6]], requires_grad=True)
    giou = generalized_iou(boxes[:, None], boxes)
    giou.sum().backward()
    assert giou.isfinite().all() and boxes.grad.isfinite().all()
