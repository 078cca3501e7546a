"""Damaged annotation files, images, configs and checkpoints; dev/fuzz.py tries more."""

import json
import logging

import pytest
import torch

import fuzz
from smca.checkpoint.conversion import read_state_dict
from smca.errors import CheckpointError

EXAMPLES = 20  # of each of the five kinds


@pytest.fixture(autouse=True)
def quiet():
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_damaged_input_is_refused_by_name_or_used_for_what_it_says(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path / "cache"))
    assert fuzz.run(kind, tmp_path, EXAMPLES).total() >= EXAMPLES


@pytest.mark.filterwarnings("ignore")
def test_input_without_damage_is_accepted(tmp_path, monkeypatch):
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path / "cache"))
    assert fuzz.check_coco(tmp_path, (json.dumps(fuzz.COCO).encode(), True))
    assert fuzz.check_overrides(tmp_path, [("model.num_queries", "7")])
    assert fuzz.check_config_file(tmp_path, fuzz.small_yaml().encode())
    assert fuzz.check_checkpoint(tmp_path, fuzz.saved(fuzz.checkpoint()))
    assert fuzz.check_image_file(tmp_path, fuzz.image_files()[0])


# ---- What was found: the least damage that did it


def with_entry(data, value, *path):
    """A copy of JSON-like data with another value at a path."""
    data = dict(data) if isinstance(data, dict) else list(data)
    key, *rest = path
    data[key] = with_entry(data[key], value, *rest) if rest else value
    return data


def test_a_category_id_that_is_a_list(tmp_path):
    data = with_entry(fuzz.COCO, [], "categories", 0, "id")
    assert not fuzz.check_coco(tmp_path, (json.dumps(data).encode(), False))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "override",
    [
        ("model.backbone.out_features", "0"),
        ("dataloader", "${model.embed_dim}"),
        ("dataloader.test.dataset", "null"),
        ("model.embed_dim", "${no.key}"),
        ("train.compile", "${no.key}"),
        ("model._target_", "${no.key}"),
        ("model._target_", "no.such.module"),
    ],
    ids=str,
)
def test_an_override_of_the_wrong_type(override, tmp_path):
    later = ("model.backbone", "0")  # which looks for the names that a target takes
    assert not fuzz.check_overrides(tmp_path, [override])
    assert not fuzz.check_overrides(tmp_path, [override, later])


@pytest.mark.parametrize("text", ["", "a", "[1]", "a: [", "model: 1", "\udc80"])
def test_a_config_file_of_another_structure(text, tmp_path):
    assert not fuzz.check_config_file(tmp_path, text.encode(errors="surrogateescape"))


def test_a_flipped_bit_of_a_weight(tmp_path):
    data = bytearray(fuzz.saved(fuzz.checkpoint()))
    weights = fuzz.checkpoint()["model"]["weight"].numpy().tobytes()
    data[data.index(weights)] ^= 1
    assert not fuzz.check_checkpoint(tmp_path, bytes(data))
    with pytest.raises(CheckpointError, match="is damaged"):
        read_state_dict(str(tmp_path / "model.pth"))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({}, ("model",)),
        (None, ("model",)),
        ([], ("model",)),
        (torch.zeros(2, 3), ("model",)),
    ],
)
def test_a_checkpoint_of_another_structure(value, path, tmp_path):
    data = with_entry(fuzz.checkpoint(), value, *path)
    assert not fuzz.check_checkpoint(tmp_path, fuzz.saved(data))


@pytest.mark.parametrize(
    ("value", "path"),
    [
        (torch.zeros(2, 3), ("smca", "config")),
        (5, ("smca", "config")),
        (5, ("smca", "class_names")),
        (["a", 1], ("smca", "class_names")),
        (7, ("smca", "overrides")),
        (7, ("smca",)),
    ],
    ids=str,
)
def test_a_checkpoint_that_says_strange_things_about_itself(value, path, tmp_path):
    data = with_entry(fuzz.checkpoint(), value, *path)
    assert fuzz.check_checkpoint(tmp_path, fuzz.saved(data))
