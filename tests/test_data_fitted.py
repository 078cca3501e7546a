"""Settings that follow from the training data."""

import copy

import numpy as np
import pytest
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode
from omegaconf import OmegaConf

from smca.checkpoint import provenance_of
from smca.config import fit_to_data, load_config, use_classes
from smca.data import (
    fit_crop_range,
    fit_in_features,
    fit_max_size,
    fit_num_extra_scales,
    fit_num_iterations,
    fit_num_queries,
    fit_scales_to_read,
    fit_short_sides,
)


def register(*images, crowds=0):
    """Register images of 640 x 480 pixels, each a list of its objects' (width, height)."""
    name = f"fitted_{len(DatasetCatalog)}"
    crowd = dict(bbox=[0, 0, 9, 9], bbox_mode=BoxMode.XYWH_ABS, category_id=0, iscrowd=1)
    records = []
    for objects in images:
        boxes = [[1, 1, 1 + w, 1 + h] for w, h in objects]
        items = [dict(bbox=box, bbox_mode=BoxMode.XYXY_ABS, category_id=0) for box in boxes]
        annotations = [*items, *[crowd] * crowds]
        records.append(dict(width=640, height=480, annotations=annotations))
    DatasetCatalog.register(name, lambda: records)
    return name


@pytest.mark.parametrize("objects, queries", [(0, 40), (26, 40), (27, 50), (100, 150), (999, 300)])
def test_queries_are_half_as_many_again_as_the_objects_of_an_image(objects, queries):
    name = register([(20, 20)] * objects, [(20, 20)] * 2, crowds=50)
    assert fit_num_queries(name) == queries
    assert fit_num_queries([register([(20, 20)]), name]) == queries


@pytest.mark.parametrize(
    "length, side",
    # 3 cells of stride 4 are 12 pixels: an object of 30 of 480 pixels has them at a side of 192.
    [(480, 160), (36, 160), (30, 192), (20, 288), (2, 320)],
)
def test_images_are_as_large_as_small_objects_need(length, side):
    name = register([(2 * length, length / 2)] * 5)
    assert fit_short_sides(name, 4) == [side] and fit_max_size(name, 4) == round(1.6 * side)
    assert fit_short_sides(name, 4, [0.9, 1.1]) == [round(0.9 * side), round(1.1 * side)]


def test_one_object_in_ten_may_be_smaller():
    sizes = np.full((100, 2), 36.0)
    sizes[:9] = 3
    assert fit_short_sides(register(sizes.tolist()), 4) == [160]
    sizes[:11] = 3
    assert fit_short_sides(register(sizes.tolist()), 4) == [320]
    assert fit_short_sides(register([]), 4) == [160]


def test_the_finest_scale_follows_from_small_objects():
    # 32 of 160 pixels are 96 of 480.
    small, large = register([(95, 95)] * 2 + [(400, 400)] * 8), register([(97, 97)])
    fine, coarse = fit_in_features(small), fit_in_features(large)
    assert fine == ["res2", "res3", "res4"] and coarse == ["res3", "res4"]
    assert [fit_num_extra_scales(x) for x in (fine, coarse)] == [0, 1]
    assert [fit_scales_to_read(x) for x in (fine, coarse)] == [[1, 2], None]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize(
    "features, extra, read", [("res3,res4", 1, None), ("res2,res3,res4", 0, [1, 2])]
)
def test_scales_follow_from_features_that_are_set(small, features, extra, read):
    cfg = _custom_small(f"model.in_features=[{features}]")
    cfg.dataloader.train.dataset.names = register([(20, 20)] if small else [(300, 300)])
    fit_to_data(cfg)
    assert (cfg.model.num_extra_scales, cfg.model.decoder.read) == (extra, read)


def test_crops_do_not_cut_large_objects():
    assert fit_crop_range(register([(140, 140)]), 4, (0.6, 1.0)) == [96, 160]
    assert fit_crop_range(register([(20, 20)] + [(150, 150)] * 2), 4, (0.6, 1.0)) is None


def test_data_are_gone_through_once(monkeypatch):
    name = register([(20, 20)])
    read, calls = DatasetCatalog[name], []
    monkeypatch.setitem(DatasetCatalog.data, name, lambda: calls.append(name) or read())
    assert fit_num_queries(name) == 40 and fit_short_sides([name], 4) == [288]
    assert fit_num_iterations(name, 8) == 1000 and calls == [name]


@pytest.mark.parametrize("images, iterations", [(3, 1000), (400, 1500), (9000, 5000)])
def test_iterations_are_thirty_epochs(images, iterations):
    name = register(*[[]] * images)
    assert fit_num_iterations(name, 8) == iterations
    assert fit_num_iterations(name, 8, share=0.1) == iterations // 10
    assert fit_num_iterations(name, 0) >= iterations  # the loader refuses it


def test_a_training_puts_values_in_the_config_and_a_checkpoint_brings_them_back(caplog):
    cfg = OmegaConf.create(
        {
            "data": {"names": register([(30, 30)] * 40)},
            "model": {"num_queries": L(fit_num_queries)(names="${data.names}"), "num_classes": 3},
            "mapper": {"sides": L(fit_short_sides)(names="${data.names}", stride=4)},
            "train": {"max_iter": 7},
        },
        flags={"allow_objects": True},
    )
    anew = copy.deepcopy(cfg)
    with caplog.at_level("INFO"):
        fitted = fit_to_data(cfg)
    assert fitted == {"model.num_queries": 60, "mapper.sides": [192]}
    assert (cfg.model.num_queries, cfg.mapper.sides, cfg.train.max_iter) == (60, [192], 7)
    assert "model.num_queries=60 follows from the training data." in caplog.text
    assert fit_to_data(cfg) == {}

    anew.data.names = "gone"
    use_classes(anew, provenance_of({"smca": {"fitted": fitted}, "model": {}}))
    assert (anew.model.num_queries, anew.mapper.sides) == (60, [192])


def _custom_small(*overrides):
    paths = [f"data.{split}_{kind}=." for split in ("train", "val") for kind in ("json", "images")]
    return load_config("custom_small", [*paths, *overrides])


def test_custom_small_may_evaluate_at_the_end_alone():
    assert _custom_small("train.eval_period=0").train.checkpointer.period.share == 0.1


def test_what_follows_from_the_data_can_be_set():
    sides = "dataloader.train.mapper.augmentations.short_sides"
    cfg = _custom_small(f"{sides}=[160,192]", "model.num_queries=70")
    assert (OmegaConf.select(cfg, sides), cfg.model.num_queries) == ([160, 192], 70)
