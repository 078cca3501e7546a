"""Losses against loops over images and matched pairs."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import reference
from helpers import assert_close, assert_same_gradients, leaves, random_predictions, random_targets
from smca.engine.trainer import Trainer
from smca.errors import NonFiniteError
from smca.modeling.class_loss import FocalLoss, VarifocalLoss
from smca.modeling.criterion import SetCriterion
from smca.modeling.matcher import Matching, Predictions

C, Q = 6, 5


def random_inputs(num_layers, num_objects, num_queries=Q, seed=0):
    logits, boxes = random_predictions(num_layers, len(num_objects), num_queries, C, seed)
    inputs = leaves({"logits": logits, "boxes": boxes})
    return inputs, random_targets(num_objects, C, seed)


def reference_losses(inputs, targets):
    """Weighted losses of all layers."""
    targets = [{"labels": t.labels, "boxes": t.boxes_cxcywh} for t in targets]
    return reference.weighted(reference.losses(*map(list, inputs.values()), targets))


@pytest.mark.parametrize(
    "num_objects",
    [[3, 1], [0, 2], [0, 0], [1], [7, 2], [6]],
    ids=[
        "objects in every image",
        "an image without objects",
        "a batch without objects",
        "one image",
        "more objects than queries",
        "only more objects than queries",
    ],
)
@pytest.mark.parametrize("num_layers", [1, 3])
def test_losses_equal_the_reference(num_layers, num_objects):
    inputs, targets = random_inputs(num_layers, num_objects)
    losses = SetCriterion()(Predictions(*inputs.values()), targets)
    expected = reference_losses(inputs, targets)
    assert set(losses) == set(expected)
    for name, value in expected.items():
        assert losses[name].shape == ()
        assert_close(losses[name], value, 1e-5)
    names = sorted(expected)
    assert_same_gradients([losses[n] for n in names], [expected[n] for n in names], inputs)


@pytest.mark.parametrize("kind", ["ce", "bbox", "giou"])
def test_each_loss_has_its_weight(kind):
    weight = {"ce": "class_weight", "bbox": "box_weight", "giou": "giou_weight"}[kind]
    inputs, targets = random_inputs(2, [2, 1])
    plain = SetCriterion()(Predictions(*inputs.values()), targets)
    heavy = SetCriterion(**{weight: 7.0}, matcher=SetCriterion().matcher)(
        Predictions(*inputs.values()), targets
    )
    for name in plain:
        factor = 7 / reference.LOSS_WEIGHTS[f"loss_{kind}"] if f"_{kind}" in name else 1.0
        assert_close(heavy[name], plain[name] * factor, 1e-5)


def test_the_focal_loss_has_its_alpha_and_gamma():
    inputs, targets = random_inputs(1, [0, 0])
    losses = SetCriterion(class_weight=1.0, alpha=0.4, gamma=1.0)(
        Predictions(*inputs.values()), targets
    )
    p = inputs["logits"].sigmoid()  # nothing is there to be found
    assert_close(losses["loss_ce"], (0.6 * p * -(1 - p).log()).sum(), 1e-5)


def test_matching_has_the_weights_of_the_losses():
    weights = dict(class_weight=1.5, box_weight=3.0, giou_weight=0.5, alpha=0.4, gamma=1.0)
    criterion = SetCriterion(**weights)
    loss = {**vars(criterion), **vars(criterion.class_loss)}
    assert {name: loss[name] for name in weights} == weights
    assert {name: getattr(criterion.matcher, name) for name in weights} == weights


@pytest.mark.parametrize("num_objects", [[2, 1], [0, 2], [0, 0]], ids=str)
@pytest.mark.parametrize("which", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_one_prediction_that_is_not_finite_makes_the_losses_so(which, value, num_objects):
    # Of a query that no object wants, in the first layer and image.
    inputs, targets = random_inputs(2, num_objects, num_queries=9)
    inputs["logits"].data[0, 0, 8] = -30.0
    inputs[which].data[0, 0, 8, 3] = value
    losses = SetCriterion()(Predictions(*inputs.values()), targets)
    assert not sum(losses[f"loss_{kind}_0"] for kind in ("ce", "bbox", "giou")).isfinite()
    assert all(losses[f"loss_{kind}"].isfinite() for kind in ("ce", "bbox", "giou"))


@pytest.mark.parametrize("class_loss", [FocalLoss(), VarifocalLoss()])
def test_a_matching_that_somebody_else_made_is_taken(class_loss):
    inputs, targets = random_inputs(2, [2, 1])
    predictions = Predictions(*inputs.values())
    criterion = SetCriterion(class_loss=class_loss)
    expected = criterion(predictions, targets)
    matching = criterion.matcher(*predictions, targets)
    criterion.matcher = None
    given = criterion(predictions, targets, matching)
    assert all(torch.equal(given[name], value) for name, value in expected.items())
    # Twice in two groups is once.
    twice = Matching(*(None if x is None else torch.cat([x, x]) for x in matching))
    for name, value in criterion.by_layer(predictions, targets, twice, groups=2).items():
        if name != "loss_ce":  # a prediction's class counts once, however often it is matched
            assert_close(value[1], expected[name], 1e-6)


def test_varifocal_truth_is_the_iou_of_the_box():
    (target,) = random_targets([1], C)
    boxes = target.boxes_cxcywh.clone()
    boxes[:, 2] *= 0.5  # IoU 1/2
    logits = torch.randn(1, 1, 1, C)
    losses = SetCriterion(class_weight=1.0, class_loss=VarifocalLoss())(
        Predictions(logits, boxes[None, None]), [target]
    )
    p = logits[0, 0, 0].sigmoid()
    expected = -0.75 * p**2 * (1 - p).log()
    positive = p[target.labels[0]]
    expected[target.labels[0]] = -0.5 * (0.5 * positive.log() + 0.5 * (1 - positive).log())
    assert_close(losses["loss_ce"], expected.sum(), 1e-5)


def test_weights_of_pairs_are_factors_and_the_truth():
    inputs, targets = random_inputs(1, [2])
    predictions = Predictions(*inputs.values())
    zero, indices = torch.zeros(2, dtype=torch.long), torch.arange(2)
    criterion = SetCriterion(class_loss=VarifocalLoss())
    both = Matching(zero, zero, indices, indices, torch.tensor([3.0, 0.0]))
    one = Matching(zero[:1], zero[:1], indices[:1], indices[:1])
    losses, expected = (criterion.by_layer(predictions, targets, m) for m in (both, one))
    # Divided by 3, the sum of the weights, and by 2 objects.
    for name in ("loss_bbox", "loss_giou"):
        assert_close(losses[name], expected[name] * 2, 1e-6)


def test_losses_of_certain_and_empty_predictions_are_finite():
    inputs, targets = random_inputs(1, [2, 1])
    inputs["logits"].data.sign_().mul_(300)
    inputs["boxes"].data[..., 2:] = 0
    total = sum(SetCriterion()(Predictions(*inputs.values()), targets).values())
    total.backward()
    assert total.isfinite()
    assert inputs["logits"].grad.isfinite().all() and inputs["boxes"].grad.isfinite().all()


def test_half_precision_logits_give_float32_losses():
    inputs, targets = random_inputs(2, [2, 1])
    rounded = leaves({name: x.bfloat16().float() for name, x in inputs.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = SetCriterion()(Predictions(*(x.bfloat16() for x in rounded.values())), targets)
    for name, value in reference_losses(rounded, targets).items():
        assert losses[name].dtype == torch.float32
        assert_close(losses[name], value, 1e-5)


def in_two_processes(function, store, *args):
    """What the function gives in each of two processes that share a group."""

    def run(rank):
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
        queue.put((rank, function(rank, *args)))
        dist.barrier()
        dist.destroy_process_group()

    context = mp.get_context("fork")  # seconds faster; these processes use one thread
    queue = context.Queue()
    processes = [context.Process(target=run, args=(rank,), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    results = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    return [results[rank] for rank in range(2)]


def losses_of_process(rank, num_objects):
    inputs, targets = random_inputs(1, [num_objects[rank]])
    losses = SetCriterion()(Predictions(*inputs.values()), targets)
    return {name: value.item() for name, value in losses.items()}


def test_number_of_objects_is_averaged_over_the_processes(tmp_path):
    num_objects = [4, 0]
    results = in_two_processes(losses_of_process, tmp_path / "store", num_objects)
    for losses, count in zip(results, num_objects, strict=True):
        inputs, targets = random_inputs(1, [count])
        for name, value in reference_losses(inputs, targets).items():
            # The reference divides by this process's own number, at least 1; the mean is 2.
            assert abs(losses[name] - value.item() * max(count, 1) / 2) < 1e-4


class Predictor(torch.nn.Module):
    """Predicts what it is given, plus a parameter."""

    def __init__(self):
        super().__init__()
        self.shift = torch.nn.Parameter(torch.zeros(()))
        self.criterion = SetCriterion()

    def forward(self, batch):
        logits, boxes, targets = batch
        return self.criterion(Predictions(logits + self.shift, boxes + self.shift), targets)


def error_of_process(rank):
    logits, boxes = random_predictions(1, 1, Q, C)
    if rank == 1:
        logits[0, 0, 0, 0] = float("nan")
    model = torch.nn.parallel.DistributedDataParallel(Predictor())
    batches = itertools.repeat((logits, boxes, random_targets([2], C)))
    trainer = Trainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(NonFiniteError) as error:
        trainer.train(0, 1)
    return str(error.value)


def test_training_stops_in_every_process_where_one_predicts_nan(tmp_path):
    for error in in_two_processes(error_of_process, tmp_path / "store"):
        assert "loss became nan" in error
