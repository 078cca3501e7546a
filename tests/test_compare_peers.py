"""The comparison with other detectors: its turns, ratios and rows, and that peers run at all."""

import argparse
import json
import math
import zipfile
from pathlib import Path

import pytest

import compare_peers as tool
import peer_models
from benchmark import in_fresh_process
from helpers import write_smca_config
from peer_models import MODELS, Model
from smca.errors import UserError

SIZES = dict(inference=(64, 96), train_step=(64, 96))


def options_of(**settings):
    defaults = dict(
        official=None, sizes=SIZES, batch_size=2, threads=1, warmup=0, calls=1, cpu_time=False
    )
    defaults.update(device="cpu", dtype="float32", compile=False, overrides=[])
    return argparse.Namespace(**{**defaults, **settings})


def record(model, repeat, seconds, size, task="inference", dtype="float32"):
    what = dict(model=model, task=task, size="1 x 8 x 9", dtype=dtype, repeat=repeat)
    return dict(**what, seconds=seconds, bytes=size * 2**20)


def cells(rows, label):
    return next(row for row in rows if row[0] == MODELS[label].label)


# ---- Turns and ratios


def test_a_ratio_is_the_median_of_the_repeats_ratios():
    # Between the repeats the machine became three times as slow; the ratios are 2, 4 and 3.
    ours = [("single", 0, 1.0, 100), ("single", 1, 3.0, 100), ("single", 2, 9.0, 200)]
    peer = [("official_single", 0, 2.0, 150), ("official_single", 1, 12.0, 150)]
    peer.append(("official_single", 2, 27.0, 150))
    rows = tool.table([record(*r) for r in [*peer, *ours]])
    assert rows[0][1:] == ["inference", "1 x 8 x 9", "float32", "3.00", "100", None, None]
    assert rows[1][1:] == ["inference", "1 x 8 x 9", "float32", "12.00", "150", "3.00", "1.50"]
    assert [row[0] for row in rows] == [MODELS[n].label for n in ("single", "official_single")]


def test_ratios_are_of_one_task_and_type():
    records = [
        record("conv", 0, 1.0, 100),
        record("conv", 0, 5.0, 100, dtype="bf16"),
        record("official_conv", 0, 10.0, 300, dtype="bf16"),
        record("conv", 0, 7.0, 100, task="train_step"),
    ]
    rows = tool.table(records)
    assert [[row[1], row[3]] for row in rows] == [
        ["inference", "float32"],
        ["inference", "bf16"],
        ["inference", "bf16"],
        ["training step", "float32"],
    ]
    assert rows[2][4:] == ["10.00", "300", "2.00", "3.00"]


def test_without_its_counterpart_a_peer_has_no_ratio():
    (row,) = tool.table([record("faster_rcnn", 0, 1.0, 100)])
    assert row[4:] == ["1.00", "100", None, None]


def test_models_take_turns_and_what_is_missing_has_a_row(monkeypatch, tmp_path, capsys):
    turns = []

    def run(function, name, task, dtype, options):
        turns.append(name)
        if name == "hf_detr":
            return {"missing": "transformers is not installed."}
        return {"seconds": 2.0 if name == "official_single" else 1.0, "bytes": 2**20, "others": 0}

    monkeypatch.setattr(tool, "in_fresh_process", run)
    output = tmp_path / "peers.json"
    words = ["--only", "hf_detr", "official_single", "single", "--tasks", "inference"]
    words += ["--dtypes", "bf16", "--repeats", "2", "--official", str(tmp_path)]
    tool.main([*words, "--output", str(output)])
    # In every repeat our model first, whatever the order on the command line.
    assert turns == ["single", "official_single", "hf_detr", "single", "official_single"]
    content = json.loads(output.read_text())
    assert content["columns"] == tool.COLUMNS
    assert str(tmp_path / "peers") in content["command"]
    assert f"--official {tmp_path}" not in content["command"]
    assert cells(content["rows"], "official_single")[4:] == ["2.00", "1", "2.00", "1.00"]
    reason = ["", "", "transformers is not installed.", ""]
    assert cells(content["rows"], "hf_detr")[4:] == reason
    assert "transformers is not installed." in capsys.readouterr().out


def test_a_turn_is_taken_again_while_the_machine_is_busy(monkeypatch):
    busy = iter([1.5, 0.5, 0.1, 0.0])

    def run(*args):
        others = next(busy)
        return {"seconds": others, "bytes": 1, "others": others}

    monkeypatch.setattr(tool, "in_fresh_process", run)
    words = ("single", "inference", "float32")
    found = tool.measure_quietly(*words, options_of(quiet=0.2, tries=3))
    assert found["others"] == 0.1
    busy = iter([1.5, 0.5, 0.9])
    assert tool.measure_quietly(*words, options_of(quiet=0.2, tries=3))["others"] == 0.5
    busy = iter([1.5])
    assert tool.measure_quietly(*words, options_of(quiet=math.inf, tries=3))["others"] == 1.5


def test_a_peer_whose_process_is_killed_has_a_row_that_says_why(monkeypatch):
    def run(*args):
        raise UserError("The process that measures was killed.")

    monkeypatch.setattr(tool, "in_fresh_process", run)
    settings = dict(tasks=["inference"], dtypes=["float32"], only=["hf_detr"], repeats=2)
    records = tool.measure_all(options_of(**settings, quiet=0.2, tries=3, output=None))
    (row,) = tool.table(records)
    assert row[4:] == [None, None, "The process that measures was killed."]


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="needs Linux's /proc")
def test_time_of_this_process_is_not_others(monkeypatch):
    before = tool.others_seconds()
    assert before > 0
    own = tool.time.process_time
    monkeypatch.setattr(tool.time, "process_time", lambda: own() + 1000)
    assert tool.others_seconds() - before == pytest.approx(-1000, abs=100)


def test_time_on_the_cpu_leaves_out_what_others_had(monkeypatch):
    waited = tool.call_times(lambda: tool.time.sleep(0.05), options_of(warmup=1, calls=2))
    on_cpu = tool.call_times(lambda: tool.time.sleep(0.05), options_of(calls=2, cpu_time=True))
    assert len(waited) == len(on_cpu) == 2
    assert min(waited) > 0.045 and max(on_cpu) < 0.04


# ---- Models


def test_every_peer_is_compared_with_one_of_ours():
    names = list(MODELS)
    for name, model in MODELS.items():
        if model.counterpart is not None:
            assert MODELS[model.counterpart].counterpart is None
            assert names.index(model.counterpart) < names.index(name)


@pytest.fixture
def measured(monkeypatch):
    """Measures a model, tiny, in this process."""

    def run(load, task, **settings):
        monkeypatch.setitem(MODELS, "tiny", Model("tiny", load))
        return tool.measure("tiny", task, settings.pop("dtype", "float32"), options_of(**settings))

    return run


@pytest.mark.parametrize("task", peer_models.TASKS)
def test_our_model_is_measured_as_a_peer_is(measured, tmp_path, monkeypatch, task):
    config = write_smca_config(tmp_path)
    monkeypatch.setattr(peer_models, "CONFIGS", tmp_path)
    load = peer_models.ours(config.rpartition("/")[2].removesuffix(".py"))
    found = measured(load, task, dtype="bf16")
    assert found["seconds"] > 0 and "missing" not in found


@pytest.mark.parametrize("task", peer_models.TASKS)
@pytest.mark.parametrize("name", ["Detr", "ConditionalDetr"])
def test_hugging_faces_models_run(measured, name, task):
    pytest.importorskip("transformers")
    load = peer_models.hugging_face(
        name,
        d_model=32,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_queries=7,
        backbone=dict(
            embedding_size=8,
            hidden_sizes=[8, 16],
            depths=[1, 1],
            layer_type="basic",
            out_features=["stage2"],
        ),
    )
    found = measured(load, task)
    assert found["seconds"] > 0 and "missing" not in found


def test_faster_rcnn_runs_without_detectron2s_compiled_part(measured):
    found = measured(peer_models.faster_rcnn, "train_step", batch_size=1)
    assert "missing" not in found and found["seconds"] > 0


def test_what_fails_here_says_so(measured):
    def load(options):
        raise AttributeError("no such function\nand more")

    found = measured(load, "inference")
    assert found == {"missing": "It fails here: AttributeError: no such function"}


# ---- The official code


@pytest.mark.parametrize(
    ("name", "message"),
    [("official_single", "is no checkout"), ("official_conv", "has no multi-scale code")],
)
def test_another_folder_than_the_official_code_is_told(tmp_path, name, message):
    found = tool.measure(name, "inference", "float32", options_of(official=str(tmp_path)))
    assert message in found["missing"]


def test_without_a_checkout_the_row_says_what_to_give(tmp_path):
    found = tool.measure("official_single", "inference", "float32", options_of())
    assert "--official" in found["missing"]
    with pytest.raises(UserError, match="is no folder"):
        tool.main(["--official", str(tmp_path / "none")])


# Modules of the official names with the traits that the tool has to cope with.
STAND_IN = {
    "main.py": """
import argparse
from models import build_model
def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", default="cuda")
    for name in ("num_queries", "enc_layers", "dim_feedforward"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--dynamic_scale")
    return parser
""",
    "util/__init__.py": "",
    "util/misc.py": """
import torch, torchvision
if float(torchvision.__version__[:3]) < 0.7:
    from torchvision.ops import no_longer_there
def nested_tensor_from_tensor_list(images):
    return torch.stack(images)
""",
    "models/__init__.py": """
import torch
import util.misc
from . import backbone, transformer
class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = transformer.layer()
        assert not backbone.is_main_process(), "weights would be downloaded"
    def forward(self, inputs):
        import pdb
        pdb.set_trace()
        images, targets = inputs
        assert len(images) == len(targets) and all("size" in target for target in targets)
        return self.layer(images.flatten(1)[:, :4])
class Criterion:
    weight_dict = {"loss": 2.0}
    def __call__(self, outputs, targets):
        assert all(target["boxes"].max() < 1.5 for target in targets)
        return {"loss": outputs.sum(), "class_error": outputs.sum()}
def build_model(args):
    assert args.device == "cpu" and args.num_queries == 300 and args.enc_layers == 6
    return Detector(), Criterion(), {"bbox": lambda outputs, sizes: outputs}
""",
    "models/backbone.py": "def is_main_process():\n    return True\n",
    "models/transformer.py": "raise RuntimeError('the other variant')\n",
    "models/transformer_44_dot_4.py": "import torch\nlayer = lambda: torch.nn.Linear(4, 2)\n",
}


def test_official_code_runs_as_it_is(tmp_path):
    with zipfile.ZipFile(tmp_path / "Multi_scale.zip", "w") as archive:
        for name, text in STAND_IN.items():
            archive.writestr(f"folder/{name}", text)
    before = sorted(path.name for path in tmp_path.rglob("*"))
    arguments = ("official_conv", "train_step", "float32", options_of(official=str(tmp_path)))
    found = in_fresh_process(tool.measure, *arguments)
    assert "missing" not in found, found
    assert found["seconds"] > 0
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
