"""The weight maps in another project: they need PyTorch alone, and fit Hugging Face's DETR."""

import ast
import importlib
import runpy
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT, assert_close

WEIGHT_MAP = ROOT / "projects" / "SMCA" / "smca" / "modeling" / "weight_map.py"


def test_weight_maps_need_pytorch_alone():
    roots = set()
    for node in ast.walk(ast.parse(WEIGHT_MAP.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch"}


# Hugging Face's DETR


def test_without_transformers_the_example_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit, match="with the extra 'plug_in'"):
        runpy.run_path(str(ROOT / "tools" / "plug_in_example.py"))


@pytest.fixture(scope="module")
def example():
    pytest.importorskip("transformers", reason="needs transformers: pip install -e .[plug_in]")
    return importlib.import_module("plug_in_example")


@pytest.fixture
def models(example):
    """The same DETR without and with weight maps, and a batch of two images, one of them padded."""
    torch.manual_seed(0)
    small = dict(d_model=32, num_queries=7, encoder_ffn_dim=32, decoder_ffn_dim=32)
    plain = example.make_detr(**small).eval()
    model = example.ModulatedDetr(example.make_detr(**small), beta=2.0).eval()
    model.detr.load_state_dict(plain.state_dict())
    batch = example.make_batch(np.random.default_rng(0), 2)
    assert not batch["pixel_mask"].all()
    return plain, model, batch


def test_with_log_weights_of_zero_detr_is_what_it_was(models, monkeypatch):
    plain, model, batch = models
    torch.nn.init.zeros_(model.center[-2].weight)
    torch.nn.init.zeros_(model.center[-2].bias)  # boxes start where they did
    shape = model.predictors[0].shape
    with torch.no_grad():
        expected, modulated = plain(**batch), model(**batch)
        assert not torch.allclose(modulated.logits, expected.logits, atol=1e-3)
        at = shape.log_weights_at
        monkeypatch.setattr(shape, "log_weights_at", lambda self, dx, dy: 0 * at(self, dx, dy))
        output = model(**batch)
    assert_close(output.logits, expected.logits, 1e-5)
    assert_close(output.pred_boxes, expected.pred_boxes, 1e-5)
    assert float(output.loss) == pytest.approx(float(expected.loss), rel=1e-5)


def test_every_parameter_of_the_plugged_in_maps_learns(models):
    _, model, batch = models
    model(**batch).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_a_short_training_prints_the_losses_of_both(example, monkeypatch, capsys):
    batch = example.make_batch(np.random.default_rng(0), 1)
    monkeypatch.setattr(example, "make_batch", lambda rng: batch)
    example.main(["--steps", "2", "--period", "1"])
    lines = [line.strip("|").split("|") for line in capsys.readouterr().out.splitlines()]
    headers, _, first, second = ([cell.strip() for cell in line] for line in lines)
    assert headers[2] == "L1" and headers[5] == "L1, plain"
    assert (first[0], second[0]) == ("1", "2") and first[1:] != second[1:]
    # Both start from the same weights but for the maps, which change what is predicted.
    assert all(float(text) > 0 for text in first) and first[1:4] != first[4:]
