"""SMCA in two processes does what it does in one: training, resuming and evaluation. To start them
takes seconds, so it is done once, and tests read what they left."""

import json
import shutil
from typing import NamedTuple

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from helpers import arguments, write_dataset, write_smca_config
from smca.engine import Trainer, launch, main

# Objects of the images. Any two have as many as there are processes: the losses are divided by the
# number of objects of a process on average, but at least by 1, and so differ for fewer.
TRAIN_OBJECTS, VAL_OBJECTS = [3, 2, 0, 2], [1, 2, 0, 1, 3]
NUM_ITERS, ACCUMULATE = 4, 2


def dataset(split, folder):
    """An override that registers a data set in each process."""
    register = f"{{_target_: smca.data.register_coco, json_file: {folder}/truth.json, "
    return f"+dataloader.{split}.dataset.names={register}image_root: {folder}}}"


class Case(NamedTuple):
    """A config with its overrides, and folders of runs."""

    folder: str
    command: list

    def arguments(self, output, *overrides, flags=()):
        output = f"train.output_dir={self.folder / output}"
        return arguments(*flags, *self.command, output, *overrides)

    def losses(self, output):
        lines = (self.folder / output / "metrics.json").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row for row in rows if "total_loss" in row]

    def final(self, output):
        return torch.load(self.folder / output / "model_final.pth", weights_only=True)

    def detections(self, output):
        return json.loads((self.folder / output / "coco_instances_results.json").read_text())


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    # Images of one size: padding would differ between one process and two.
    write_dataset(folder / "train", TRAIN_OBJECTS)
    write_dataset(folder / "val", VAL_OBJECTS)
    config = write_smca_config(folder)
    overrides = [
        dataset("train", folder / "train"),
        dataset("test", folder / "val"),
        "model.num_classes=2",
        "model.encoder.pattern=IM",
        "model.dropout=0",
        "dataloader.train.mapper.augmentations.short_sides=[32]",
        "dataloader.train.mapper.augmentations_with_crop=null",
        "dataloader.test.mapper.augmentations.short_sides=32",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        # Adam's first steps have the size of the rate however small a gradient is, so they would
        # enlarge its rounding.
        "optimizer._target_=torch.optim.SGD",
        "optimizer.fused=False",
        "optimizer.lr=0.2",
        "+lr_multiplier._target_=fvcore.common.param_scheduler.LinearParamScheduler",
        "+lr_multiplier.start_value=1.0",
        "+lr_multiplier.end_value=0.5",
        f"train.max_iter={NUM_ITERS}",
        f"train.accumulate={ACCUMULATE}",
        "train.eval_period=0",
        "train.log_period=1",
        "train.checkpointer.period=2",
        "train.model_ema={enabled: true, decay: 0.6}",
    ]
    return Case(folder, ["--config-file", config, *overrides])


@pytest.fixture(scope="module")
def results_of_two(case):
    """
    The same training in two processes, to ``two``. They stay for more: they go on from its middle
    (to ``resumed``), and evaluate its weights (to ``evaluated``).

    Returns:
        list of dict: the results that each process has.
    """

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_START_METHOD", "fork")
        patch.setattr(launch, "main", _work)
        arguments = case.arguments("two", flags=["--num-gpus", 2])
        arguments.case = case
        assert launch.run(arguments) == 0
    return [torch.load(case.folder / f"rank{rank}.pth", weights_only=True) for rank in (0, 1)]


def _work(args):
    """In each process."""
    torch.set_num_threads(1)  # the threads of the process before are gone
    main(args)
    case = args.case
    if comm.is_main_process():
        resumed = case.folder / "resumed"
        resumed.mkdir()
        shutil.copy(case.folder / "two" / "model_0000001.pth", resumed)
        (resumed / "last_checkpoint").write_text("model_0000001.pth")
    comm.synchronize()
    main(case.arguments("resumed", flags=["--resume"]))
    results = main(evaluation_arguments(case, "evaluated"))
    torch.save(results, case.folder / f"rank{comm.get_rank()}.pth")


def evaluation_arguments(case, output):
    weights = f"train.init_checkpoint={case.folder}/two/model_final.pth"
    to_file = f"+dataloader.evaluator.output_dir={case.folder / output}"
    return case.arguments(output, weights, to_file, flags=["--eval-only"])


# Training


def test_two_processes_train_like_one_with_the_whole_batch(results_of_two, case, monkeypatch):
    forward_backward, objects = Trainer._forward_backward, []

    def count(self, data, micro_batch):
        objects.append([len(x["instances"]) for x in data])
        return forward_backward(self, data, micro_batch)

    monkeypatch.setattr(Trainer, "_forward_backward", count)
    main(case.arguments("alone"))
    # Of a batch's two images each process has one, with objects or without.
    assert {(True, False), (False, True), (True, True)} <= {(a > 0, b > 0) for a, b in objects}
    alone, both = case.losses("alone"), case.losses("two")
    assert len(alone) == len(both) == NUM_ITERS
    for expected, actual in zip(alone, both):
        names = [name for name in expected if "loss" in name or name == "grad_norm"]
        assert len(names) == 8
        for name in names:
            assert actual[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-6), name
    alone, both = case.final("alone"), case.final("two")
    assert (alone["trainer"]["world_size"], both["trainer"]["world_size"]) == (1, 2)
    # They have moved a thousand times as far.
    start = torch.load(case.folder / "alone" / "model_0000001.pth", weights_only=True)["model"]
    moved = [(alone["model"][name] - start[name]).abs().max() for name in start]
    assert max(moved) > 1e-3
    for key in ("model", "model_ema"):
        for name, value in alone[key].items():
            actual = both[key][name]
            torch.testing.assert_close(actual, value, atol=1e-6, rtol=1e-5, msg=name)


# Resuming


def test_a_resumed_run_of_two_processes_ends_with_the_bits_of_an_unbroken_one(results_of_two, case):
    unbroken, resumed = case.final("two"), case.final("resumed")
    assert resumed["trainer"]["iteration"] == NUM_ITERS - 1
    assert len(case.losses("resumed")) == NUM_ITERS - 2
    for key in ("model", "model_ema"):
        for name, value in unbroken[key].items():
            assert torch.equal(resumed[key][name], value), name


# Evaluation


def test_two_processes_evaluate_like_one(results_of_two, case):
    results = main(evaluation_arguments(case, "evaluated alone"))
    assert results.keys() == {"bbox", "ema/bbox"} == results_of_two[0].keys()
    assert results_of_two[1] == {}
    for task, metrics in results.items():
        assert results_of_two[0][task] == pytest.approx(metrics, nan_ok=True, abs=1e-3)

    expected, actual = case.detections("evaluated alone"), case.detections("evaluated")
    # Every image once, with as many detections as queries.
    assert [x["image_id"] for x in expected] == [n for n in range(1, 6) for _ in range(6)]
    assert len(actual) == len(expected)
    for wanted in expected:
        assert sum(is_same(wanted, found) for found in actual) == 1


def is_same(a, b):
    """Whether two detections, of files whose order may differ among equal scores, are the same."""
    if (a["image_id"], a["category_id"]) != (b["image_id"], b["category_id"]):
        return False
    return np.allclose([*a["bbox"], a["score"]], [*b["bbox"], b["score"]], atol=1e-4, rtol=0)
