"""Configs and models by name."""

from pathlib import Path

import pytest
import torch

from smca import model_zoo
from smca.config import load_config
from smca.errors import ConfigError
from smca.solver import step_schedule

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@pytest.mark.parametrize("name", ["smca_r50_50ep", "smca_r50_50ep.py", "ablations/head_shared"])
def test_config_is_found_by_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = CONFIGS / f"{name.removesuffix('.py')}.py"
    assert model_zoo.get_config(name) == load_config(str(path)) == load_config(name)
    assert Path(model_zoo.get_config_file(name)).samefile(path)


def test_all_configs_are_listed():
    files = CONFIGS.rglob("*.py")
    names = {path.relative_to(CONFIGS).with_suffix("").as_posix() for path in files}
    expected = {n for n in names if not n.endswith("__init__") and not n.startswith("common/")}
    assert set(model_zoo.list_configs()) == expected


@pytest.mark.parametrize(
    "name, words",
    [
        ("smca_r50_5ep", "no config smca_r50_5ep, did you mean smca_r50_50ep"),
        ("common/train", "There is no config"),
        ("", "There is no config"),
    ],
)
def test_what_is_no_config_is_named(name, words):
    with pytest.raises(ConfigError, match=words):
        model_zoo.get_config(name)


def test_a_model_is_built_by_name():
    model = model_zoo.get("smca_shapes", device="cpu")
    assert model.training and model.device == torch.device("cpu") and model.num_classes == 3
    with pytest.raises(ConfigError, match="needs values for data.train_json"):
        model_zoo.get("custom_small")


def test_fewer_images_than_a_batch_are_no_schedule():
    with pytest.raises(ValueError, match="num_images=7 are fewer than batch_size=16"):
        step_schedule(epochs=50, drop_epoch=40, batch_size=16, num_images=7)
