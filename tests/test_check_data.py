"""Looking at a data set before training: problems, statistics, remarks, pictures, settings."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.utils.env import seed_all_rng
from omegaconf import OmegaConf
from PIL import Image

from helpers import ODD_NAMES, ROOT, error_of, full_disk, write_coco, write_smca_config
from smca.analysis import draw_instances
from smca.analysis.dataset import draw_training_images, examine, find_remarks, statistics_of
from smca.cli import check_data as tool
from smca.data import DetrDatasetMapper, detr_augmentations
from smca.errors import UserError


def annotation(id, image_id, category_id, bbox, **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write_data(folder, *annotations, num_images=3, seed=0):
    """Images 1, 2, ... of 80 x 60 pixels of noise, categories 5 (dog) and 9 (cat): the paths."""
    folder.mkdir(exist_ok=True)
    paths, image_ids = (folder / "data.json", folder / "images"), range(1, num_images + 1)
    write_coco(*paths, annotations, {9: "cat", 5: "dog"}, image_ids, (60, 80), seed)
    return tuple(map(str, paths))


GOOD = [
    annotation(1, 1, 5, [0, 0, 20, 20]),
    annotation(2, 1, 9, [10, 10, 40, 10]),
    annotation(3, 2, 9, [0, 0, 10, 40]),
    annotation(4, 2, 5, [0, 0, 80, 60], iscrowd=1),
]
BAD = [
    annotation(5, 1, 5, [0, 0, 0, 20]),
    annotation(6, 2, 5, [0, 0, 20, -1]),
    annotation(7, 2, 5, [70, 0, 40, 20]),
    annotation(8, 2, 77, [0, 0, 10, 10]),
    annotation(9, 99, 5, [0, 0, 10, 10]),
]


def break_an_image(image_root):
    """Cut image 3 off in the middle."""
    path = Path(image_root, "3.png")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


# Problems


def test_all_problems_are_found_and_the_rest_is_usable(tmp_path):
    json_file, image_root = write_data(tmp_path, *GOOD, *BAD)
    break_an_image(image_root)
    split = examine(json_file, image_root)
    assert tool.count_kinds(split) == {
        "annotation: bbox is not 4 finite numbers, of which the width and height are above 0": 2,
        "annotation: bbox is not inside its image": 1,
        "annotation: category_id is not the id of a category": 1,
        "annotation: image_id is not the id of an image": 1,
        "image: file unreadable or of another size": 1,
    }
    assert split.class_names == ["dog", "cat"]
    assert [item["image_id"] for item in split.dataset_dicts] == [1, 2]
    boxes = [[a["bbox"] for a in item["annotations"]] for item in split.dataset_dicts]
    assert boxes == [[a["bbox"] for a in GOOD[:2]], [a["bbox"] for a in GOOD[2:]]]
    assert [a["category_id"] for a in split.dataset_dicts[0]["annotations"]] == [0, 1]


def test_other_categories_than_the_training_sets_are_a_problem(tmp_path):
    first, image_root = write_data(tmp_path / "a", *GOOD)
    other, _ = write_data(tmp_path / "b", *GOOD)
    text = Path(other).read_text()
    assert not examine(other, image_root, categories_from=first).problems
    Path(other).write_text(text.replace('"name": "cat"', '"name": "cow"'))
    (problem,) = examine(other, image_root, categories_from=first).problems
    assert problem.kind == "categories differ"
    assert f"{other} and {first} must have the same categories" in problem.message


# Statistics


def test_statistics_counted_by_hand(tmp_path):
    statistics = statistics_of(examine(*write_data(tmp_path, *GOOD)))
    assert (statistics["images"], statistics["objects"]) == (3, 3)  # without the crowd
    assert statistics["objects_of_classes"] == {"dog": 1, "cat": 2}
    assert statistics["most_objects_in_an_image"] == 2
    percentiles = statistics["percentiles_5_25_50_75_95"]
    assert percentiles["objects_per_image"] == [0.1, 0.5, 1, 1.5, 1.9]
    assert percentiles["object_size"] == [20] * 5 and percentiles["image_width"] == [80] * 5
    assert percentiles["object_width_by_height"][2] == 1


def test_remarks_name_what_may_not_be_meant(tmp_path):
    repeated = [annotation(10 + i, 1, 9, [3, 3, 5, 5]) for i in range(2)]
    few = [annotation(20 + i, 1, 5, [0, 0, 9, i]) for i in range(1, 20)]
    train = examine(*write_data(tmp_path / "a", *few, *repeated))
    val = examine(*write_data(tmp_path / "b", GOOD[1], num_images=1, seed=1))
    Image.open(tmp_path / "a" / "images" / "2.png").save(tmp_path / "b" / "images" / "1.png")
    remarks = "\n".join(find_remarks({"train": train, "val": val}))
    assert "train: 2 images without objects." in remarks
    assert "train: few objects of the classes 'dog' (19), 'cat' (2)." in remarks
    repeats = "train: 1 object annotated more than once with the same box, such as [3, 3, 5, 5]"
    assert repeats in remarks
    assert "val: few objects of the classes 'dog' (0)." in remarks
    paths = (tmp_path / path for path in ("a/images/2.png", "b/images/1.png"))
    same = "train and val: 1 picture in two places, such as {} and {}."
    assert same.format(*paths) in remarks
    train = examine(*write_data(tmp_path / "d", *(annotation(i, 1, 9, [0, 0, i % 79 + 1, 9])
                                                  for i in range(301))))  # fmt: skip
    remarks = find_remarks({"train": train, "val": train}, 1)
    assert "train: 301 objects in one image: set model.num_queries to more" in str(remarks)
    assert "val: 1 image with more than 100 objects: AP takes no more detections" in str(remarks)
    assert f"train and val: 3 pictures in two places, such as {tmp_path}/d/images/1.png." in remarks
    assert "'dog'" not in str(find_remarks({"train": examine(*write_data(
        tmp_path / "c", *few, annotation(40, 1, 5, [0, 0, 9, 20])))}))  # fmt: skip


def test_images_of_more_than_8_bits_are_remarked(tmp_path):
    split = examine(*write_data(tmp_path, *GOOD))
    for item, bits in zip(split.dataset_dicts[:2], (12, 16)):
        levels = np.full((item["height"], item["width"]), 2**bits - 1, dtype=np.uint16)
        Image.fromarray(levels).save(item["file_name"])
    (remark,) = [line for line in find_remarks({"train": split}) if "8 bits" in line]
    assert remark.startswith("train: 2 images of more than 8 bits, read by the bits")


# Pictures and command line


def test_training_images_are_what_the_mapper_gives(tmp_path):
    split = examine(*write_data(tmp_path, *GOOD))
    mapper = DetrDatasetMapper(True, detr_augmentations([40, 50, 60], 200))
    figure = draw_training_images(mapper, split, 5, seed=3)
    shown = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    seed_all_rng(3)
    for item, picture in zip(split.dataset_dicts, shown):
        mapped = mapper(item)
        image = np.ascontiguousarray(mapped["image"].numpy().transpose(1, 2, 0))
        assert (picture == draw_instances(image, mapped["instances"], ["dog", "cat"])).all()
    assert len(shown) == 2  # the third has no objects


def run_tool(*arguments):
    args = tool.get_parser().parse_intermixed_args([str(argument) for argument in arguments])
    return tool.run(args)


def test_the_command_counts_problems_and_writes_its_files(tmp_path, capsys):
    json_file, image_root = write_data(tmp_path, *GOOD, *BAD, *(
        annotation(20 + i, 1, 5, [0, 0, 0, i]) for i in range(4)))  # fmt: skip
    os.rename(f"{image_root}/1.png", f"{image_root}/$1$_{{.png")
    text = Path(json_file).read_text().replace('"cat"', json.dumps(ODD_NAMES[0]))
    Path(json_file).write_text(text.replace('"1.png"', '"$1$_{.png"'))
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command, "--num-examples", 2) == 1
    out = capsys.readouterr().out
    assert "9 problems" in out and "6 x annotation: bbox is not 4 finite numbers" in out
    assert "annotation 5 (of image 1) has bbox [0, 0, 0, 20]" in out and "..." in out
    assert "annotation 20 " not in out  # the third example
    assert "  model.num_queries=40\n" in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.json", "training_images.jpg"}
    check = json.loads((tmp_path / "out" / "check.json").read_text(), parse_constant=pytest.fail)
    train = check["splits"]["train"]
    assert train["problems"]["annotation: image_id is not the id of an image"] == 1
    assert train["statistics"]["objects"] == 3
    Image.open(tmp_path / "out" / "training_images.jpg").load()


def test_a_good_data_set_has_the_exit_code_0(tmp_path, capsys, monkeypatch):
    json_file, image_root = write_data(tmp_path / "my photos ü ${x}", *GOOD)
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    break_an_image(image_root)
    assert run_tool(*command, "--no-decode") == 0
    assert "of 2 classes; 0 problems" in capsys.readouterr().out
    assert not (tmp_path / "out" / "training_images.jpg").exists()
    monkeypatch.setattr(Path, "write_text", full_disk)
    assert "out cannot be written: No space" in error_of(capsys, tool.main, *command)


def test_data_without_objects_are_a_problem_of_a_training_and_else_a_remark(tmp_path, capsys):
    json_file, image_root = write_data(tmp_path)
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]
    check = json.loads((tmp_path / "out" / "check.json").read_text())
    assert f"train: {json_file} has no objects: there is nothing" in "".join(check["remarks"])
    val = write_data(tmp_path / "val", *GOOD)
    keys = ("train_json", "train_images", "val_json", "val_images")
    overrides = [f"data.{key}={path}" for key, path in zip(keys, (json_file, image_root, *val))]
    assert run_tool("--config-file", "custom_small", *command[4:], *overrides) == 1
    assert f"{json_file} has no objects: add" in capsys.readouterr().out


def test_all_files_of_a_config_are_checked_and_training_takes_its_settings_from_them(tmp_path):
    crowded = [annotation(i, 1, 5, [0, 0, 9, i / 2]) for i in range(1, 91)]
    first, second = write_data(tmp_path / "a", *GOOD), write_data(tmp_path / "b", *crowded)
    val = write_data(tmp_path / "c", *BAD, seed=1)
    overrides = [
        f"data.train_json=[{first[0]},{second[0]}]",
        f"data.train_images=[{first[1]},{second[1]}]",
        f"data.val_json={val[0]}",
        f"data.val_images={val[1]}",
    ]
    config, out = ROOT / "configs" / "custom_small.py", tmp_path / "out"
    run_tool("--config-file", config, "--output", out, "--no-decode", *overrides)
    check = json.loads((out / "check.json").read_text())
    assert list(check["splits"]) == ["train 1", "train 2", "val"]
    assert not check["splits"]["train 2"]["problems"]
    assert sum(check["splits"]["val"]["problems"].values()) == 5
    assert check["settings"]["model.num_queries"] == 140
    assert "train: few objects of the classes 'cat' (2)." in check["remarks"]
    assert not [remark for remark in check["remarks"] if "'dog'" in remark and "train" in remark]


@pytest.mark.usefixtures("few_shapes")
def test_registered_data_sets_can_be_checked(tmp_path):
    out = tmp_path / "out"
    assert run_tool("--config-file", "smca_shapes", "--output", out, "--no-decode") == 0
    splits = json.loads((out / "check.json").read_text())["splits"]
    numbers = {name: each["statistics"]["images"] for name, each in splits.items()}
    assert numbers == {"train": 1, "val": 2}


def test_options_and_data_that_cannot_be_checked_are_refused(tmp_path):
    cfg = OmegaConf.from_dotlist(["dataloader.train.dataset.names._target_=my.register"])
    with pytest.raises(UserError, match="train.dataset.names calls my.register, whose data have"):
        tool.annotation_files(cfg, ["train"])
    with pytest.raises(UserError, match="--json together with --images"):
        run_tool("--json", "a.json")
    with pytest.raises(UserError, match="--json together with --images"):
        run_tool("--json", "a.json", "--images", "b", "--config-file", write_smca_config(tmp_path))
