"""tools/publish.py and smca.Predictor.from_pretrained: a folder that can be given away."""

import hashlib
import json
import math

import pytest
import torch
import yaml
from detectron2.config import LazyConfig

import demo
import draw
import publish
from helpers import (
    CLASS_NAMES,
    full_disk,
    make_image,
    make_smca,
    write_image,
    write_smca_config,
    write_weights,
)
from smca import Predictor
from smca.checkpoint import SMCACheckpointer, files
from smca.errors import CheckpointError, ConfigError, UserError

safetensors = pytest.importorskip("safetensors.torch", reason="the extra 'publish' is missing")
hub = pytest.importorskip("huggingface_hub", reason="the extra 'publish' is missing")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """As a training leaves it: config, metrics, and the average of the weights, which was best."""
    folder = tmp_path_factory.mktemp("training")
    config = write_smca_config(folder)
    LazyConfig.save(LazyConfig.load(config), str(folder / "config.yaml"))
    state = make_smca(config).state_dict()
    average = {name: value * 1.01 for name, value in state.items()}
    best = {"metric": "ema/bbox/AP", "value": 31.2, "iteration": 9}
    provenance = {
        "config": "tiny_smca.py",
        "overrides": ["model.num_queries=6", "data.train_json=/home/me/private.json"],
        "class_names": CLASS_NAMES,
        "category_ids": [7, 9, 2],
        "num_classes": 3,
    }
    rows = [
        {"iteration": 4, "bbox/AP": 10.0, "ema/bbox/AP": 20.0},
        {"iteration": 9, "bbox/AP": 11.14, "bbox/AP50": 30.0, "ema/bbox/AP": 31.24},
        {"iteration": 14, "bbox/AP": 12.0, "bbox/APl": math.nan, "ema/bbox/AP": 25.0},
    ]
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, rows)))
    path = folder / "model_best.pth"
    others = dict(model_ema=average, best=best, smca=provenance, trainer={"a": 1})
    torch.save({"model": state, **others}, path)
    return path


def run(checkpoint, output, *args):
    arguments = ["--weights", str(checkpoint), "--output", str(output), "--license", "cc-by-4.0"]
    return publish.run(publish.get_parser().parse_args([*arguments, *args]))


@pytest.fixture(scope="module")
def published(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("published") / "smca"
    run(checkpoint, folder, "--data", "Photographs of mine")
    return folder


@pytest.fixture
def copy(published, tmp_path):
    """A folder of the same, to be changed."""
    for file in published.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_a_published_detector_gives_the_same_detections(checkpoint, published):
    image = make_image(70, 110)
    expected = Predictor(checkpoint)(image, threshold=0)
    predictor = Predictor.from_pretrained(published, device="cpu")
    found = predictor(image, threshold=0)
    assert len(found) == 6 and found.names == expected.names
    assert torch.equal(found.scores, expected.scores)
    assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    assert (predictor.weights, predictor.class_names) == ("ema", CLASS_NAMES)
    assert predictor.category_ids == {0: 7, 1: 9, 2: 2}


def test_a_detector_with_proposed_queries_is_published(tmp_path):
    config = write_smca_config(tmp_path, "smca_plus")
    weights = write_weights(tmp_path, config)
    expected = Predictor(weights, config_file=config)
    publish.save_pretrained(expected, str(tmp_path / "published"))
    found = Predictor.from_pretrained(tmp_path / "published", device="cpu")
    image = make_image(70, 110)
    found, expected = found(image, threshold=0), expected(image, threshold=0)
    assert torch.equal(found.scores, expected.scores)


@pytest.mark.parametrize("kind, key", [("ema", "model_ema"), ("model", "model")])
def test_the_file_holds_the_chosen_weights_and_nothing_else(checkpoint, tmp_path, kind, key):
    run(checkpoint, tmp_path, "--weights-kind", kind)
    saved = safetensors.load_file(tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o444 == 0o444  # for others, too
    expected = torch.load(checkpoint, weights_only=True)[key]
    assert saved.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in saved.items())
    assert {file.name for file in tmp_path.iterdir()} == {
        "model.safetensors",
        "config.yaml",
        "README.md",
    }


def test_the_config_is_plain_yaml_that_the_hub_and_people_can_read(published):
    config = yaml.safe_load((published / "config.yaml").read_text())
    assert config["model"]["_target_"] == "smca.modeling.SMCA"
    assert config["augmentations"]["_target_"] == "smca.data.detr_augmentations"
    assert config["model"]["decoder"]["embed_dim"] == 16  # a reference in the LazyConfig
    assert config["model"]["criterion"] is None
    assert config["class_names"] == CLASS_NAMES
    for private in ("/home/me", str(published.parent), "dataset"):
        assert private not in (published / "config.yaml").read_text()


def test_the_card_says_what_the_detector_is(published):
    text = (published / "README.md").read_text()
    front, card = text.removeprefix("---\n").split("---\n", 1)
    front = yaml.safe_load(front)
    assert front["license"] == "cc-by-4.0" and front["pipeline_tag"] == "object-detection"
    digest = hashlib.sha256((published / "model.safetensors").read_bytes()).hexdigest()
    for words in (
        digest,
        "tiny_smca",
        "3: round, square, long.",
        "Photographs of mine",
        "their moving average (ema)",
        "model.num_queries=6",
        "on smca_shapes_val",
        'Predictor.from_pretrained("smca")  #',
        "| iterations             | 10 ",
    ):
        assert words in card
    assert "/home/me" not in text and str(published.parent) not in text
    # The evaluation of this checkpoint's iteration and of its average.
    table = [line for line in card.splitlines() if line.startswith("| AP") or "31.2" in line]
    assert [cell.strip() for cell in table[0].strip("|").split("|")] == ["AP"]
    assert "31.2" in table[1] and "11.1" not in card


def test_a_training_of_so_many_epochs_is_published(checkpoint, tmp_path):
    # As of configs/fine_tune.py, whose config.yaml says how the iterations are computed.
    cfg = LazyConfig.load(str(checkpoint.with_name("config.yaml")))
    cfg.train.max_iter = {"_target_": "smca.data.num_images", "json_file": "gone.json"}
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))
    (tmp_path / "metrics.json").write_text(checkpoint.with_name("metrics.json").read_text())
    contents = torch.load(checkpoint, weights_only=True)
    del contents["best"]
    contents["smca"]["max_iter"] = 14
    torch.save({**contents, "iteration": 13}, tmp_path / "model_final.pth")
    run(tmp_path / "model_final.pth", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| iterations             | 14 " in card and "12.0" in card
    (tmp_path / "metrics.json").write_text("")
    run(tmp_path / "model_final.pth", tmp_path / "out")
    assert "There is no evaluation beside" in (tmp_path / "out" / "README.md").read_text()


def test_the_demo_takes_a_published_folder(published, tmp_path):
    write_image(tmp_path / "a.png")
    args = ["--input", tmp_path / "a.png", "--output", tmp_path / "out", "--confidence-threshold"]
    for weights in (published, published / "model.safetensors"):
        assert demo.main([str(arg) for arg in [*args, 0, "--weights", weights]]) == 0
        assert len(json.loads((tmp_path / "out" / demo.JSON_NAME).read_text())) == 6


def test_a_folder_takes_no_config_and_has_no_data(published, tmp_path):
    for given, words in (
        (["--config-file", "a.py"], "leave out --config-file, --weights-kind and overrides"),
        (["--weights-kind", "ema"], "leave out --config-file, --weights-kind and overrides"),
        (["model.num_queries=3"], "leave out --config-file, --weights-kind and overrides"),
        ([], "does not say what data it was tested on"),
    ):
        arguments = ["--weights", str(published), "--device", "cpu", *given]
        with pytest.raises(UserError, match=words):
            draw.run(draw.get_parser().parse_args(arguments))


def test_fine_tuning_takes_the_names_of_a_published_folder(published, monkeypatch):
    monkeypatch.setattr(files, "load_tensors", safetensors.load_file)  # of any PyTorch
    model = Predictor.from_pretrained(published).model
    rows = model.class_embed.weight.clone()
    checkpointer = SMCACheckpointer(model, provenance={"class_names": CLASS_NAMES[::-1]})
    checkpointer.load(str(published / "model.safetensors"))
    assert torch.equal(model.class_embed.weight, rows.flip(0))


# The Hub


def test_a_repository_of_the_hub_is_read_at_its_revision(published, monkeypatch):
    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, allow_patterns))
        return str(published)

    monkeypatch.setattr(hub, "snapshot_download", download)
    predictor = Predictor.from_pretrained("me/my-smca", revision="v1", device="cpu")
    assert asked == [("me/my-smca", "v1", ["config.yaml", "model.safetensors"])]
    assert predictor.class_names == CLASS_NAMES


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("no route\nto host")

    monkeypatch.setattr(hub, "snapshot_download", fail)
    with pytest.raises(CheckpointError, match="me/my-smca is no folder, and cannot .*: no route$"):
        Predictor.from_pretrained("me/my-smca")


# Folders of others


class Mark:
    """What a dangerous config would call leaves its mark in the file that it names."""


def rewrite(folder, change):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    change(config)
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize(
    "target",
    [
        "os.mkdir",
        "smca.data.mapper.os.mkdir",
        "detectron2.modeling.backbone.resnet.np.load",
        "smca.modeling.no_such_part",
        ["os", "mkdir"],
    ],
)
@pytest.mark.parametrize("place", ["model", "backbone", "augmentations"])
def test_a_config_that_calls_other_code_is_refused(copy, tmp_path, target, place):
    mark = tmp_path / "mark"
    call = {"_target_": target, "path": str(mark)}

    def plant(config):
        if place == "backbone":
            config["model"]["backbone"] = call
        else:
            config[place] = call

    rewrite(copy, plant)
    with pytest.raises(ConfigError, match="config.yaml calls .*, which is refused: only parts of"):
        Predictor.from_pretrained(copy, device="cpu")
    assert not mark.exists()


@pytest.mark.parametrize("path", ["planted.Map", ["planted.Map"]])
def test_the_path_of_a_weight_map_imports_no_other_module(copy, tmp_path, monkeypatch, path):
    (tmp_path / "planted.py").write_text("open('mark', 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    rewrite(copy, lambda config: config["model"]["decoder"]["modulation"].update(map=path))
    with pytest.raises(ConfigError) as found:
        Predictor.from_pretrained(copy, device="cpu")
    assert f"config.yaml calls {path}, which is refused" in str(found.value)
    assert not (tmp_path / "mark").exists()


def test_a_yaml_file_with_python_objects_is_refused(copy, tmp_path):
    mark = tmp_path / "mark"
    text = f"augmentations: !!python/object/apply:os.mkdir ['{mark}']\n"
    (copy / "config.yaml").write_text(text)
    with pytest.raises(ConfigError, match="config.yaml cannot be read as plain YAML"):
        Predictor.from_pretrained(copy)
    assert not mark.exists()


def test_folders_that_are_no_detectors_are_named(copy, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model_best.pth").touch()
    for folder, words in (
        (tmp_path / "run", "run/model_best.pth."),
        (tmp_path / "empty", "empty is no published detector, config.yaml is not in it"),
        (tmp_path / "gone", "gone does not exist"),
        ("./gone/there", "The folder ./gone/there does not exist"),
    ):
        with pytest.raises(CheckpointError) as error:
            Predictor.from_pretrained(folder)
        assert words in str(error.value)
    (copy / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="model.safetensors cannot be read or does not fit"):
        Predictor.from_pretrained(copy)


def test_a_trainings_config_is_not_overwritten(checkpoint, tmp_path, monkeypatch):
    before = checkpoint.with_name("config.yaml").read_text()
    with pytest.raises(UserError, match="holds other files .*: give a new folder"):
        run(checkpoint, checkpoint.parent)
    assert checkpoint.with_name("config.yaml").read_text() == before
    monkeypatch.setattr(publish, "model_card", full_disk)
    with pytest.raises(UserError, match="README.md cannot be written: No space"):
        run(checkpoint, tmp_path / "out")


def test_a_detector_with_parts_of_ones_own_is_not_published(checkpoint, tmp_path):
    detector = Predictor(checkpoint)
    detector.cfg.model.backbone._target_ = Mark
    with pytest.raises(ConfigError, match="The detector's config calls .*Mark, which is refused"):
        publish.save_pretrained(detector, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
