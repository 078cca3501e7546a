"""The check of a GPU, in miniature on the CPU: what it runs, writes, and finds wrong."""

import argparse
import functools

import pytest
import torch

import gpu_check as tool
from smca.errors import UserError

CONFIG = "smca_single_scale_r50_50ep"


@pytest.fixture
def options(tmp_path):
    return argparse.Namespace(
        device="cpu", quick=True, size=(64, 96), models=[CONFIG], output=tmp_path
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_a_sentence(capsys):
    assert tool.main([]) == 2
    assert capsys.readouterr().err == "No GPU can be used here, so there is nothing to check.\n"


def test_an_unknown_model_is_named():
    with pytest.raises(UserError, match="no config smca_r5: the default is smca_single"):
        tool.main(["--device", "cpu", "--models", "smca_r5"])


def test_the_report_has_every_check_and_the_speed_in_both_types(tmp_path, monkeypatch, capsys):
    kinds = []

    def row_of(job, settings):
        kinds.append((job.name, settings.dtype))
        if len(kinds) == 4:
            raise UserError("The process that measures was killed.")
        return [job.name, CONFIG, "1 x 64 x 96", "0.5", "", "", "", ""]

    monkeypatch.setattr(tool, "row_of", row_of)
    # A forked process has imported PyTorch already.
    start = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(tool.multiprocessing, "spawn", start)
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path / "new")]
    assert tool.main(words) == 1
    text = (tmp_path / "new" / "report.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    passed = {row[0]: row[2] for row in rows if len(row) == 4}
    assert [passed[name] for name in tool.CHECKS] == ["yes"] * len(tool.CHECKS)
    assert kinds == [
        (task, dtype) for dtype in ("float32", "bf16") for task in ("inference", "train_step")
    ]
    assert ["bf16", "inference", CONFIG, "1 x 64 x 96", "0.5"] in [row[:5] for row in rows]
    # What fails is a failure in the report.
    assert passed["speed of train_step"] == "NO"
    assert "UserError: The process that measures was killed." in text


# ---- What is wrong is found


def test_differences_are_relative_and_nan_is_infinite():
    large = torch.tensor([300.0, 400.0])
    step = tool.Step({"a": 2.0, "b": 0.5}, {"maps": torch.tensor([3.0, 4.0]), "rest": large})
    other = tool.Step({"a": 2.0, "b": 0.6}, {"maps": torch.tensor([3.0, 4.5]), "rest": large})
    assert tool.differences(other, step) == pytest.approx((0.2, 0.1))
    zero = tool.Step(step.losses, {"maps": torch.zeros(2), "rest": large})
    assert not any(tool.compare(zero, step, dtype)[0] for dtype in tool.TOLERANCES)
    broken = tool.Step({"a": float("nan"), "b": 0.5}, {"maps": large * torch.nan, "rest": large})
    assert tool.differences(broken, step) == (float("inf"), float("inf"))
    assert not tool.compare(broken, step)[0]
    assert tool.compare(step, step)[0]


def test_a_device_that_computes_something_else_fails(options, monkeypatch):
    make_model = tool.make_model
    devices = []

    def wrong_at_first(config, options, device):
        model = make_model(config, options, device)
        if not devices:
            with torch.no_grad():
                model.box_embed[0].weight *= 1.2
        devices.append(device)
        return model

    monkeypatch.setattr(tool, "make_model", wrong_at_first)
    assert tool.check_equality(CONFIG, options)[0] is False


def test_checkpointing_that_draws_other_numbers_fails(options, monkeypatch):
    take_step, seeds = tool.take_step, iter([2, 5, 3])
    monkeypatch.setattr(
        tool, "take_step", lambda model, batch, seed=2: take_step(model, batch, seed=next(seeds))
    )
    assert tool.check_checkpointing(CONFIG, options)[0] is False


def test_an_error_is_a_failure(options, monkeypatch, capsys):
    def fail(config, options):
        raise RuntimeError("CUDA error: something\nand its trace")

    monkeypatch.setattr(tool, "CHECKS", {"it runs": fail})
    monkeypatch.setattr(tool, "measurements", lambda options: iter(()))
    assert tool.run(options) == 1
    assert (
        f"it runs; {CONFIG}; NO; RuntimeError: CUDA error: something\n" in capsys.readouterr().out
    )


def test_float16_finds_a_scale_whose_gradient_is_finite():
    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(1, 1)

        def forward(self, batch):
            # Its gradient leaves float16's range where the loss is scaled by more than 100.
            half = self.linear.weight.half() * 600
            return {"loss": half.sum()}

    step = tool.take_step(Loss(), [], "fp16")
    assert step.gradients["linear"][0] == pytest.approx(600)
