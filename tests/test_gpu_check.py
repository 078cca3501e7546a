"""The check of a GPU, in miniature on the CPU: what it runs, writes, and finds wrong."""

import argparse
import json

import pytest
import torch

import gpu_check as tool
from smca.errors import UserError

CONFIG = "smca_single_scale_r50_50ep"
TASKS = ("inference", "train_step")


@pytest.fixture
def options():
    return argparse.Namespace(device="cpu", quick=True, size=(64, 96))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert tool.main([]) == 2
    assert capsys.readouterr().err == "No GPU can be used here, so there is nothing to check.\n"


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="no config smca_r5: the default is smca_single"):
        tool.main(["--device", "cpu", "--models", "smca_r5"])


def test_the_report_has_every_check_and_the_speed_in_both_types(tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "in_fresh_process", lambda f, *args, **kwargs: f(*args, **kwargs))
    monkeypatch.setattr("benchmark.matmul_gflops", lambda options: 100.0)
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path)]
    assert tool.main(words) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert [check["check"] for check in content["checks"]] == list(tool.CHECKS)
    assert all(check["passed"] for check in content["checks"])
    columns = content["columns"]
    kinds = [(row[0], row[columns.index("type")]) for row in content["rows"]]
    assert kinds == [(task, dtype) for dtype in ("float32", "bf16") for task in TASKS]
    speeds = [float(row[columns.index("images a second")]) for row in content["rows"]]
    seconds = [record["median_s"] for record in content["records"]]
    assert speeds == pytest.approx([n / s for n, s in zip([1, 2, 1, 2], seconds)], rel=0.1)
    text = (tmp_path / "report.md").read_text()
    assert "benchmarks/gpu_check.py --device cpu" in text and "two processes | " in text


def test_when_time_is_up_nothing_new_begins(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(tool, "SECONDS", -1.0)
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path)]
    assert tool.main(words) == 0
    content = json.loads((tmp_path / "report.json").read_text())
    assert all(check["figures"] == "not run: out of time" for check in content["checks"])
    assert content["rows"] == []


# ---- What is wrong is found


def test_differences_are_relative_and_nan_is_infinite():
    step = tool.Step({"a": 2.0, "b": 0.5}, torch.tensor([3.0, 4.0]))
    other = tool.Step({"a": 2.0, "b": 0.6}, torch.tensor([3.0, 4.5]))
    assert tool.differences(other, step) == pytest.approx((0.2, 0.1))
    broken = tool.Step({"a": float("nan"), "b": 0.5}, torch.tensor([3.0, float("nan")]))
    assert tool.differences(broken, step) == (float("inf"), float("inf"))
    assert not tool.compare(broken, step)[0]
    assert tool.compare(step, step)[0]


def test_a_device_that_computes_something_else_fails(options, monkeypatch):
    make_model = tool.make_model
    devices = []

    def wrong_at_first(config, options, device, *overrides):
        model = make_model(config, options, device, *overrides)
        if not devices:
            with torch.no_grad():
                model.box_embed[0].weight *= 1.2
        devices.append(device)
        return model

    monkeypatch.setattr(tool, "make_model", wrong_at_first)
    assert tool.check_equality(CONFIG, options)[0] is False
    devices.clear()
    monkeypatch.setattr(tool, "make_model", make_model)
    assert tool.check_equality(CONFIG, options)[0] is True


def test_checkpointing_that_draws_other_numbers_fails(options, monkeypatch):
    take_step, seeds = tool.take_step, iter([2, 5, 3])

    def with_another_seed(model, batch, seed=2):
        return take_step(model, batch, seed=next(seeds))

    monkeypatch.setattr(tool, "take_step", with_another_seed)
    assert tool.check_checkpointing(CONFIG, options)[0] is False


def test_an_error_is_a_failure(options, monkeypatch, tmp_path):
    def fail(config, options):
        raise RuntimeError("CUDA error: something\nand its trace")

    monkeypatch.setattr(tool, "CHECKS", {"it runs": fail})
    options.models, options.deadline = [CONFIG], float("inf")
    (outcome,) = tool.run_checks(options)
    assert (outcome.passed, outcome.figures) == (False, "RuntimeError: CUDA error: something")
    monkeypatch.setattr(tool, "measurements", lambda options: iter(()))
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path)]
    assert tool.main(words) == 1


def test_a_timing_that_fails_is_a_failure_in_the_report(monkeypatch, tmp_path):
    def fail(*args):
        raise UserError("The process that measures was killed.")

    monkeypatch.setattr(tool, "CHECKS", {})
    monkeypatch.setattr(tool, "cost_of", lambda job, settings: 1)
    monkeypatch.setattr(tool, "in_fresh_process", fail)
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path)]
    assert tool.main(words) == 1
    content = json.loads((tmp_path / "report.json").read_text())
    assert [check["check"] for check in content["checks"]] == [
        f"speed of {task}, {dtype}" for dtype in ("float32", "bf16") for task in TASKS
    ]
    assert content["checks"][0]["figures"] == "UserError: The process that measures was killed."
    assert content["records"] == []


def test_float16_finds_a_scale_whose_gradient_is_finite(options):
    model = torch.nn.Linear(1, 1)

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = model

        def forward(self, batch):
            # Its gradient leaves float16's range where the loss is scaled by more than 100.
            half = self.linear.weight.half() * 600
            return {"loss": half.sum()}

    step = tool.take_step(Loss(), [], "fp16")
    assert step.gradient[0] == pytest.approx(600)
