"""The benchmarks of models and their parts, of exported models and of other detectors, on tiny
configs. No test says how fast anything is."""

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import compare_export
import compare_peers
import measuring
from analyze_model import analyze, analyze_training
from helpers import assert_same_gradients, leaves, write_smca_config
from smca.config import load_config
from smca.errors import ConfigError, UserError

SIZE = (64, 96)


@pytest.fixture
def in_this_process(monkeypatch):
    for module in (benchmark, compare_peers):
        monkeypatch.setattr(module, "in_fresh_process", lambda function, *args: function(*args))


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


# ---- Models and their parts


@pytest.mark.usefixtures("in_this_process")
@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("name", ["inference", "train_step"])
def test_each_measurement_gives_a_row(tmp_path, monkeypatch, capsys, name, dtype):
    monkeypatch.setattr(benchmark, "matrix_product_rate", lambda options: 100.0)
    words = [name, "--config", write_smca_config(tmp_path), "--dtype", dtype, "--seconds", "0"]
    words += ["--image-size", "64", "96", "--train-size", "64", "96", "--format", "markdown"]
    benchmark.main(words)
    headers, _, row = map(cells_of, capsys.readouterr().out.splitlines()[-3:])
    assert headers == benchmark.COLUMNS
    found = dict(zip(headers, row))
    assert found["measurement"].startswith(name) and float(found["s"]) > 0
    assert found["GFLOP/s"] and found["share"].endswith("%")
    assert int(found["peak MiB"]) > int(found["extra MiB"]) >= 0


def test_both_co_attentions_compute_the_same():
    torch.manual_seed(0)
    sizes = dict(query=(2, 8, 5, 32), key=(2, 8, 24, 32), value=(2, 8, 24, 32))
    inputs = {name: torch.randn(size) for name, size in sizes.items()}
    inputs.update(centers=6 * torch.rand(2, 8, 5, 2), spreads=2 * torch.rand(2, 8, 5, 2))
    inputs = leaves(inputs)
    slow = benchmark.reference_attention(*inputs.values(), (4, 6))
    fast = benchmark.co_attention(*inputs.values(), (4, 6))
    assert torch.allclose(slow, fast, atol=1e-5)
    assert_same_gradients(fast, slow, inputs)


def test_work_of_a_training_step_is_that_of_forward_and_backward(tmp_path):
    overrides = ["model.dropout=0.0", "model.backbone.width=64"]
    cfg = load_config(write_smca_config(tmp_path), overrides)
    operations = 2 * 2 * analyze_training(cfg, *SIZE)
    model = instantiate(cfg.model).train()
    batch = measuring.random_batch(2, SIZE, num_classes=3)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        sum(model(batch).values()).backward()
    # Norms count here, and the first layers' gradients of their inputs, which nobody needs.
    assert counter.get_total_flops() < operations < 1.1 * counter.get_total_flops()
    cfg.model.backbone.freeze_at = 5  # frozen stages have no backward pass
    assert analyze(cfg, *SIZE)[2] < analyze_training(cfg, *SIZE) < operations / 4


def test_what_cannot_be_measured_is_said_before_anything_runs(capsys):
    with pytest.raises(ConfigError, match="model.num_querys"):
        benchmark.main(["inference", "model.num_querys=5"])
    with pytest.raises(UserError, match="No measurement training: choose among co_attention, "):
        benchmark.main(["training"])


# ---- Exported models


def test_differences_are_of_the_nearest_detection_of_the_same_class_and_score():
    wanted = Instances((500, 250))
    wanted.pred_boxes = Boxes(torch.tensor([[0.0, 0, 10, 10], [5, 5, 9, 9], [0, 0, 5, 5]]))
    wanted.scores = torch.tensor([0.9, 0.9, 0.1])
    wanted.pred_classes = torch.tensor([1, 1, 0])
    # The first two have changed places, the last is another one of the same score.
    boxes = torch.tensor([[5, 5, 9, 9.25], [0, 0, 10, 10], [90, 90, 99, 99]])
    scores = torch.tensor([0.9, 0.9, 0.100001])
    box, score = compare_export.differences(wanted, boxes, scores, torch.tensor([1, 1, 2]))
    assert (box, score) == (pytest.approx(0.5), pytest.approx(1e-6, rel=0.1))
    box, _ = compare_export.differences(wanted, boxes, scores, torch.tensor([1, 0, 2]))
    assert box > 1e5  # a detection is missing


# ---- Other detectors


def test_models_take_turns_and_what_is_missing_has_a_row(monkeypatch, tmp_path, capsys):
    turns = []

    def run(function, name, task, options):
        turns.append(name)
        if name == "faster_rcnn":
            raise UserError("The process that measures was killed.")
        return {"seconds": 2.0 if name == "official_single" else 1.0, "bytes": 2**20}

    monkeypatch.setattr(compare_peers, "in_fresh_process", run)
    words = ["--only", "faster_rcnn", "official_single", "single", "--tasks", "inference"]
    words += ["--dtypes", "bf16", "--repeats", "2", "--official", str(tmp_path)]
    compare_peers.main([*words, "--format", "markdown"])
    # Our model is first in every turn, whatever the order on the command line.
    first = ["single", "official_single", "faster_rcnn"]
    assert turns == [*first, "single", "official_single"]
    rows = [cells_of(line) for line in capsys.readouterr().out.splitlines()[-3:]]
    assert [row[4:] for row in rows] == [
        ["1.00", "1", "", ""],
        ["2.00", "1", "2.00", "1.00"],
        ["", "", "The process that measures was killed.", ""],
    ]
