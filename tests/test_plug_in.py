"""The weight maps in another project: they need PyTorch alone, and fit Hugging Face's DETR."""

import ast
import importlib.util
import json
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch

from helpers import ROOT, assert_close

WEIGHT_MAP = ROOT / "projects" / "SMCA" / "smca" / "modeling" / "weight_map.py"


def test_weight_maps_need_pytorch_alone(tmp_path):
    # A copy, in a folder without the package, in a Python that finds no other module of it.
    (tmp_path / "maps.py").write_text(WEIGHT_MAP.read_text())
    roots = set()
    for node in ast.walk(ast.parse(WEIGHT_MAP.read_text())):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            roots.add(node.module.split(".")[0])
    assert roots - set(sys.stdlib_module_names) == {"torch"}
    code = (
        "import sys, torch, types, maps\n"
        "predictor = maps.WeightMapPredictor(embed_dim=8, num_heads=2)\n"
        "grid = types.SimpleNamespace(size=(3, 4), stride=32)\n"
        "(m,) = predictor(torch.rand(1, 5, 8), torch.rand(1, 5, 2), [grid])\n"
        "assert m.log_weights().shape == (1, 2, 5, 3, 4)\n"
        "assert not {'detectron2', 'smca'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, check=True)


# Hugging Face's DETR


@pytest.fixture(scope="module")
def tools():
    pytest.importorskip("transformers", reason="needs transformers: pip install -e .[plug_in]")
    folder = str(ROOT / "tools")
    sys.path.insert(0, folder)
    try:
        loaded = []
        for name in ("plug_in_example", "train_plug_in"):
            spec = importlib.util.spec_from_file_location(name, f"{folder}/{name}.py")
            loaded.append(importlib.util.module_from_spec(spec))
            spec.loader.exec_module(loaded[-1])
    finally:
        sys.path.remove(folder)
    return loaded


def make_models(tools):
    """The same DETR without and with weight maps, and a batch of two images, one of them padded."""
    example, training = tools
    torch.manual_seed(0)
    small = dict(d_model=32, num_queries=7, encoder_ffn_dim=32, decoder_ffn_dim=32)
    plain = training.make_detr(**small).eval()
    model = example.ModulatedDetr(training.make_detr(**small), beta=2.0).eval()
    model.detr.load_state_dict(plain.state_dict())
    batch = training.make_batch(np.random.default_rng(0), 2)
    assert not batch["pixel_mask"].all()
    return plain, model, batch


def test_with_log_weights_of_zero_detr_is_what_it_was(tools, monkeypatch):
    plain, model, batch = make_models(tools)
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


def test_every_parameter_of_the_plugged_in_maps_learns(tools):
    _, model, batch = make_models(tools)
    model(**batch).loss.backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    assert not missing


def test_what_padding_holds_does_not_reach_the_cross_attention(tools):
    _, model, batch = make_models(tools)
    masks = []
    layer = model.detr.model.decoder.layers[0].encoder_attn
    layer.register_forward_hook(
        lambda _, args, kwargs, output: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    model(**batch)
    padded = batch["pixel_mask"][:, ::8, ::8].flatten(1) == 0
    assert padded.any() and (masks[0].isinf().any(1).any(1) == padded).all()


def test_a_short_training_writes_the_losses_of_both(tools, monkeypatch, tmp_path, capsys):
    _, training = tools
    batch = training.make_batch(np.random.default_rng(0), 1)
    monkeypatch.setattr(training, "make_batch", lambda rng: batch)
    file = tmp_path / "losses.json"
    words = ["--steps", "2", "--period", "1", "--output", str(file)]
    monkeypatch.setattr(sys, "argv", ["train_plug_in.py", *words])
    training.main()
    content = json.loads(file.read_text())
    assert content["command"] == shlex.join(["python", "tools/train_plug_in.py", *words])
    assert content["columns"][2] == "L1" and content["columns"][5] == "L1, plain"
    first, second = content["rows"]
    assert (first[0], second[0]) == ("1", "2") and first[1:] != second[1:]
    # Both start from the same weights but for the maps, which change what is predicted.
    assert all(float(text) > 0 for text in first) and first[1:4] != first[4:]
    assert f"| {' | '.join(first)} |" in capsys.readouterr().out
