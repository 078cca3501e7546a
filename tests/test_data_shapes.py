import json
import multiprocessing
import os
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from helpers import full_disk
from smca.data import DatasetError, draw_scene, register_shapes, shapes
from smca.data.cache import create_once, name_for
from smca.data.shapes import write_shapes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes") / "set"
    write_shapes(folder, num_train=24, num_val=12, seed=1)
    return folder


@pytest.fixture
def registered(tmp_path, monkeypatch):
    """Names of a small set that is registered but not made yet."""
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path))
    return register_shapes(num_train=3, num_val=2, seed=5, prefix="tiny_shapes")


def _contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# The pictures


def test_the_pictures_are_those_of_the_version():
    assert shapes._VERSION == 6  # other pictures are another version of the data set
    scene = draw_scene(np.random.default_rng(0))
    height, width = scene.image.shape[:2]
    assert (height, width, scene.classes) == (156, 149, [0, 1, 2, 2, 1])
    areas = [mask.sum() for mask in scene.masks]
    assert areas == pytest.approx([1227, 812, 726, 255, 942], rel=0.02, abs=2)
    halves = np.split(scene.image.astype(float), [height // 2])
    quarters = [q.mean() for half in halves for q in np.split(half, [width // 2], axis=1)]
    assert quarters == pytest.approx([107.0, 109.3, 158.7, 128.1], abs=1)
    deviations = [scene.image.std(), *(scene.image[mask].std() for mask in scene.masks)]
    assert deviations == pytest.approx([58.07, 79.1, 68.1, 24.2, 75.0, 60.0], abs=1)


def test_boxes_are_tight_around_the_drawn_masks(folder):
    coco = json.loads((folder / "val.json").read_text())
    for i, image in enumerate(coco["images"]):
        scene = draw_scene(np.random.default_rng((1, 1, i)))
        annotations = [a for a in coco["annotations"] if a["image_id"] == image["id"]]
        assert len(annotations) == len(scene.masks)
        for annotation, mask in zip(annotations, scene.masks, strict=True):
            x, y, width, height = annotation["bbox"]
            inside = mask[y : y + height, x : x + width]
            assert inside.sum() == mask.sum() == annotation["area"]
            edges = (inside[0], inside[-1], inside[:, 0], inside[:, -1])
            assert all(edge.any() for edge in edges)


# The files


def test_the_first_images_do_not_depend_on_how_many_follow(folder, tmp_path):
    write_shapes(tmp_path / "short", num_train=2, num_val=1, seed=1)
    short, long = _contents(tmp_path / "short"), _contents(folder)
    pictures = [path for path in short if path.suffix == ".jpg"]
    assert len(pictures) == 3 and all(short[path] == long[path] for path in pictures)


# Registration


def test_files_are_made_on_first_use_and_kept(registered, tmp_path):
    assert not list(tmp_path.iterdir())
    records = DatasetCatalog.get("tiny_shapes_train")
    assert len(records) == 3 and len(DatasetCatalog.get("tiny_shapes_val")) == 2
    Image.open(records[0]["file_name"]).verify()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}
    DatasetCatalog.get("tiny_shapes_train")
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.jpg")}


def test_other_parameters_use_another_folder(registered):
    names = register_shapes(num_train=3, num_val=2, seed=6, prefix="other_shapes")
    names += register_shapes(3, 2, seed=5, prefix="small_shapes", lengths=(12, 50))
    names += register_shapes(3, 2, seed=5, prefix="large_shapes", lengths=(50, 120))
    folders = {MetadataCatalog.get(name).json_file for name in (registered[0], *names[::2])}
    assert len(folders) == 4


# The cache


def _create_and_log(args):
    path, log = args

    def write(partial):
        with open(log, "a") as file:
            file.write("written\n")
        partial.mkdir()
        (partial / "file").write_text("content")

    create_once(path, write)
    return (path / "file").read_text()


def test_concurrent_processes_create_a_folder_once(tmp_path):
    log = tmp_path / "log"
    with multiprocessing.get_context("fork").Pool(4) as pool:
        results = pool.map(_create_and_log, [(tmp_path / "folder", log)] * 8)
    assert results == ["content"] * 8
    assert log.read_text() == "written\n"


def _die_halfway(partial):
    partial.mkdir()
    (partial / "half").touch()
    os._exit(1)


def test_a_killed_run_leaves_no_half_data_set(tmp_path):
    path = tmp_path / "folder"
    process = multiprocessing.get_context("fork").Process(
        target=create_once, args=(path, _die_halfway)
    )
    process.start()
    process.join()
    assert process.exitcode == 1 and not path.exists()
    create_once(path, lambda partial: partial.mkdir())
    assert path.is_dir() and not list(path.iterdir())


def test_a_cache_that_cannot_be_written_is_an_error_that_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(DatasetError, match="SMCA_CACHE"):
        create_once(tmp_path / "file" / "set", lambda partial: partial.mkdir())
    with pytest.raises(DatasetError, match="cannot be written to .*No space.*SMCA_CACHE"):
        create_once(tmp_path / "set", full_disk)
    monkeypatch.setattr(Path, "exists", mock.Mock(side_effect=PermissionError("of another user")))
    with pytest.raises(DatasetError, match="cannot be written to .of another user"):
        create_once(tmp_path / "set", full_disk)


def test_a_name_is_no_longer_than_file_systems_take():
    first, second = (name_for(f"/x/{'é' * 300}.json", state) for state in (1, 2))
    assert first != second and len(os.fsencode(first)) < 200
