"""Configs by name and trained weights."""

import functools
import hashlib
import json
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from smca import model_zoo
from smca.config import load_config
from smca.errors import CheckpointError, ConfigError
from smca.solver import step_schedule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAME = "smca_single_scale_r50_50ep"
# Config, url and sha256 of trained weights, as in the release that holds them. None are yet.
PUBLISHED = {}


@pytest.mark.parametrize("name", ["smca_r50_50ep", "smca_r50_50ep.py", "ablations/head_shared"])
def test_config_is_found_by_name(name):
    path = CONFIGS / f"{name.removesuffix('.py')}.py"
    config = model_zoo.get_config(name)
    assert config == load_config(str(path))
    assert Path(model_zoo.get_config_file(name)).samefile(path)


def test_all_configs_are_listed():
    files = CONFIGS.rglob("*.py")
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files}
    expected = {n for n in names if not n.endswith("__init__") and not n.startswith("common/")}
    assert set(model_zoo.list_configs()) == expected
    assert {NAME, "smca_r50_50ep", "smca_conv_r50_50ep", "detr_r50_50ep"} <= expected


@pytest.mark.parametrize(
    "name, nearest", [("smca_r50_5ep", "smca_r50_50ep"), ("SMCA/smca_r50_108ep", "smca_r50_108ep")]
)
def test_unknown_name_is_an_error_with_the_nearest(name, nearest):
    with pytest.raises(ConfigError, match=f"no config {name}, did you mean {nearest}"):
        model_zoo.get_config(name)


@pytest.mark.parametrize("name", ["", "common/train", "../setup", "/etc/passwd", "zzz"])
def test_what_is_no_config_is_not_found(name):
    with pytest.raises(ConfigError, match="There is no config"):
        model_zoo.get_config(name)


@pytest.fixture
def small_config(monkeypatch):
    """Makes the named config a small model."""
    load = model_zoo.get_config

    def get_config(name, trained=False):
        overrides = ["model.embed_dim=16", "model.num_queries=4", "model.backbone.depth=18"]
        overrides += ["+model.backbone.width=16"]
        overrides += ["model.encoder.pattern=I", "model.decoder.num_layers=1"]
        return LazyConfig.apply_overrides(load(name, trained), overrides)

    monkeypatch.setattr(model_zoo, "get_config", get_config)
    return get_config


def test_model_without_weights_is_random(small_config):
    model = model_zoo.get(NAME, device="cpu")
    assert model.device == torch.device("cpu") and model.training
    expected = instantiate(small_config(NAME).model)
    assert {k: v.shape for k, v in model.state_dict().items()} == {
        k: v.shape for k, v in expected.state_dict().items()
    }


def test_asking_for_weights_that_do_not_exist_says_which_do(tmp_path, monkeypatch):
    registry = tmp_path / "model_zoo.json"
    monkeypatch.setattr(model_zoo, "_REGISTRY", registry)
    registry.write_text("{}")
    for ask in (
        lambda: model_zoo.get_checkpoint_url(NAME),
        lambda: model_zoo.get(NAME, trained=True),
        lambda: model_zoo.get_config(NAME, trained=True),
    ):
        with pytest.raises(CheckpointError, match=f"No trained weights of {NAME}.*none are yet"):
            ask()
    registry.write_text(json.dumps({"smca_r50_50ep": {"url": "x", "sha256": "y"}}))
    with pytest.raises(CheckpointError, match="there are of smca_r50_50ep"):
        model_zoo.get_checkpoint_url(NAME)


def test_fewer_images_than_a_batch_are_no_schedule():
    with pytest.raises(ValueError, match="num_images=7 are fewer than batch_size=16"):
        step_schedule(epochs=50, drop_epoch=40, batch_size=16, num_images=7)


@pytest.fixture
def published(small_config, tmp_path, monkeypatch):
    """Weights in the registry, as a local file; and the model that they are of."""
    model = instantiate(small_config(NAME).model)
    path = tmp_path / "weights.pth"
    torch.save({"model": model.state_dict()}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    registry = tmp_path / "model_zoo.json"
    registry.write_text(json.dumps({NAME: {"url": str(path), "sha256": digest}}))
    monkeypatch.setattr(model_zoo, "_REGISTRY", registry)
    return path, model


def test_trained_weights_are_loaded(published):
    path, expected = published
    assert model_zoo.get_checkpoint_url(NAME) == model_zoo.get_checkpoint_url(NAME + ".py")
    assert model_zoo.get_config(NAME, trained=True).train.init_checkpoint == str(path)
    model = model_zoo.get(NAME, trained=True, device="cpu")
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_changed_file_is_refused(published):
    path, _ = published
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="is not the file that was published.*sha256"):
        model_zoo.get(NAME, trained=True, device="cpu")


def test_file_that_cannot_be_downloaded_is_an_error(published):
    path, _ = published
    path.unlink()
    with pytest.raises(CheckpointError, match="cannot be downloaded"):
        model_zoo.get(NAME, trained=True, device="cpu")


def test_weights_are_downloaded_once(published, tmp_path, monkeypatch):
    path, expected = published
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    entry = json.loads(model_zoo._REGISTRY.read_text())[NAME]
    entry["url"] = f"http://localhost:{server.server_port}/{path.name}"
    model_zoo._REGISTRY.write_text(json.dumps({NAME: entry}))
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "localhost")
    model_zoo.get(NAME, trained=True, device="cpu")
    server.shutdown()
    server.server_close()
    model = model_zoo.get(NAME, trained=True, device="cpu")
    for name, value in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name


def test_registry_holds_what_is_published_and_nothing_else():
    registry = json.loads((Path(model_zoo.__file__).parent / "model_zoo.json").read_text())
    assert registry == PUBLISHED
