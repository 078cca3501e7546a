import copy
import gzip
import json
import math
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.structures import Boxes, Instances
from omegaconf import OmegaConf
from PIL import Image

from smca.data import (
    CocoEvaluator,
    category_ids,
    class_names,
    num_classes,
    num_images,
    register_coco,
    require_dataset,
)
from smca.errors import DatasetError


def _coco():
    """Two images of 40 x 30 pixels, the second without objects; category ids with gaps."""
    return {
        "info": {},
        "images": [
            {"id": 5, "file_name": "a.png", "height": 30, "width": 40},
            {"id": 9, "file_name": "b.png", "height": 30, "width": 40},
        ],
        "annotations": [_annotation(1, [2, 3, 10, 12], 30), _annotation(2, [20, 5, 20, 25], 10)],
        "categories": [{"id": 30, "name": "cat"}, {"id": 10, "name": "dog"}],
    }


def _annotation(id, bbox, category_id, **more):
    annotation = {"id": id, "image_id": 5, "category_id": category_id, "bbox": bbox}
    return {**annotation, "area": bbox[2] * bbox[3], "iscrowd": 0, **more}


def _write(folder, coco, name="train.json"):
    """The JSON and its images; returns the two paths."""
    image_root = folder / "images"
    image_root.mkdir(exist_ok=True)
    for file_name in ("a.png", "b.png"):
        if not (image_root / file_name).exists():
            Image.new("RGB", (40, 30)).save(image_root / file_name)
    (folder / name).write_text(json.dumps(coco))
    return folder / name, image_root


def _register_with_first_annotation(folder, **changes):
    coco = _coco()
    coco["annotations"][0].update(changes)
    return register_coco(*_write(folder, coco))


# Good data sets


def test_registered_data_set_has_contiguous_classes_in_the_order_of_their_ids(tmp_path):
    json_file, image_root = _write(tmp_path, _coco())
    name = register_coco(json_file, image_root)
    assert register_coco(str(json_file), str(image_root)) == name
    _write(tmp_path, {**_coco(), "categories": _coco()["categories"] + [dict(id=99, name="cow")]})
    assert MetadataCatalog.get(register_coco(json_file, image_root)).thing_classes[2] == "cow"
    _write(tmp_path, _coco())
    first, second = get_detection_dataset_dicts(name, filter_empty=False)
    assert first["file_name"] == str(image_root / "a.png")
    assert [a["category_id"] for a in first["annotations"]] == [1, 0]
    assert second["annotations"] == []
    metadata = MetadataCatalog.get(name)
    assert metadata.thing_classes == ["dog", "cat"] == class_names(json_file)
    assert metadata.json_file == str(json_file) and metadata.evaluator_type == "coco"
    assert num_classes(json_file) == 2
    assert _perfect_ap(name) == pytest.approx(100)


def test_several_files_can_have_a_folder_of_images_each(tmp_path):
    (tmp_path / "other").mkdir()
    first, root = _write(tmp_path, _coco())
    second, other_root = _write(tmp_path / "other", _coco())
    files = OmegaConf.create([str(first), str(second)])  # as a config gives them
    roots = OmegaConf.create([str(root), str(other_root)])
    dicts = get_detection_dataset_dicts(register_coco(files, roots), filter_empty=False)
    folders = [Path(record["file_name"]).parent for record in dicts]
    assert folders == [root, root, other_root, other_root]
    assert [record["image_id"] for record in dicts] == [5, 9, 5, 9]
    assert class_names(files) == ["dog", "cat"] and num_classes(files) == 2
    assert isinstance(register_coco([first], [root]), list)


def test_names_decide_which_category_is_which(tmp_path):
    coco = _coco()
    train, image_root = _write(tmp_path, coco)
    coco["categories"] = [{"id": -1, "name": "cat"}, {"id": 2**70, "name": "dog"}]
    for annotation, category_id in zip(coco["annotations"], (-1, 2**70)):
        annotation["category_id"] = category_id
    val, _ = _write(tmp_path, coco, "val.json")
    names = register_coco([train, val], [image_root, image_root])
    names.append(register_coco(val, image_root, categories_from=train))
    names.append(register_coco(val, image_root, classes=["dog", "cat"]))
    assert names[1:] == [names[1]] * 3
    for name in names[:2]:
        (first, _) = get_detection_dataset_dicts(name, filter_empty=False)
        assert [a["category_id"] for a in first["annotations"]] == [1, 0]
        assert MetadataCatalog.get(name).thing_classes == ["dog", "cat"]
        assert _perfect_ap(name) == pytest.approx(100)
    assert [category_ids(name) for name in names[:2]] == [[10, 30], [2**70, -1]]
    assert class_names(val) == ["cat", "dog"]


def test_crowds_and_boxes_that_end_a_pixel_beyond_the_border_are_accepted(tmp_path):
    coco = _coco()
    boxes = [[-1.5, 0, 10, 10], [30, 20, 12, 12], [0, 0, 40.5, 30.5]]
    coco["annotations"] += [_annotation(i, box, 10) for i, box in enumerate(boxes, 3)]
    mask = {"size": [30, 40], "counts": [0, 1200]}
    crowd = _annotation(9, [0, 0, 40, 30], 10, iscrowd=1, segmentation=mask, ignore="0")
    coco["annotations"].append(crowd)
    name = register_coco(*_write(tmp_path, coco))
    assert [a["iscrowd"] for a in DatasetCatalog.get(name)[0]["annotations"]] == [0] * 5 + [1]


# Completion


def _perfect_ap(name, output_dir=None):
    """COCO AP of predictions that are the annotations themselves."""
    evaluator = CocoEvaluator(name, distributed=False, output_dir=output_dir)
    evaluator.reset()
    for record in DatasetCatalog.get(name):
        annotations = [a for a in record["annotations"] if not a["iscrowd"]]
        boxes = torch.tensor([a["bbox"] for a in annotations]).reshape(-1, 4).float()
        boxes[:, 2:] += boxes[:, :2]
        prediction = Instances((record["height"], record["width"]))
        prediction.pred_boxes = Boxes(boxes)
        prediction.scores = torch.ones(len(boxes))
        prediction.pred_classes = torch.tensor([a["category_id"] for a in annotations]).long()
        evaluator.process([record], [{"instances": prediction}])
    return evaluator.evaluate()["bbox"]["AP"]


MISSING = object()


@pytest.mark.parametrize(
    "key, value",
    [(key, MISSING) for key in ("area", "iscrowd", "id", "info")]
    + [("id", value) for value in (0, None, "a-1", [1], 1.5)]
    + [("area", 0), ("iscrowd", None)],
)
def test_annotations_are_completed_in_a_copy(tmp_path, key, value):
    coco = _coco()
    record = coco if key == "info" else coco["annotations"][0]
    record[key] = value
    if value is MISSING:
        del record[key]
    json_file, image_root = _write(tmp_path, coco)
    name = register_coco(json_file, image_root)
    assert json.loads(json_file.read_text()) == coco
    used = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
    found = [(a["id"], a["area"], a["iscrowd"]) for a in used["annotations"]]
    assert (used["info"], found) == ({}, [(1, 120, 0), (2, 500, 0)])
    assert _perfect_ap(name) == pytest.approx(100)


# Hashes, time stamps and numbers of 128 bits, some of them next to one another in a float.
LARGE = 2**53
ODD_IDS = [(-1, 7), (0, -(2**31)), (LARGE, LARGE + 1), (2**63 - 1, 2**63), (3, 2**128)]
ODD_IDS += [("007", "12"), ("b-7", "a"), (7.0, "7.0")]


@pytest.mark.parametrize("first, second", ODD_IDS)
def test_ids_may_be_any_numbers_or_texts(tmp_path, first, second):
    coco = _coco()
    for kind in ("images", "annotations"):
        coco[kind][0]["id"], coco[kind][1]["id"] = second, first
    for annotation, image_id in zip(coco["annotations"], (first, second)):
        annotation["image_id"] = image_id
    json_file, image_root = _write(tmp_path, coco)
    name = register_coco(json_file, image_root)
    with open(MetadataCatalog.get(name).json_file) as file:
        used = json.load(file)
    # The compiled evaluation of Detectron2 takes no negative ones.
    assert all(0 < a["id"] < 2**31 for a in used["annotations"])
    assert all(0 <= image["id"] < 2**31 for image in used["images"])
    assert _perfect_ap(name, tmp_path) == pytest.approx(100)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    found = {(result["image_id"], result["category_id"]) for result in results}
    assert found == {(first, 30), (second, 10)}
    predictions = torch.load(tmp_path / "instances_predictions.pth", weights_only=True)
    for item in predictions:
        assert {each["image_id"] for each in item["instances"]} == {item["image_id"]}
    assert {item["image_id"] for item in predictions} == {first, second}


@pytest.mark.parametrize("image_id, category_id", [("005", 30.0), (5.0, "30")])
def test_a_number_may_be_written_as_a_text_or_a_float(tmp_path, image_id, category_id):
    coco = _coco()
    coco["annotations"][0].update(image_id=image_id, category_id=category_id, iscrowd="0")
    # As Roboflow exports some boxes.
    coco["annotations"][1].update(bbox=[20, 5, "20.0", "25.00"], area="500.00")
    coco["images"][0].update(height="30", width=40.0)
    coco["categories"][1]["id"] = "10"
    name = register_coco(*_write(tmp_path, coco))
    assert _perfect_ap(name, tmp_path) == pytest.approx(100)
    results = json.loads((tmp_path / "coco_instances_results.json").read_text())
    assert {(r["image_id"], r["category_id"]) for r in results} == {(5, 30), (5, "10")}
    assert category_ids(name) == ["10", 30]
    coco["images"][1]["id"] = "05"
    with pytest.raises(DatasetError, match="image 05 .*has id 5, which must be unique"):
        register_coco(*_write(tmp_path, coco, "repeated.json"))


@pytest.mark.parametrize("used", [False, True])
def test_a_roboflow_project_without_objects_may_be_called_as_its_class(tmp_path, used):
    coco = _coco()
    coco["categories"] = [
        {"id": 0, "name": "dog", "supercategory": "none"},
        {"id": 10, "name": "dog", "supercategory": "dog"},
        {"id": 30, "name": "cat", "supercategory": "dog"},
    ]
    if used:
        coco["annotations"][0]["category_id"] = 0
        with pytest.raises(DatasetError, match="category 10 has name 'dog', which must be unique"):
            register_coco(*_write(tmp_path, coco))
        return
    name = register_coco(*_write(tmp_path, coco))
    assert MetadataCatalog.get(name).thing_classes == ["dog", "cat"]
    assert _perfect_ap(name, tmp_path) == pytest.approx(100)
    assert category_ids(name) == [10, 30]


@pytest.mark.parametrize(
    "extra",
    [
        {"segmentation": [[1, 2]], "keypoints": None},
        {"segmentation": "RLE", "keypoints": "1 2 3"},
        {"segmentation": {"counts": [1, "2"]}, "keypoints": [[1, 2, 2], [3, 4, None]]},
    ],
)
def test_masks_and_keypoints_are_not_read(tmp_path, extra):
    name = _register_with_first_annotation(tmp_path, **extra)
    annotations = DatasetCatalog.get(name)[0]["annotations"]
    assert len(annotations) == 2
    assert all(set(a) == {"bbox", "bbox_mode", "category_id", "iscrowd"} for a in annotations)
    assert _perfect_ap(name) == pytest.approx(100)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_json_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    json_file, image_root = _write(tmp_path, _coco())
    json_file.write_text(json_file.read_text(), encoding=encoding)
    assert _perfect_ap(register_coco(json_file, image_root)) == pytest.approx(100)
    assert num_images(str(json_file)) == 2


def test_a_file_without_objects_is_said_when_it_is_registered(tmp_path, caplog):
    json_file, image_root = _write(tmp_path, {**_coco(), "annotations": []})
    register_coco(json_file, image_root)
    assert f"{json_file} has no objects: there is nothing to train on, and as" in caplog.text


# Bad data sets


def test_paths_that_cannot_be_used_are_named(tmp_path):
    json_file, image_root = _write(tmp_path, _coco())
    for files, folders, words in (
        (tmp_path / "gone.json", image_root, r"gone\.json does not exist"),
        ("/dev/null", image_root, "/dev/null is neither a file nor a folder"),
        ("", image_root, "no annotation file"),
        (None, image_root, "no annotation file"),
        ([], image_root, "no annotation file"),
        ([json_file], [], "no image folder"),
        (json_file, tmp_path / "nowhere", "image folder .*nowhere does not exist"),
        ([json_file], [image_root] * 2, "2 image folders for 1 annotation files: give one folder"),
        ([json_file] * 3, [image_root] * 2, "2 image folders for 3 annotation files: give one f"),
    ):
        with pytest.raises(DatasetError, match=words):
            register_coco(files, folders)
    for function in (num_classes, class_names):
        with pytest.raises(DatasetError, match=r"gone\.json does not exist"):
            function(tmp_path / "gone.json")


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"images": [', "cannot be read as JSON in UTF-8 .*export it again"),
        (b'{"images": "h\xfcnd"}', "cannot be read as JSON in UTF-8"),
        (gzip.compress(b"{}", mtime=0), "cannot be read .* unpack it if it is compressed"),
        (b"[1, 2]", "is not in COCO's format, an object with .* add 'images' and 'annot"),
        (b'{"images": [], "annotations": []}', "is not in COCO's format.* add 'categories'"),
        (None, "is a folder: correct the path"),
    ],
)
def test_a_file_that_is_no_json_is_an_error(tmp_path, content, words):
    json_file, image_root = _write(tmp_path, _coco())
    json_file.unlink()
    json_file.mkdir() if content is None else json_file.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"train\.json {words}"):
        register_coco(json_file, image_root)


@pytest.mark.parametrize("key", ["images", "categories"])
def test_an_empty_list_is_an_error(tmp_path, key):
    with pytest.raises(DatasetError, match=f"'{key}' is empty"):
        register_coco(*_write(tmp_path, {**_coco(), key: [], "annotations": []}))


@pytest.mark.parametrize(
    "kind, changes, words",
    [
        ("images", {"id": MISSING}, "image at index 0 has no id, which must be a whole"),
        ("images", {"file_name": MISSING}, "image 5 has no file_name"),
        ("images", {"height": "30 px"}, "image 5 .*has height '30 px', which must be a whole"),
        ("images", {"width": 0}, r"image 5 \('a\.png'\) has width 0, which .* above 0; correct"),
        ("images", {"file_name": None}, "image 5 has file_name None"),
        ("images", {"id": [5]}, r"image \[5\] .*has id \[5\], which must be"),
        ("images", {"id": 9}, "image 9 .*has id 9, which must be unique"),
        ("annotations", {"image_id": MISSING}, "annotation 1 has no image_id"),
        ("annotations", {"bbox": MISSING}, r"annotation 1 \(of image 5\) has no bbox, which"),
        ("annotations", {"id": 2}, "annotation 2 .*has id 2, which must be unique"),
        ("annotations", None, "annotation at index 0 is null, not an object"),
        ("categories", {"id": None}, "category None has id None"),
        ("categories", {"id": 10}, "category 10 has id 10, which must be unique"),
        ("categories", {"name": MISSING}, "category 30 has no name"),
        ("categories", {"name": "dog"}, "category 10 has name 'dog', which must be unique"),
        ("categories", {"name": "d\ud800g"}, r"category 30 has name 'd\\ud800g', which .* Unicode"),
    ],
)
def test_a_faulty_record_is_named_and_its_annotations_are_not(tmp_path, kind, changes, words):
    coco = _coco()
    record = {**coco[kind][0], **(changes or {})}
    record = {key: value for key, value in record.items() if value is not MISSING}
    coco[kind][0] = None if changes is None else record
    with pytest.raises(DatasetError, match=f"1 problem in .*train.json:\\s+{words}"):
        register_coco(*_write(tmp_path, coco))


@pytest.mark.parametrize(
    "file_name, words",
    [
        ("a\0.png", ""),
        ("a\ud800.png", ""),
        (r".\a.png", r"does not exist.*Write file_name with / in place of"),
        ("photos/a.png", "does not exist.*It is there without the folder in file_name"),
        ("c.png", "does not exist.*It is there from the folder above"),
        ("u\u0308.png", "does not exist.*Its name on the disk is in Unicode's form NFC"),
        ("https://host/a.png", "does not exist.*is a URL: download the images"),
    ],
)
def test_a_file_name_that_is_no_path_is_an_error(tmp_path, file_name, words):
    coco = _coco()
    coco["images"][1]["file_name"] = file_name
    files = _write(tmp_path, coco)
    for other in ("c.png", "images/\u00fc.png"):
        Image.new("RGB", (40, 30)).save(tmp_path / other)
    with pytest.raises(DatasetError, match=f"1 problem in .*train.json:\\s+image 9: .*{words}"):
        register_coco(*files)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"image_id": 77}, "image_id 77, which must be the id of an image"),
        ({"image_id": 5.5}, "image_id 5.5, which must be a whole number or a text"),
        ({"category_id": 11}, "category_id 11, which must be the id of a category"),
        ({"category_id": True}, "category_id True, which must be a whole number or a text"),
        ({"ignore": 1}, "ignore 1, which must be 0, since only 'iscrowd' is supported"),
        ({"iscrowd": "2"}, "iscrowd 2, which must be 0 or 1"),
        ({"area": "12 px"}, "area '12 px', which must be a number from 0 to 1e.10"),
        ({"area": math.nan}, "area nan, which must be"),
        ({"area": 10**400}, r"area 10+\.\.\.0+, which must be"),
        ({"bbox": [0.1, 0.2, 0.5, 0.5]}, "bbox .*in pixels, not relative to its image; corr"),
        ({"bbox": [1, 2, 3]}, "bbox .*, which must be 4 finite numbers, of which the width"),
        ({"bbox": "1 2 3 4"}, "bbox .*4 finite numbers"),
        ({"bbox": [1, math.nan, 3, 4]}, "bbox .*4 finite numbers"),
        ({"bbox": [1, 2, 0, 4]}, "bbox .* height are above 0"),
        ({"bbox": [100, 2, 3, 4]}, "bbox .*, which must be inside its image of 40 x 30 pixels"),
        ({"bbox": [-5, 2, 10, 4]}, "bbox .*inside its image"),
        ({"bbox": [1, 2, 3, 40]}, r"bbox .*inside its image.*height\]\); correct or remove it"),
        ({"bbox": [20, 15, 30, 25]}, r"bbox .*inside.*height\], not \[x1, y1, x2, y2\]"),
        ({"bbox": [40, 2, 2, 4]}, "bbox .*inside its image"),
        ({"bbox": [-2, 2, 2, 4]}, "bbox .*inside its image"),
        ({"bbox": [2, 30, 4, 2]}, "bbox .*inside its image"),
        ({"bbox": [2, -2, 4, 2]}, "bbox .*inside its image"),
    ],
)
def test_a_bad_annotation_is_an_error_that_names_it(tmp_path, changes, message):
    match = rf"1 problem in .*train\.json:\s+annotation 1 .* has {message}"
    with pytest.raises(DatasetError, match=match):
        _register_with_first_annotation(tmp_path, **changes)


def test_an_object_of_one_pixel_is_no_fault(tmp_path):
    _register_with_first_annotation(tmp_path, bbox=[0, 0, 1, 1])


def test_many_crowds_are_said_and_crowds_alone_are_an_error(tmp_path, caplog):
    coco = _coco()
    coco["annotations"][0]["iscrowd"] = 1
    register_coco(*_write(tmp_path, coco))
    assert "1 of the 2 annotations of" in caplog.text and "marks crowds: they are" in caplog.text
    coco["annotations"][1]["iscrowd"] = 1
    with pytest.raises(DatasetError, match="1 problem in .*\\s+all 2 annotations have iscrowd 1, "):
        register_coco(*_write(tmp_path, coco, "all.json"))


def test_the_first_problems_and_their_number_are_reported_together(tmp_path):
    coco = _coco()
    coco["annotations"] += [_annotation(i, [0, 0, -1, 5], 10) for i in range(100, 108)]
    with pytest.raises(DatasetError) as error:
        register_coco(*_write(tmp_path, coco))
    lines = str(error.value).splitlines()
    assert lines[0].startswith("8 problems in ") and len(lines) == 7
    assert "annotation 100" in lines[1] and "annotation 104" in lines[5] and "..." in lines[6]


def test_a_missing_image_is_named_unless_the_check_is_left_out(tmp_path):
    json_file, image_root = _write(tmp_path, _coco())
    (image_root / "b.png").unlink()
    with pytest.raises(DatasetError, match=r"image 9: Image .*b\.png does not exist"):
        register_coco(json_file, image_root)
    register_coco(json_file, image_root, check_images=False)


def test_images_are_decoded_again_only_when_they_have_changed(tmp_path, caplog):
    files = _write(tmp_path, _coco())

    def register():
        """As a new process does; gives what that logs."""
        caplog.clear()
        with caplog.at_level("INFO"):
            DatasetCatalog.remove(register_coco(*files))
        return caplog.text

    image = files[1] / "b.png"
    assert "Checked the 2 images" in register() and "Checked" not in register()
    os.utime(image, (1, 1))
    assert "Checked the 2 images" in register() and "Checked" not in register()
    image.write_bytes(image.read_bytes()[:60])
    for _ in range(2):
        with pytest.raises(DatasetError, match="b.png cannot be decoded"):
            register()


def test_other_categories_than_in_training_are_an_error(tmp_path):
    coco = _coco()
    train, image_root = _write(tmp_path, coco)
    coco["categories"][0]["name"] = "bird"
    val, _ = _write(tmp_path, coco, "val.json")
    words = r"only the first has \['bird'\] and only the second has \['cat'\]:"
    for key, owner in (("categories_from", train), ("classes", ["dog", "cat"])):
        with pytest.raises(DatasetError, match=rf"val\.json and .* same categories, but {words}"):
            register_coco(val, image_root, **{key: owner})
    with pytest.raises(DatasetError, match=r"categories, but only the second has \['cow'\]:"):
        register_coco(val, image_root, classes=["bird", "dog", "cow"])
    for function in (num_classes, class_names, lambda paths: register_coco(paths, image_root)):
        with pytest.raises(DatasetError, match=r"val\.json and .*train\.json must have the same"):
            function([train, train, val])
    words = "gone.json, whose categories .*val.json has to have.*test.dataset.names.categories_from"
    with pytest.raises(DatasetError, match=words):
        register_coco(val, image_root, categories_from="gone.json")


# Required data sets


def test_missing_coco_is_an_error_that_names_the_path_and_the_variable(tmp_path, monkeypatch):
    # Detectron2 reads the variable when it is imported, so the path is changed here instead.
    coco = copy.copy(MetadataCatalog.get("coco_2017_train"))
    vars(coco)["json_file"] = str(tmp_path / "instances_train2017.json")
    monkeypatch.setitem(MetadataCatalog.data, "coco_2017_train", coco)
    with pytest.raises(DatasetError, match=r"instances_train2017\.json.*DETECTRON2_DATASETS"):
        require_dataset("coco_2017_train")


def test_a_missing_image_folder_of_a_required_data_set_is_an_error(tmp_path):
    json_file, image_root = _write(tmp_path, _coco())
    name = register_coco(json_file, image_root)
    image_root.rename(tmp_path / "moved")
    with pytest.raises(DatasetError, match=f"'{name}' needs the image folder"):
        require_dataset(name)
    with pytest.raises(DatasetError, match="'coco_2071_train' is not registered"):
        require_dataset("coco_2071_train")
