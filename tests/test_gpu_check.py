"""The check of a GPU, in miniature on the CPU: what it runs, writes, and finds wrong."""

import argparse
import functools
import signal
import sys

import pytest
import torch

import gpu_check as tool

CONFIG = "smca_single_scale_r50_50ep"


@pytest.fixture
def options(tmp_path):
    settings = dict(device="cpu", quick=True, size=(72, 96), minutes=60)
    return argparse.Namespace(**settings, models=[CONFIG], output=tmp_path)


def test_the_report_has_every_check(tmp_path, monkeypatch):
    # A forked process has imported PyTorch already.
    start = functools.partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(tool.multiprocessing, "spawn", start)
    monkeypatch.setattr(tool, "check_training", lambda *args: (True, ""))  # takes a minute
    words = ["--device", "cpu", "--quick", "--models", CONFIG, "--output", str(tmp_path / "new")]
    code, text = tool.main(words), (tmp_path / "new" / "report.md").read_text()
    assert code == 0, text
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    passed = {row[0]: row[2] for row in rows if len(row) == 4}
    expected = [*tool.CHECKS, "a training, stopped and resumed"]
    assert {name: passed[name] for name in expected} == dict.fromkeys(expected, "yes")


# ---- What is wrong is found


def test_differences_are_relative_and_of_each_part():
    large = torch.tensor([300.0, 400.0])
    step = {"losses": large, "maps": torch.tensor([3.0, 4.0]), "rest": large}
    other = {**step, "maps": torch.tensor([3.0, 4.5])}
    assert tool.compare(other, step) == (
        False,
        "float32: losses 0.0e+00 (at most 0.0001), gradient 1.0e-01 (at most 0.01)",
    )
    assert tool.compare(other, step, "bf16")[0] and tool.compare(step, step)[0]
    for part, value in (("maps", torch.zeros(2)), ("maps", large * torch.nan)):
        broken = {**step, part: value}
        assert not any(tool.compare(broken, step, dtype)[0] for dtype in tool.TOLERANCES)
    assert not tool.compare({**step, "losses": large * torch.nan}, step)[0]


def test_a_device_that_computes_something_else_fails(options, monkeypatch):
    make_model = tool.make_model
    devices = []

    def wrong_at_first(*args):
        model = make_model(*args)
        if not devices:
            with torch.no_grad():
                model.box_embed[0].weight *= 1.2
        devices.append(args[2])
        return model

    monkeypatch.setattr(tool, "make_model", wrong_at_first)
    assert tool.check_equality(CONFIG, options)[0] is False


def fail(config, options):
    raise RuntimeError("CUDA error: something\nand its trace")


def hang(config, options):
    signal.raise_signal(signal.SIGALRM)


@pytest.mark.parametrize(
    "check, code, line",
    [
        (fail, 1, f"it runs; {CONFIG}; NO; RuntimeError: CUDA error: something\n"),
        (hang, 3, "all checks; ; NO; out of time after 60 minutes\n"),
    ],
)
def test_an_error_and_the_end_of_the_time_are_failures(
    check, code, line, options, monkeypatch, capsys
):
    monkeypatch.setattr(tool, "CHECKS", {"it runs": check})
    monkeypatch.setattr(tool, "check_training", lambda *args: (True, ""))
    with pytest.raises(SystemExit) as ended:
        sys.exit(tool.run(options))
    signal.alarm(0)
    assert ended.value.code == code and line in capsys.readouterr().out


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
    assert step["linear"][0] == pytest.approx(600)
