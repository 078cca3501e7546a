"""YOLO and Pascal VOC folders, made here, read through their configs."""

import json
import os
from pathlib import Path
from unicodedata import normalize
from unittest import mock

import pytest
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from helpers import ROOT
from smca.analysis import dataset
from smca.cli import check_data, evaluate
from smca.config import load_config
from smca.data import (
    DatasetError,
    DetrDatasetMapper,
    class_names,
    coco_from_voc,
    coco_from_yolo,
    register_coco,
    yolo_images,
)
from smca.engine import main
from smca.errors import UserError
from test_train_net import SMALL, arguments

BOX = "<bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax></bndbox>"


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


def check(folder, config, *overrides):
    """The exit code of check_data, which takes long to draw."""
    config = str(ROOT / "configs" / config)
    command = ["--config-file", config, "--output", str(folder / "check"), *overrides]
    with mock.patch.object(dataset, "draw_training_images"):
        return check_data.main(command)


def read(path):
    return json.loads(Path(path).read_text())


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


@pytest.mark.parametrize(
    "text, names",
    [
        ("{1: cat, 0: dog}", ["dog", "cat"]),
        ("{'1': cat, '0': dog}", ["dog", "cat"]),
        ("[no, null]\nnc: 2", ["no", "null"]),  # which YAML would read as other values
        ("[01, 2]", ["01", "2"]),
    ],
)
def test_yolo_names_are_a_list_or_numbered(tmp_path, text, names):
    path = coco_from_yolo(write_yolo(tmp_path / "data", text), "train")
    assert class_names(path) == names


@pytest.mark.parametrize(
    "images, label, text",
    [
        ("images/images_train", "labels/images_train/a.txt", "train: images/images_train"),
        ("images/images/b", "images/labels/b/a.txt", "train: images/images/b"),
        ("a/images", "a/labels/a.txt", "train: a/images/"),
        ("images", "images/a.txt", "train: images"),
        ("train/images", "train/labels/a.TXT", "train: train"),
        ("data/images/b", "data/labels/b/a.txt", "path: data\ntrain: images/b"),
        ("images", "labels/a.txt", "path: /gone\ntrain: ../images"),  # one folder too high
        ("train/images", "train/labels/a.txt", r"train: C:\my data\train\images"),
        ("images", "labels/A.txt", "train: images"),
        ("images", "labels/images.txt", "train: images"),
        ("images/x/images", "labels/x/images/a.txt", "train: images"),
        ("images", "labels/cafe\u0301.txt", "train: images"),  # from a Mac
    ],
)
def test_yolo_labels_are_found_where_exports_have_them(tmp_path, images, label, text):
    write_images(tmp_path / images, f"{normalize('NFC', Path(label).stem.lower())}.png")
    (tmp_path / label).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / label).write_text("0 0.5 0.5 0.25 0.5")
    path = tmp_path / "data.yaml"
    path.write_text(f"{text}\nnames: [dog]")
    assert f"{tmp_path / images}/".startswith(f"{yolo_images(path, 'train')}/")
    assert len(read(coco_from_yolo(path, "train"))["annotations"]) == 1


@pytest.mark.parametrize(
    "line, box",
    [
        ("0 0.25 0.25 0.75 0.25 0.75 0.75", (20, 15, 40, 30)),
        ("0 0.5 0.5 0.5 0.5 0.93", (20, 15, 40, 30)),  # with a score
        ("0 0.5 0.5 0.5 0.5 17", (20, 15, 40, 30)),  # with a track
        ("0 0.5 0.5 0.5 0.5 0 0 0 0.9 0.9 2", (20, 15, 40, 30)),  # with keypoints
        ("0 -0.1 0.5 0.25 0.25 0.6 0.5 0.25 1.2", (0, 15, 48, 45)),  # cut at the border
    ],
)
def test_a_yolo_line_of_more_than_a_box_becomes_its_box(tmp_path, line, box):
    path = write_yolo(tmp_path / "data")
    path.write_text(path.read_text().replace("/", "\\") + "\nkpt_shape: [2, 3]")
    (tmp_path / "data" / "labels" / "val" / "c.txt").write_text(line)
    (annotation,) = read(coco_from_yolo(path, "val"))["annotations"]
    assert annotation["bbox"] == close(*box)
    assert annotation["area"] == pytest.approx(annotation["bbox"][2] * annotation["bbox"][3])
    assert not annotation.get("segmentation")


def test_other_categories_are_those_of_the_folder_of_labels(tmp_path):
    path = write_yolo(tmp_path / "data")
    train = coco_from_yolo(path, "train")
    path.write_text(path.read_text().replace("cat", "cow"))
    words = (
        r"^\S+/labels/val and \S+/labels/train must have the same categories, but only the first"
    )
    with pytest.raises(DatasetError, match=words):
        register_coco(coco_from_yolo(path, "val"), yolo_images(path, "val"), categories_from=train)


def test_yolo_folders_can_be_several(tmp_path):
    path = write_yolo(tmp_path / "data")
    path.write_text("train: [images/train, images/val]\nnames: [dog, cat]")
    names = register_coco(coco_from_yolo(path, "train"), yolo_images(path, "train"))
    assert [len(DatasetCatalog.get(name)) for name in names] == [2, 1]


@pytest.mark.parametrize(
    "line", ["./images/train/a.png", "{root}/images/train/a.png", "data/x/images/train/a.png"]
)
def test_a_text_file_lists_yolo_images(tmp_path, line):
    path = write_yolo(tmp_path / "data")
    path.write_text("Train: images/train\nValidation: list.txt\nnames: [dog, cat]")
    (tmp_path / "data" / "list.txt").write_text(line.format(root=tmp_path / "data") + "\n")
    _, train, val = registered("custom_yolo.py", f"data.yaml={path}")
    assert val == {"a.png": train["a.png"]} and len(train) == 2
    converted = coco_from_yolo(path, "val")
    (tmp_path / "data" / "log.txt").write_text("of a training")
    assert coco_from_yolo(path, "val") == converted


def test_changed_names_and_labels_are_read_again(tmp_path):
    path = write_yolo(tmp_path / "data", "[cow, cat]")
    assert class_names(coco_from_yolo(path, "val")) == ["cow", "cat"]
    path.write_text(path.read_text().replace("cow", "dog"))
    before = coco_from_yolo(path, "val")
    assert class_names(before) == ["dog", "cat"]
    label = tmp_path / "data" / "labels" / "val" / "c.txt"
    label.write_text(label.read_text().replace("0 ", "1 ", 1))
    os.utime(label, ns=(0, 0))  # whatever the clock's resolution
    classes = [read(each)["annotations"][0]["category_id"]
               for each in (before, coco_from_yolo(path, "val"))]  # fmt: skip
    assert classes == [1, 2]


@pytest.mark.parametrize(
    "line, words",
    [
        ("0 0.5 0.5 nonsense", "is '0 0.5 0.5 nonsense', which has to be the number of a class"),
        ("0 0.5 0.5 0.1", "4 numbers of a box, or the points of a polygon"),
        ("2 0.5 0.5 0.1 0.1", "but the classes are numbered from 0 to 1"),
        ("0.5 0.5 0.5 0.1 0.1", "but the classes are numbered from 0 to 1"),
        ("0 0.5 nan 0.1 0.1", "which has to be"),
        ("0 0.5 0.5 0.1 0.1 0.93 17", "which has to be"),  # a score and a track, or a polygon
        ("0 40 30 20 10", "which has to be .*relative to the image, from 0 to 1"),
        ("0 0.9 0.5 0.5 0.1", "from .52, 27. to .92, 33., in pixels from 0, which must be inside"),
        ("0 0.5 0.5 -0.1 0.1", "width and height are above 0"),
        ("0 0.5 0.5 0 0", "width and height are above 0"),
    ],
)
def test_a_bad_yolo_line_is_named(tmp_path, line, words):
    path = write_yolo(tmp_path / "data")
    label = tmp_path / "data" / "labels" / "val" / "c.txt"
    label.write_text(f"0 0.5 0.5 1 1\n\n{line}\n")
    match = f"^1 problem in {label.parent}:\\s+{label} line 3 .*{words}"
    with pytest.raises(DatasetError, match=match):
        register_coco(coco_from_yolo(path, "val"), yolo_images(path, "val"))


@pytest.mark.parametrize(
    "xml, words",
    [
        ("<object><name>dog</name></object>", "a.xml object 1 .dog. has no bndbox with the"),
        (f"<object>{BOX}</object>", "a.xml object 1 has no name of its class"),
        (
            f"<object><name>dog</name>{BOX}</object>"
            f"<object><name>dog</name>{BOX.replace('9', '900')}</object>",
            r"a.xml object 2 has a box from .0, 0. to .900, 900., in pixels from 0, which must be "
            r"inside its image of 80 x 60 pixels; correct",
        ),
        (f"<object><name>dog</name>{BOX.replace('9', 'nan')}</object>", "a.xml .* has no bndbox"),
        (f"<object><name>dog</name>{BOX.replace('9', '?')}</object>", "a.xml .* has no bndbox"),
        ("<object>", "a.xml cannot be read .mismatched tag"),
        ("<size><width>60</width><height>80</height></size>", "a.xml: Image .*a.jpg is 80 x 60"),
    ],
)
def test_a_bad_voc_object_is_named(tmp_path, xml, words):
    folder = write_voc(tmp_path / "voc", a=[])
    (folder / "a.xml").write_text(f"<annotation>{xml}</annotation>")
    path = coco_from_voc(folder, folder, ["dog"])
    with pytest.raises(DatasetError, match=f"1 problem in {folder}:\\s+{folder}/{words}"):
        register_coco(path, folder)


def test_an_image_or_a_label_file_that_cannot_be_read_is_named(tmp_path):
    path = write_yolo(tmp_path / "data")
    image = tmp_path / "data" / "images" / "val" / "c.png"
    image.write_bytes(b"PNG")
    with pytest.raises(DatasetError, match=f"1 problem in .*val:\\s+{image} cannot be used"):
        registered("custom_yolo.py", f"data.yaml={path}")
    label = tmp_path / "data" / "labels" / "train" / "a.txt"
    label.write_bytes(b"\xff")
    with pytest.raises(DatasetError, match=f"1 problem in .*train:\\s+{label} cannot be read"):
        registered("custom_yolo.py", f"data.yaml={path}")


# Images in sub-folders, of any suffix, with an EXIF orientation


@pytest.mark.parametrize("suffix", [".jfif", ".jpe", ".JPG", ".gif", ".avif", ".ppm"])
def test_a_labeled_image_of_any_suffix_in_a_subfolder_is_used(tmp_path, suffix):
    image = Image.new("L", (80, 60))
    for folder in ("images/train/day/one", "voc/JPEGImages/day/one"):
        (tmp_path / folder).mkdir(parents=True)
        image.save(tmp_path / folder / f"a{suffix}")
    (tmp_path / "labels/train/day/one").mkdir(parents=True)
    (tmp_path / "labels/train/day/one/a.txt").write_text("0 0.5 0.5 0.25 0.5")
    (tmp_path / "voc/Annotations/day/one").mkdir(parents=True)
    xml = f"<annotation><object><name>dog</name>{BOX}</object></annotation>"
    (tmp_path / "voc/Annotations/day/one/a.xml").write_text(xml)
    (tmp_path / "data.yaml").write_text("train: images/train\nnames: [dog]")
    (tmp_path / "list.txt").write_text("day/one/a\n")
    folders = tmp_path / "voc" / "JPEGImages", tmp_path / "voc" / "Annotations"
    for path, root in (
        (coco_from_yolo(tmp_path / "data.yaml", "train"), tmp_path / "images" / "train"),
        (coco_from_voc(*folders), folders[0]),
        (coco_from_voc(*folders, image_list=tmp_path / "list.txt"), folders[0]),
    ):
        (item,) = DatasetCatalog.get(register_coco(path, root))
        assert item["file_name"] == str(root / "day" / "one" / f"a{suffix}")
        assert len(item["annotations"]) == 1


def test_a_folder_that_links_to_itself_is_read_once(tmp_path):
    folder = write_voc(tmp_path / "voc", a=[("dog", 1, 1, 9, 9)])
    (folder / "again").symlink_to(folder)
    coco = read(coco_from_voc(folder, folder))
    assert [image["file_name"] for image in coco["images"]] == ["a.jpg"]


def test_labels_without_an_image_are_named(tmp_path, caplog):
    path = write_yolo(tmp_path / "data")
    labels = tmp_path / "data" / "labels" / "train"
    (labels / "sub").mkdir()
    for name in ("gone", "heic", "sub/b", "zz"):
        (labels / f"{name}.txt").write_text("0 0.5 0.5 0.1 0.1")
    (labels / "classes.txt").write_text("dog\ncat")
    (tmp_path / "data" / "images" / "train" / "heic.heic").write_bytes(b"ftypheic")
    coco_from_yolo(path, "train")
    words = f"4 label files with no image that can be read, such as {labels}/gone.txt, "
    assert words in caplog.text and "classes.txt" not in caplog.text
    folder = write_voc(tmp_path / "voc", a=[("dog", 1, 1, 9, 9)], b=[("dog", 1, 1, 9, 9)])
    (folder / "b.jpg").rename(folder / "c.jpg")
    Image.new("RGB", (80, 60)).save(folder / "a.png")
    coco_from_voc(folder, folder)
    assert f"1 label file with several images, such as {folder}/a.xml: give" in caplog.text
    assert f"1 label file with no image that can be read, such as {folder}/b.xml:" in caplog.text


@pytest.mark.parametrize(
    "image, xml, file_name",
    [
        ("photo.jpg", "1.xml", "photo.jpg"),
        ("photo.jpg", "1.xml", "photo"),
        ("sub/photo.jpg", "1.xml", r"C:\data\photo.jpg"),
        ("sub/photo.jpg", "photo.xml", ""),
        ("photo.jpg", "photo.jpg.xml", "photo.jpg"),
        ("PHOTO.JPG", "photo.xml", "photo.jpg"),
        ("photo.jpg", "photo.xml", "another.jpg"),
        ("caf\xe9.jpg", "cafe\u0301.xml", ""),
    ],
)
def test_an_xml_file_may_name_its_image(tmp_path, image, xml, file_name):
    folders = tmp_path / "images", tmp_path / "labels"
    write_images(folders[0], "other.jpg")
    (folders[0] / image).parent.mkdir(exist_ok=True)
    (folders[0] / "other.jpg").rename(folders[0] / image)
    write_images(folders[0] / "more", "other.jpg")
    folders[1].mkdir()
    head = f"<annotation><filename>{file_name}</filename><object><name>dog</name>"
    (folders[1] / xml).write_text(f"{head}{BOX}</object></annotation>")
    coco = read(coco_from_voc(*folders))
    names = {item["id"]: item["file_name"] for item in coco["images"]}
    assert [names[item["image_id"]] for item in coco["annotations"]] == [image]


def write_turned(path):
    """A photo of 80 x 60 pixels that its EXIF orientation turns to 60 x 80; stored it is red from
    (10, 20) to (50, 30), and upright from (30, 10) to (40, 50)."""
    path.parent.mkdir(parents=True)
    image = Image.new("RGB", (80, 60))
    image.paste((255, 0, 0), (10, 20, 50, 30))
    exif = image.getexif()
    exif[274] = 6
    image.save(path, exif=exif, quality=100, subsampling=0)


STORED, UPRIGHT = (10, 20, 50, 30), (30, 10, 40, 50)


@pytest.mark.parametrize(
    "size, box", [((80, 60), STORED), ((60, 80), UPRIGHT), ((0, "?"), UPRIGHT), (None, UPRIGHT)]
)
def test_the_size_in_the_xml_says_which_way_a_turned_photo_is_meant(tmp_path, size, box):
    write_turned(tmp_path / "voc" / "a.jpg")
    size = "" if size is None else f"<width>{size[0]}</width><height>{size[1]}</height>"
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, *box[2:]))
    corners = "".join(f"<{tag}>{value}</{tag}>" for tag, value in corners)
    (tmp_path / "voc" / "a.xml").write_text(
        f"<annotation><size>{size}</size><object><name>dog</name><bndbox>{corners}</bndbox>"
        "</object></annotation>"
    )
    path = coco_from_voc(tmp_path / "voc", tmp_path / "voc")
    assert_red_in_its_box(register_coco(path, tmp_path / "voc"))


def test_yolo_boxes_are_relative_to_the_upright_photo(tmp_path):
    write_turned(tmp_path / "images" / "a.jpg")
    (tmp_path / "images" / "a.txt").write_text(f"0 {35 / 60} {30 / 80} {10 / 60} {40 / 80}")
    (tmp_path / "data.yaml").write_text("train: images\nnames: [dog]")
    path = coco_from_yolo(tmp_path / "data.yaml", "train")
    assert_red_in_its_box(register_coco(path, tmp_path / "images"))


def assert_red_in_its_box(name):
    (item,) = DatasetCatalog.get(name)
    mapped = DetrDatasetMapper(True, [])(item)
    left, top, right, bottom = mapped["instances"].gt_boxes.tensor[0].round().int().tolist()
    red = (mapped["image"][0] > 128).nonzero()
    assert red.min(0).values.tolist() == [top, left]
    assert (red.max(0).values + 1).tolist() == [bottom, right]


# Text files as others write them


def test_an_xml_file_may_be_in_any_encoding_with_capitals_and_a_namespace(tmp_path):
    folder = write_voc(tmp_path / "voc", a=[("\u72d7", 1, 1, 9, 9)])
    text = (folder / "a.xml").read_text().replace("object>", "Object>")
    text = text.replace("<annotation>", '?>\n<annotation xmlns="http://x">')
    for declared, encoding in (("GB2312", "gb2312"), ("utf-16", "utf-8")):
        head = f'<?xml version="1.0" encoding="{declared}"'
        (folder / "a.xml").write_text(head + text, encoding=encoding)
        path = coco_from_voc(folder, folder)
        assert class_names(path) == ["\u72d7"] and read(path)["annotations"][0]["area"] == 81


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    path = write_yolo(tmp_path / "data")
    folder = write_voc(tmp_path / "voc", a=[("dog", 1, 1, 9, 9)])
    (tmp_path / "list.txt").write_text("a\n")
    texts = [*(tmp_path / "data").rglob("*.txt"), path, folder / "a.xml", tmp_path / "list.txt"]
    for text in texts:
        content = text.read_text()
        if text.suffix == ".xml":
            content = f'<?xml version="1.0" encoding="{encoding[:6].rstrip("-")}"?>\n{content}'
        text.write_bytes(content.replace("\n", "\r\n").encode(encoding))
    _, train, val = registered("custom_yolo.py", f"data.yaml={path}")
    assert [len(train["a.png"]), len(val["c.png"])] == [2, 1]
    coco = read(coco_from_voc(folder, folder, None, tmp_path / "list.txt"))
    assert coco["categories"] == [{"id": 1, "name": "dog"}] and len(coco["annotations"]) == 1


@pytest.mark.parametrize(
    "text, message",
    [
        ("train: images/train", "has no 'names'"),
        ("names: [a]", "has no 'val'"),
        ("names: [a]\nval: gone", "image folder .*gone .*does not exist"),
        ("val: .\nnames: [a", r"data\.yaml cannot be read as YAML .*line 2.*\): correct it\.$"),
        ("names: [h\xfcnd]", r"data\.yaml cannot be read as YAML \(.*utf-8.*\): correct it\.$"),
        ("names: [a]\nval: data.yaml", "list of images has 2 names that .* has no image of"),
        ("names: {0: a, 2: b}\nval: .", "or number them from 0 without gaps"),
        ("names: dog\nval: .", "has 'names' that are no list"),
        ("names: [[dog], cat]\nval: .", "has 'names' that are no list"),
        ("names: [dog]\nnc: 2\nval: .", "has nc 2, but 1 'names'"),
        ("names: [dog, cat, dog]\nval: .", "has a name twice in 'names'"),
        ("names: [dog]\nval: {a: b}", "has no 'val'"),
        ("names: [dog]\nval: .\nkpt_shape: [[17], 3]", "has kpt_shape .*write the number of"),
    ],
)
def test_a_yolo_file_that_cannot_be_used_says_why(tmp_path, text, message):
    path = tmp_path / "data.yaml"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(DatasetError, match=message) as error:
        coco_from_yolo(path, "val")
    assert "\n" not in str(error.value)
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


@pytest.mark.parametrize(
    "line, name",
    [("b -1", "b"), ("b.jpg", "b"), ("a b", "a b"), ("a b  1", "a b"), ("b 0  1", "b 0")],
)
def test_a_list_chooses_voc_images(tmp_path, line, name):
    names = {"a": "dog", "b": "cat", "a b": "cow", "b 0": "ant"}
    objects = {name: [(label, 1, 1, 9, 9)] for name, label in names.items()}
    folder = write_voc(tmp_path / "voc", **objects)
    (tmp_path / "train.txt").write_text(f"{line}\n\n")
    path = coco_from_voc(folder, folder, image_list=tmp_path / "train.txt")
    coco = read(path)
    assert [image["file_name"] for image in coco["images"]] == [f"{name}.jpg"]
    assert class_names(path) == [names[name]] and len(coco["annotations"]) == 1


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\ngone\nlost 1\n", "has 2 names that .*voc has no image of, such as gone"),
        (b"\n", "list of images .*train.txt is empty"),
        (b"\xff", "list of images .*train.txt cannot be read"),
    ],
)
def test_a_list_that_cannot_be_used_says_why(tmp_path, content, message):
    folder = write_voc(tmp_path / "voc", a=[])
    (tmp_path / "train.txt").write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        coco_from_voc(folder, folder, image_list=tmp_path / "train.txt")


def test_voc_folders_that_cannot_be_used_are_errors(tmp_path):
    with pytest.raises(DatasetError, match="gone does not exist"):
        coco_from_voc(tmp_path, tmp_path / "gone")
    with pytest.raises(DatasetError, match=f"{tmp_path} has no images"):
        coco_from_voc(tmp_path, tmp_path)
    horse = write_voc(tmp_path / "horse", a=[("horse", 1, 1, 9, 9)])
    with pytest.raises(DatasetError, match="classes .'horse'., which are not among .'dog'"):
        coco_from_voc(horse, horse, names=["dog"])
    folder = write_voc(tmp_path / "voc", a=[])
    with pytest.raises(DatasetError, match="voc has no objects that say their classes"):
        coco_from_voc(folder, folder)
    for text, reason in (("<object>", "no element"), ("<a></a>", "it begins with <a>, not with")):
        (folder / "a.xml").write_text(text)
        with pytest.raises(DatasetError, match=f"no objects that say .*a.xml cannot .*{reason}"):
            coco_from_voc(folder, folder)
    (folder / "a.xml").write_text("<annotation><object><name>dog</name></object></annotation>")
    assert class_names(coco_from_voc(folder, folder)) == ["dog"]  # its box is what is missing


def test_a_yolo_data_set_trains_is_checked_evaluated_and_reported(tmp_path, monkeypatch, capsys):
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
    (detector,) = read(output / "report.json")["detectors"]
    assert list(detector["classes"]) == ["dog", "cat"]
    assert detector["overall"]["AP"] == pytest.approx(results["bbox"]["AP"], abs=1e-6)
    assert check(tmp_path, "custom_yolo.py", f"data.yaml={path}") == 0
    checked = read(tmp_path / "check" / "check.json")
    assert checked["splits"]["train"]["statistics"]["objects_of_classes"] == {"dog": 1, "cat": 1}
    label = tmp_path / "data" / "labels" / "val" / "c.txt"
    label.write_text("0 0.5 0.5 1 1\n0 0.5 nonsense")
    capsys.readouterr()
    assert check(tmp_path, "custom_yolo.py", f"data.yaml={path}") == 1
    out = capsys.readouterr().out
    assert f"val: {label.parent}: 1 usable image with 1 object of 2 classes; 1 problem\n" in out
    assert f"{label} line 2 is" in out


def test_validation_without_objects_is_said_and_model_final_evaluated(tmp_path, capsys):
    path, run = write_yolo(tmp_path / "data"), tmp_path / "run"
    label = tmp_path / "data" / "labels" / "val" / "c.txt"
    label.rename(label.with_name("caf\udce9.txt"))  # not in UTF-8
    overrides = [f"data.yaml={path}", f"train.output_dir={run}", *SMALL]
    overrides += ["dataloader.train.total_batch_size=2", "train.eval_period=1"]
    main(arguments("--config-file", ROOT / "configs" / "custom_yolo.py", *overrides))
    out = capsys.readouterr().out + (run / "log.txt").read_text()
    assert "labels/val has no objects: there is nothing to train on, and as validation" in out
    assert out.index("has no objects") < out.index("Starting training")
    assert out.count(r"no image that can be read, such as " + rf"{label.parent}/caf\udce9.txt") == 2
    parser = evaluate.get_parser()
    with pytest.raises(UserError, match="model_best.pth does not exist.* has .*model_final.pth: t"):
        evaluate.run(parser.parse_intermixed_args(["--weights", str(run / "model_best.pth")]))
    command = ["--weights", str(run / "model_final.pth"), "--output", str(tmp_path / "report")]
    evaluate.run(parser.parse_intermixed_args(command))
