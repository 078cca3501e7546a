"""What a config says is what the trainer does, the checkpoints hold and the log tells: one small
run from a config file in which no value is the default, and short ones beside it."""

from typing import Dict, List, NamedTuple

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils.events import get_event_storage

from helpers import TinyDetector, arguments, metrics_of, write_dataset, write_tiny_config
from smca.engine import Trainer, main


class Batch(NamedTuple):
    """What a model met in one batch of the training."""

    files: List[str]
    weights: Dict[str, torch.Tensor]
    dtype: torch.dtype  # that convolutions compute in
    losses: Dict[str, float]


class WatchedDetector(TinyDetector):
    """Keeps what it meets in each batch of the training."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.batches = []

    def forward(self, batch):
        if not self.training:
            return super().forward(batch)
        weights = {name: p.detach().clone() for name, p in self.named_parameters()}
        dtypes = []
        watch = self.backbone["stem"].register_forward_hook(
            lambda module, args, output: dtypes.append(output.dtype)
        )
        losses = super().forward(batch)
        watch.remove()
        values = {name: loss.item() for name, loss in losses.items()}
        files = [x["file_name"] for x in batch]
        self.batches.append(Batch(files, weights, dtypes[0], values))
        return losses


class ScriptedEvaluator(DatasetEvaluator):
    """`peak` is highest at iteration 5, AP grows; the others tell what was evaluated."""

    def __init__(self, dataset_name):
        self.dataset_name = dataset_name

    def reset(self):
        self.scores = []

    def process(self, inputs, outputs):
        self.scores += [x["instances"].scores[0].item() for x in outputs]

    def evaluate(self):
        iteration = get_event_storage().iter
        result = {"AP": iteration, "peak": 50 - abs(iteration - 5), "score": np.mean(self.scores)}
        result["images"] = len(self.scores)
        result["images_of_the_evaluator"] = len(DatasetCatalog.get(self.dataset_name))
        return {"bbox": result}


def target(cls):
    return f"{cls.__module__}.{cls.__name__}"


class Run(NamedTuple):
    folder: str
    trainer: Trainer
    results: dict

    @property
    def batches(self):
        return self.trainer.model.batches

    def checkpoint(self, name):
        return torch.load(self.folder / name, weights_only=True)


def drive(folder, *overrides, **changes):
    """Train a `WatchedDetector` in `folder` from a config file, with overrides of the command line
    and changes of the file's ``train``."""
    config = write_tiny_config(folder, **changes)
    overrides = [f"model._target_={target(WatchedDetector)}", *overrides]
    trainers, train = [], Trainer.train

    def watched_train(self, *positions):
        trainers.append(self)
        return train(self, *positions)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train", watched_train)
        results = main(arguments("--config-file", config, *overrides))
    return Run(folder / "run", trainers[0], results)


def averaged(weights, decay):
    """The moving average of a list of weights, which starts with the first."""
    average = weights[0]
    for each in weights[1:]:
        average = {k: decay * average[k] + (1 - decay) * each[k] for k in average}
    return average


def assert_same_weights(actual, expected):
    """The expected ones, which may be some of the actual."""
    assert expected
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-7, msg=name)


LR, CLIP, DECAY, NUM_ITERS, ACCUMULATE = 0.5, 0.01, 0.7, 9, 2


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, which tests only read."""
    folder = tmp_path_factory.mktemp("wiring")
    validation = folder / "validation"
    write_dataset(validation, [1, 1, 1])
    name = f"wiring:{validation}"
    register_coco_instances(name, {}, f"{validation}/truth.json", str(validation))
    torch.manual_seed(123)
    start = folder / "start.pth"
    torch.save({"model": TinyDetector().state_dict()}, start)
    return drive(
        folder,
        "dataloader.train.total_batch_size=2",
        f"dataloader.test.dataset.names={name}",
        f"dataloader.evaluator._target_={target(ScriptedEvaluator)}",
        f"dataloader.evaluator.dataset_name={name}",
        "optimizer._target_=torch.optim.SGD",
        f"optimizer.lr={LR}",
        f"lr_multiplier.milestones=[4,{NUM_ITERS}]",
        init_checkpoint=str(start),
        max_iter=NUM_ITERS,
        seed=7,
        amp=dict(enabled=True, dtype="bf16"),
        accumulate=ACCUMULATE,
        clip_grad_norm=CLIP,
        model_ema=dict(enabled=True, decay=DECAY),
        checkpointer=dict(period=2, max_to_keep=2),
        best_metric="bbox/peak",
        eval_period=3,
        log_period=4,
    )


@pytest.fixture(scope="module")
def weights(run):
    """Before the first iteration, and after each."""
    before = [batch.weights for batch in run.batches[::ACCUMULATE]]
    final = run.checkpoint("model_final.pth")["model"]
    return before + [{name: final[name] for name in before[0]}]


# Training


def test_it_starts_from_the_weights_of_init_checkpoint(run, weights):
    start = torch.load(run.folder.parent / "start.pth", weights_only=True)["model"]
    for name, value in weights[0].items():
        assert torch.equal(value, start[name]), name


def test_an_iteration_takes_accumulate_batches_of_total_batch_size_images(run, weights):
    assert len(run.batches) == NUM_ITERS * ACCUMULATE
    assert all(len(batch.files) == 2 for batch in run.batches)
    for n, batch in enumerate(run.batches):
        assert_same_weights(batch.weights, weights[n // ACCUMULATE])


def test_updates_have_the_length_of_the_clipped_gradient_times_the_scheduled_rate(run, weights):
    lengths = []
    for before, after in zip(weights, weights[1:]):
        change = [(after[name] - before[name]).flatten() for name in before]
        lengths.append(torch.cat(change).norm().item())
    assert min(metrics_of(run.folder, "grad_norm").values()) > 2 * CLIP
    # The rate drops after 4 of 9 iterations.
    expected = [LR * CLIP] * 4 + [0.1 * LR * CLIP] * 5
    assert lengths == pytest.approx(expected, rel=1e-3)


def test_the_average_of_the_weights_has_the_decay_of_the_config(run, weights):
    state = run.checkpoint("model_final.pth")
    assert_same_weights(state["model_ema"], averaged(weights[1:], DECAY))
    state = run.checkpoint("model_0000007.pth")
    assert_same_weights(state["model_ema"], averaged(weights[1:9], DECAY))


# Evaluation


def test_the_test_data_are_evaluated_by_an_evaluator_that_knows_them(run):
    assert run.results["bbox"]["images"] == 3
    assert run.results["bbox"]["images_of_the_evaluator"] == 3


def test_it_is_evaluated_every_eval_period_and_at_the_end(run):
    # The evaluation after the training counts as one iteration later.
    assert run.trainer.storage.history("bbox/AP").values() == [(2, 2), (5, 5), (9, 9)]


# What is written


def test_the_best_checkpoint_is_that_of_the_best_metric(run, weights):
    best = run.checkpoint("model_best.pth")
    assert best["best"] == {"metric": "bbox/peak", "value": 50, "iteration": 5}
    assert_same_weights(best["model"], weights[6])


def test_logged_losses_are_the_means_of_an_iterations_batches(run):
    for name in ("loss_ce", "loss_bbox"):
        values = [batch.losses[name] for batch in run.batches]
        means = np.reshape(values, (NUM_ITERS, ACCUMULATE)).mean(1)
        # A line has the median of the last 20 iterations.
        expected = {n: np.median(means[: n + 1]) for n in (3, 7, 8)}
        assert metrics_of(run.folder, name) == pytest.approx(expected, rel=1e-5)


# Mixed precision


def test_the_model_computes_in_the_type_of_the_config(run, tmp_path):
    half, full = (
        drive(tmp_path / f"{on}", max_iter=1, eval_period=0, amp=dict(enabled=on, dtype="fp16"))
        for on in (True, False)
    )
    for done, dtype in ((run, torch.bfloat16), (half, torch.float16), (full, torch.float32)):
        assert {batch.dtype for batch in done.batches} == {dtype}
        # Only float16 scales the loss.
        scaler = done.checkpoint("model_final.pth")["trainer"]["grad_scaler"]
        assert bool(scaler) == (dtype == torch.float16)
