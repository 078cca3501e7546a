"""YOLO and Pascal VOC folders, made here, read through their configs."""

import json
import os
from pathlib import Path

import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

import check_data
import evaluate
from helpers import ROOT
from smca.config import load_config
from smca.data import DatasetError, class_names, coco_from_voc, coco_from_yolo, yolo_images
from smca.engine import main
from test_train_net import SMALL, arguments

pytest.importorskip("supervision", reason="the extra 'convert' is not installed")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path / "cache"))


def write_images(folder, *names):
    folder.mkdir(parents=True)
    for name in names:
        Image.new("RGB", (80, 60)).save(folder / name)


def write_yolo(folder, names="{0: dog, 1: cat}", yaml_images="images"):
    """Images a.png (a cat and a dog) and b.jpg (none) to train, c.png (a dog) to validate."""
    write_images(folder / "images" / "train", "b.jpg", "a.png")
    write_images(folder / "images" / "val", "c.png")
    for split, labels in (("train", {"a": "1 0.5 0.5 0.25 0.5\n\n0 0.1 0.2 0.1 0.1\n"}),
                          ("val", {"c": "0 0.5 0.5 1 1"})):  # fmt: skip
        (folder / "labels" / split).mkdir(parents=True)
        for name, text in labels.items():
            (folder / "labels" / split / f"{name}.txt").write_text(text)
    path = folder / "data.yaml"
    lines = [f"{split}: {yaml_images}/{split}" for split in ("train", "val")]
    path.write_text("\n".join([*lines, f"names: {names}"]))
    return path


def write_voc(folder, **objects):
    """An image of 80 x 60 pixels for each name, with objects (class, xmin, ymin, xmax, ymax)."""
    write_images(folder, *(f"{name}.jpg" for name in objects))
    for name, boxes in objects.items():
        text = f"<filename>{name}.jpg</filename>"
        text += "<size><width>80</width><height>60</height><depth>3</depth></size>"
        for label, *corners in boxes:
            tags = zip(("xmin", "ymin", "xmax", "ymax"), corners)
            box = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
            text += f"<object><name>{label}</name><bndbox>{box}</bndbox></object>"
        (folder / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
    return folder


def registered(config, *overrides):
    """Class names, and of each image of both splits its name and its objects as class and XYXY."""
    cfg = load_config(str(ROOT / "configs" / config), list(overrides))
    splits = {}
    for split in ("train", "test"):
        # One name, for an evaluator takes no list.
        name = instantiate(cfg.dataloader[split].dataset.names)
        classes = MetadataCatalog.get(name).thing_classes
        splits[split] = {}
        for item in DatasetCatalog.get(name):
            objects = [
                (
                    classes[a["category_id"]],
                    BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS),
                )
                for a in item["annotations"]
            ]
            assert Path(item["file_name"]).is_file()
            splits[split][Path(item["file_name"]).name] = objects
    assert instantiate(cfg.model.num_classes) == len(classes)
    return classes, splits["train"], splits["test"]


def close(*box):
    return pytest.approx(box, abs=1e-4)


def test_a_yolo_folder_is_read_by_its_config_with_names(tmp_path):
    path = write_yolo(tmp_path / "data")
    classes, train, val = registered("custom_yolo.py", f"data.yaml={path}")
    assert classes == ["dog", "cat"]
    # 80 x 60 pixels: center (40, 30), size (20, 30); center (8, 12), size (8, 6).
    assert train == {
        "a.png": [("cat", close(30, 15, 50, 45)), ("dog", close(4, 9, 12, 15))],
        "b.jpg": [],
    }
    assert val == {"c.png": [("dog", close(0, 0, 80, 60))]}
    assert list(train) == sorted(train)  # on every file system


@pytest.mark.parametrize("names", ["[dog, cat]", "{1: cat, 0: dog}", "{'1': cat, '0': dog}"])
def test_yolo_names_are_a_list_or_numbered(tmp_path, names):
    path = coco_from_yolo(write_yolo(tmp_path / "data", names), "train")
    assert class_names(path) == ["dog", "cat"]


def test_a_yolo_path_one_folder_too_high_is_understood(tmp_path):
    path = write_yolo(tmp_path / "data", yaml_images="../images")
    assert yolo_images(path, "val") == str(tmp_path / "data" / "images" / "val")


@pytest.mark.parametrize(
    "images, labels",
    [
        ("images/images_train", "labels/images_train"),
        ("images/images/b", "images/labels/b"),
        ("a/images", "a/labels"),
    ],
)
def test_yolo_labels_are_beside_the_last_folder_named_images(tmp_path, images, labels):
    write_images(tmp_path / images, "a.png")
    (tmp_path / labels).mkdir(parents=True)
    (tmp_path / labels / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    path = tmp_path / "data.yaml"
    path.write_text(f"train: {images}\nnames: [dog]")
    assert len(json.loads(Path(coco_from_yolo(path, "train")).read_text())["annotations"]) == 1


def test_yolo_labels_may_be_beside_their_images(tmp_path):
    write_images(tmp_path / "images", "a.png")
    (tmp_path / "images" / "a.txt").write_text("0 0.5 0.5 0.25 0.5")
    path = tmp_path / "data.yaml"
    path.write_text("train: images\nnames: [dog]")
    assert len(json.loads(Path(coco_from_yolo(path, "train")).read_text())["annotations"]) == 1


def test_a_yolo_path_is_relative_to_the_file(tmp_path):
    path = write_yolo(tmp_path / "yaml" / "data")
    path = path.rename(tmp_path / "yaml" / "data.yaml")
    path.write_text("path: data\ntrain: images/train\nnames: [dog, cat]")
    assert yolo_images(path, "train") == str(tmp_path / "yaml" / "data" / "images" / "train")


def test_a_yolo_polygon_becomes_its_box(tmp_path):
    path = write_yolo(tmp_path / "data")
    triangle = "0 0.25 0.25 0.75 0.25 0.75 0.75\n"
    (tmp_path / "data" / "labels" / "val" / "c.txt").write_text(triangle)
    (annotation,) = json.loads(Path(coco_from_yolo(path, "val")).read_text())["annotations"]
    assert annotation["bbox"] == pytest.approx([20, 15, 40, 30], abs=1)
    assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
    assert not annotation.get("segmentation")


def test_yolo_folders_can_be_several(tmp_path):
    path = write_yolo(tmp_path / "data")
    path.write_text("train: [images/train, images/val]\nnames: [dog, cat]")
    first, second = coco_from_yolo(path, "train")
    assert len(yolo_images(path, "train")) == 2
    assert [image["file_name"] for image in json.loads(Path(second).read_text())["images"]] == [
        "c.png"
    ]


def test_a_changed_label_file_is_read_again(tmp_path):
    path = write_yolo(tmp_path / "data")
    before = coco_from_yolo(path, "val")
    assert coco_from_yolo(path, "val") == before
    (tmp_path / "data" / "labels" / "val" / "c.txt").write_text("1 0.5 0.5 0.5 0.5 \n")
    after = coco_from_yolo(path, "val")
    (annotation,) = json.loads(Path(after).read_text())["annotations"]
    assert annotation["category_id"] == 2 and annotation["bbox"] == close(20, 15, 40, 30)


def test_a_label_file_changed_to_one_of_its_size_is_read_again(tmp_path):
    path = write_yolo(tmp_path / "data")
    label = tmp_path / "data" / "labels" / "val" / "c.txt"
    before = coco_from_yolo(path, "val")
    label.write_text(label.read_text().replace("0 ", "1 ", 1))
    os.utime(label, ns=(0, 0))  # whatever the clock's resolution
    after = coco_from_yolo(path, "val")
    classes = [json.loads(Path(each).read_text())["annotations"] for each in (before, after)]
    assert [annotation["category_id"] for (annotation,) in classes] == [1, 2]


def test_other_names_are_another_json(tmp_path):
    path = write_yolo(tmp_path / "data")
    before = coco_from_yolo(path, "val")
    path.write_text(path.read_text().replace("dog", "cow"))
    assert class_names(coco_from_yolo(path, "val")) == ["cow", "cat"]
    assert class_names(before) == ["dog", "cat"]
    folder = write_voc(tmp_path / "voc", a=[("dog", 1, 1, 9, 9)], b=[("cat", 1, 1, 9, 9)])
    chosen = tmp_path / "train.txt"
    for names in (["dog", "cat"], ["cat", "dog"]):
        assert class_names(coco_from_voc(folder, folder, names)) == names
        for stem in ("a", "b"):
            chosen.write_text(stem)
            coco = json.loads(Path(coco_from_voc(folder, folder, names, chosen)).read_text())
            assert [image["file_name"] for image in coco["images"]] == [f"{stem}.jpg"]


def test_a_yolo_line_that_is_none_names_its_file(tmp_path):
    path = write_yolo(tmp_path / "data")
    (tmp_path / "data" / "labels" / "val" / "c.txt").write_text("0 0.5 0.5 nonsense")
    with pytest.raises(DatasetError, match="c.txt"):
        coco_from_yolo(path, "val")


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/train", "has no 'names'"),
        ("names: [a]", "has no 'val'"),
        ("names: [a]\nval: gone", "image folder .*gone .*does not exist"),
        ("names: [a", "is no YAML file"),
        ("names: [a]\nval: data.yaml", "give their folder"),
        ("names: {1: a, 2: b}\nval: .", "has no name of class 0: number"),
        ("names: {0: a, 2: b}\nval: .", "has no name of class 1: number"),
        ("names: {a: 0, b: 1}\nval: .", "has no name of class 0: number"),
        ("names: dog\nval: .", "has 'names' that are no list"),
    ],
)
def test_a_yolo_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text)
    with pytest.raises(DatasetError, match=message):
        coco_from_yolo(path, "val")
    with pytest.raises(DatasetError, match="nothing.yaml does not exist"):
        coco_from_yolo(tmp_path / "nothing.yaml", "val")


def test_a_voc_folder_is_read_by_its_config_with_names(tmp_path):
    train = write_voc(tmp_path / "train", b=[("dog", 1, 1, 80, 60), ("cat", 11, 21, 30, 40)], a=[])
    val = write_voc(tmp_path / "val", c=[("dog", 2, 3, 4, 5)])
    overrides = [
        f"data.{split}_{kind}={folder}"
        for split, folder in (("train", train), ("val", val))
        for kind in ("images", "annotations")
    ]
    classes, train, val = registered("custom_voc.py", *overrides)
    assert classes == ["cat", "dog"]
    # VOC counts pixels from 1 and includes the last: 1 to 80 is the whole width.
    assert train == {
        "a.jpg": [],
        "b.jpg": [("dog", close(0, 0, 80, 60)), ("cat", close(10, 20, 30, 40))],
    }
    assert val == {"c.jpg": [("dog", close(1, 2, 4, 5))]}
    classes, _, val = registered("custom_voc.py", *overrides, "data.names=[dog,horse,cat]")
    assert classes == ["dog", "horse", "cat"] and val["c.jpg"][0][0] == "dog"


def test_a_list_chooses_voc_images(tmp_path):
    folder = write_voc(tmp_path / "voc", a=[("dog", 1, 1, 9, 9)], b=[("cat", 1, 1, 9, 9)])
    (tmp_path / "train.txt").write_text("b  1\n\n")
    path = coco_from_voc(folder, folder, image_list=tmp_path / "train.txt")
    coco = json.loads(Path(path).read_text())
    assert [image["file_name"] for image in coco["images"]] == ["b.jpg"]
    assert class_names(path) == ["cat"] and len(coco["annotations"]) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\ngone\nlost 1\n", "has 2 names that .*voc has no image of, such as gone"),
        (b"\xff\xfe", "list of images .*train.txt cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, content, message):
    folder = write_voc(tmp_path / "voc", a=[])
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        coco_from_voc(folder, folder, image_list=tmp_path / "train.txt")


def test_a_voc_class_that_training_does_not_know_is_named(tmp_path):
    folder = write_voc(tmp_path / "voc", a=[("horse", 1, 1, 9, 9)])
    with pytest.raises(DatasetError, match="classes .'horse'., which are not among .'dog'"):
        coco_from_voc(folder, folder, names=["dog"])


def test_a_broken_xml_file_and_a_missing_folder_are_errors(tmp_path):
    folder = write_voc(tmp_path / "voc", a=[])
    (folder / "a.xml").write_text("<annotation>")
    with pytest.raises(DatasetError, match="voc cannot be read"):
        coco_from_voc(folder, folder)
    with pytest.raises(DatasetError, match="gone does not exist"):
        coco_from_voc(folder, tmp_path / "gone")


def test_a_yolo_data_set_trains_is_evaluated_and_reported(tmp_path, monkeypatch):
    path = write_yolo(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    config = ROOT / "configs" / "custom_yolo.py"
    overrides = [f"data.yaml={path}", f"train.output_dir={tmp_path}/run", *SMALL]
    overrides += ["dataloader.train.total_batch_size=2", "train.eval_period=0"]
    results = main(arguments("--config-file", config, *overrides))
    assert {"AP-dog", "AP-cat"} <= set(results["bbox"])
    weights, output = tmp_path / "run" / "model_final.pth", tmp_path / "report"
    command = ["--weights", str(weights), "--output", str(output)]
    evaluate.run(evaluate.get_parser().parse_intermixed_args(command))
    (detector,) = json.loads((output / "report.json").read_text())["detectors"]
    assert list(detector["classes"]) == ["dog", "cat"]
    assert detector["overall"]["AP"] == pytest.approx(results["bbox"]["AP"], abs=1e-6)
    command = ["--config-file", str(config), "--output", str(output), f"data.yaml={path}"]
    assert check_data.main(command) == 0
    check = json.loads((output / "check.json").read_text())
    assert check["splits"]["train"]["statistics"]["objects_of_classes"] == {"dog": 1, "cat": 1}
