"""Trained weights on other data: what of them is kept, and the config that trains on with them."""

import json
import logging

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

import smca
from helpers import (
    ROOT,
    TinyDetector,
    arguments,
    error_of,
    make_image,
    make_smca,
    write_dataset,
    write_smca_config,
    write_tiny_config,
    write_weights,
)
from smca import model_zoo
from smca.checkpoint import SMCACheckpointer
from smca.cli import train
from smca.config import load_config
from smca.data import num_images
from smca.engine import main
from smca.errors import ConfigError, UserError
from smca.inference import load_test_dataset
from smca.solver import layer_lr_factor, steps_of_epochs

FINE_TUNE = str(ROOT / "configs" / "fine_tune.py")
MISSING = "model.num_queries='???'"


def save(path, state, class_names=None):
    torch.save({"model": state, "smca": {"class_names": class_names}}, path)
    return str(path)


def load(model, path, class_names=()):
    SMCACheckpointer(model, provenance={"class_names": list(class_names)}).load(path)


# What is kept


def test_a_class_keeps_the_row_of_its_name_and_a_new_one_its_own(tmp_path, caplog):
    old, new = TinyDetector(num_classes=3), TinyDetector(num_classes=4)
    initial = new.class_embed.weight.detach().clone()
    path = save(tmp_path / "old.pth", old.state_dict(), ["person", "dog", "cat"])
    with caplog.at_level(logging.INFO, "smca"):
        load(new, path, ["cat", "tree", "person", "house"])
    for layer in ("weight", "bias"):
        rows, before = getattr(new.class_embed, layer), getattr(old.class_embed, layer)
        assert torch.equal(rows[0], before[2]) and torch.equal(rows[2], before[0])
    assert torch.equal(new.class_embed.weight[[1, 3]], initial[[1, 3]])
    for name in ("bbox_embed.weight", "backbone.stem.weight"):
        assert torch.equal(new.state_dict()[name], old.state_dict()[name])
    (line,) = [r.getMessage() for r in caplog.records if "start anew" in r.getMessage()]
    assert line == (
        f"All weights of {path} are kept, but 2 of 4 classes start anew (tree, house); "
        "1 of 3 old classes are left out."
    )


@pytest.mark.parametrize(
    "names, rows",
    [
        ((["a", "b"], ["c", "d"]), None),
        ((["b", "a"], ["a", "b"]), [1, 0]),
        # Without names on both sides, as many classes are the same ones.
        ((None, ["a", "b"]), [0, 1]),
        ((None, ["a", "b", "c"]), None),
    ],
)
def test_classes_go_by_their_names(tmp_path, names, rows):
    old, new = TinyDetector(), TinyDetector(num_classes=len(names[1]) or 2)
    initial = new.class_embed.weight.detach().clone()
    state = {f"module.{key}": value for key, value in old.state_dict().items()}  # as DDP's
    load(new, save(tmp_path / "old.pth", state, names[0]), names[1])
    expected = initial if rows is None else old.class_embed.weight[rows]
    assert torch.equal(new.class_embed.weight, expected)
    assert torch.equal(new.bbox_embed.weight, old.bbox_embed.weight)


@pytest.mark.parametrize("count", [4, 9])
def test_the_first_queries_are_kept(tmp_path, caplog, count):
    config = write_smca_config(tmp_path)
    old = make_smca(config)
    model = LazyConfig.load(config).model
    new = instantiate({**model, "num_queries": count})
    initial = new.query_embed.weight.detach().clone()
    with caplog.at_level(logging.INFO, "smca"):
        load(new, save(tmp_path / "old.pth", old.state_dict()))
    kept = min(count, 6)
    assert torch.equal(new.query_embed.weight[:kept], old.query_embed.weight[:kept])
    assert torch.equal(new.query_embed.weight[kept:], initial[kept:])
    words = {4: "2 of 6 old queries are left out", 9: "3 of 9 queries start anew"}
    assert words[count] in caplog.text


# The config


@pytest.fixture
def own(tmp_path):
    """Overrides for 8 images, and a trained tiny model of another config."""
    write_dataset(tmp_path)
    base = write_smca_config(tmp_path)
    weights = write_weights(tmp_path, base, smca={"class_names": ["square", "dog", "cat"]})
    data = [f"data.{split}_json={tmp_path}/truth.json" for split in ("train", "val")]
    data += [f"data.{split}_images={tmp_path}" for split in ("train", "val")]
    quick = ["train.device=cpu", f"train.output_dir={tmp_path}/run"]
    quick += ["dataloader.train.num_workers=0", "dataloader.test.num_workers=0"]
    quick += ["dataloader.train.mapper.augmentations.short_sides=[32]"]
    quick += ["dataloader.train.mapper.augmentations_with_crop=null"]
    quick += ["dataloader.train.total_batch_size=4"]
    return [f"train.init_checkpoint={weights}", *data, *quick, f"base.config={base}"]


def test_fine_tuning_trains_the_weights_of_its_base_for_epochs_and_its_file_is_enough(
    tmp_path, own
):
    words = ["--config-file", FINE_TUNE, *own, "train.max_epochs=2", "train.eval_epochs=1"]
    results = main(arguments(*words, "train.early_stopping=0"))
    assert "AP" in results["bbox"]
    checkpoint = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert checkpoint["iteration"] == 3  # the fourth: 8 images in batches of 4, twice
    assert (tmp_path / "run" / "model_0000001.pth").is_file()
    assert checkpoint["model"]["class_embed.weight"].shape == (2, 16)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "1 of 2 classes start anew (round); 2 of 3 old classes are left out" in log

    weights = tmp_path / "run" / "model_final.pth"
    expected = smca.Predictor(weights)
    image = make_image()
    (tmp_path / "run" / "config.yaml").unlink()
    (tmp_path / "truth.json").unlink()  # nor does it need the data
    found = smca.Predictor(weights)
    assert found.class_names == expected.class_names == ["round", "square"]
    found, expected = found(image, threshold=0), expected(image, threshold=0)
    assert len(found) > 0 and torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
    # The config of the base is gone as well: nothing else knows the model.
    (tmp_path / "tiny_smca.py").unlink()
    with pytest.raises(UserError, match="The config file .*tiny_smca.py does not exist"):
        smca.Predictor(weights)


def test_a_detector_does_not_need_what_only_training_needs(own):
    weights, base = (own[n].partition("=")[2] for n in (0, -1))
    overrides = [f"base.config={base}", "train.device=cpu"]
    predictor = smca.Predictor(weights, config_file=FINE_TUNE, overrides=overrides)
    assert predictor.class_names == ["square", "dog", "cat"]
    assert len(predictor(make_image(), threshold=0)) == 6
    with pytest.raises(ConfigError) as error:
        load_test_dataset(predictor.cfg)
    assert str(error.value).startswith("The config needs values for data.")
    assert all(f" data.{key}=..." in str(error.value) for key in ("val_json", "val_images"))
    assert "init_checkpoint" not in str(error.value)
    with pytest.raises(ConfigError, match="needs values for model.num_queries: add model.num_que"):
        smca.Predictor(weights, config_file=FINE_TUNE, overrides=[*overrides, MISSING])


def test_a_base_gives_its_model_and_image_sizes_but_not_its_classes(own):
    cfg = load_config(FINE_TUNE, ["model.num_queries=7", *own, "base.config=smca_shapes"])
    demo = model_zoo.get_config("smca_shapes")
    assert cfg.model.num_queries == 7 and cfg.model.embed_dim == 128
    assert instantiate(cfg.model.num_classes) == 2
    assert cfg.dataloader.test.mapper == demo.dataloader.test.mapper
    assert cfg.optimizer.lr == 5e-5


def test_an_unknown_base_and_absent_weights_are_named(own, capsys):
    text = error_of(capsys, train.main, "--config-file", FINE_TUNE, *own, "base.config=smca_shape")
    assert "no config smca_shape, did you mean smca_shapes?" in text
    text = error_of(capsys, train.main, "--config-file", FINE_TUNE, *own[1:])
    assert "train.init_checkpoint=..." in text


def test_steps_of_epochs_count_images_of_all_files(tmp_path, monkeypatch):
    for name, count in (("a", 30), ("b", 11)):
        data = {"images": [{}] * count, "annotations": [], "categories": []}
        (tmp_path / f"{name}.json").write_text(json.dumps(data))
    monkeypatch.setenv("HOME", str(tmp_path))
    images = num_images(["~/a.json", str(tmp_path / "b.json")])
    assert images == 41 and num_images("~/a.json") == 30
    assert steps_of_epochs(4, images, 8) == 20  # of 20.5
    assert steps_of_epochs(4, images, 8, accumulate=2) == 10
    assert steps_of_epochs(0.01, images, 8) == 1


def test_the_longest_beginning_in_whole_words_decides_the_rate():
    factor = layer_lr_factor({"encoder": 0.5, "encoder.layers.1": 0.25, "class_embed.bias": 3.0})
    assert factor("encoder.layers.0.ffn.linear1.weight") == 0.5
    assert factor("encoder.layers.1.norm1.bias") == 0.25
    assert factor("encoder.layers.10.norm1.bias") == 0.5
    assert factor("class_embed.bias") == 3.0 and factor("class_embed.weight") == 1.0
    assert factor("encoders.weight") == 1.0


# Early stopping


def test_a_run_stops_early_and_resuming_leaves_it_at_that(tmp_path):
    settings = {"max_iter": 8, "eval_period": 1, "early_stopping": 1}
    config = write_tiny_config(tmp_path, **settings)
    overrides = ["optimizer.lr=0", "train.model_ema.enabled=False"]
    main(arguments("--config-file", config, *overrides))
    assert "The training ends early: bbox/AP" in (tmp_path / "run" / "log.txt").read_text()
    final = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert final["iteration"] == 1
    main(arguments("--resume", "--config-file", config, *overrides))
    again = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert again["iteration"] == 1
