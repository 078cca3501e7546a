"""Looking at a data set before training: problems, statistics, remarks, pictures, settings."""

import json
import math
import os
import shlex
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.utils.env import seed_all_rng
from PIL import Image

import check_data as tool
from helpers import ODD_NAMES, ROOT, write_smca_config
from smca import model_zoo
from smca.analysis import draw_instances
from smca.analysis.dataset import (
    Statistics,
    collect_statistics,
    draw_statistics,
    draw_training_images,
    examine,
    find_remarks,
)
from smca.analysis.recommendation import recommend
from smca.config import load_config
from smca.data import DatasetError, DetrDatasetMapper, detr_augmentations
from smca.errors import UserError
from smca.modeling.weight_map import Modulation, WeightMapPredictor


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SMCA_CACHE", str(tmp_path / "cache"))


def annotation(id, image_id, category_id, bbox, **more):
    return {"id": id, "image_id": image_id, "category_id": category_id, "bbox": bbox, **more}


def write_data(folder, *annotations, num_images=3, seed=0):
    """Images 1, 2, ... of 80 x 60 pixels of noise, categories 5 (dog) and 9 (cat): the paths."""
    image_root = folder / "images"
    image_root.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    images = []
    for image_id in range(1, num_images + 1):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(image_root / f"{image_id}.png")
        name = f"{image_id}.png"
        images.append({"id": image_id, "file_name": name, "height": 60, "width": 80})
    categories = [{"id": 9, "name": "cat"}, {"id": 5, "name": "dog"}]
    content = {"images": images, "annotations": list(annotations), "categories": categories}
    (folder / "data.json").write_text(json.dumps(content))
    return str(folder / "data.json"), str(image_root)


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
    path = f"{image_root}/3.png"
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])


# Problems


def test_all_problems_are_found_and_the_rest_is_usable(tmp_path):
    json_file, image_root = write_data(tmp_path, *GOOD, *BAD)
    break_an_image(image_root)
    split = examine(json_file, image_root)
    assert tool.count_kinds(split) == {
        "annotation: bbox without area": 2,
        "annotation: bbox outside the image": 1,
        "annotation: unknown category_id": 1,
        "annotation: unknown image_id": 1,
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


def test_images_need_not_be_decoded(tmp_path):
    json_file, image_root = write_data(tmp_path, *GOOD)
    break_an_image(image_root)
    assert not examine(json_file, image_root, check_images=False).problems


def test_progress_goes_over_every_image(tmp_path):
    seen = []

    def progress(items, total):
        seen.append(total)
        for item in items:
            seen.append(item)
            yield item

    examine(*write_data(tmp_path, *GOOD), progress=progress)
    assert seen == [3, None, None, None]


def test_a_file_that_is_no_json_is_an_error(tmp_path):
    (tmp_path / "data.json").write_text("{")
    with pytest.raises(DatasetError, match="data.json is not a JSON file"):
        examine(str(tmp_path / "data.json"), str(tmp_path))
    json_file, image_root = write_data(tmp_path, *GOOD)
    with pytest.raises(DatasetError, match="image folder .*data.json is a file"):
        examine(json_file, json_file)


# Statistics


def test_statistics_counted_by_hand(tmp_path):
    statistics = collect_statistics(examine(*write_data(tmp_path, *GOOD)))
    assert statistics.objects_per_image.tolist() == [2, 1, 0]  # without the crowd
    assert statistics.objects_per_class.tolist() == [1, 2]
    assert statistics.sizes.tolist() == [20, 20, 20]
    assert statistics.image_sizes.tolist() == [[80, 60]] * 3
    assert statistics.scaled_sizes(120).tolist() == [40, 40, 40]
    assert statistics.scaled_sizes(120, max_size=80).tolist() == [20, 20, 20]
    summary = statistics.to_json()
    assert summary["objects_of_classes"] == {"dog": 1, "cat": 2}
    assert summary["percentiles_5_25_50_75_95"]["object_width_by_height"][2] == 1


def test_images_of_several_sizes_are_scaled_each_by_its_own_factor():
    statistics = statistics_of([20, 20, 20], image_size=(80, 60), per_image=1)
    statistics.image_sizes[1] = 160, 120
    statistics.image_sizes[2] = 60, 30
    assert statistics.scaled_sizes(60).tolist() == [20, 10, 40]
    percentiles = statistics.to_json()["percentiles_5_25_50_75_95"]
    assert (percentiles["image_width"][2], percentiles["image_height"][2]) == (80, 60)


@pytest.mark.parametrize("count", [19, 20])
def test_a_class_of_fewer_than_20_objects_is_remarked(tmp_path, count):
    objects = [annotation(i, 1, 5, [0, 0, 9, i]) for i in range(1, count + 1)]
    remarks = find_remarks({"train": examine(*write_data(tmp_path, *objects))})
    few = ["train: class 'dog' has 19 objects."] if count == 19 else []
    assert [line for line in remarks if "class" in line] == [
        *few,
        "train: class 'cat' has 0 objects.",
    ]


def test_remarks_name_what_may_not_be_meant(tmp_path):
    repeated = [annotation(10 + i, 1, 9, [3, 3, 5, 5]) for i in range(2)]
    train = examine(*write_data(tmp_path / "a", *GOOD[:2], *repeated))
    val = examine(*write_data(tmp_path / "b", *GOOD[2:3], num_images=1, seed=1))
    Image.open(tmp_path / "a" / "images" / "2.png").save(tmp_path / "b" / "images" / "1.png")
    val.dataset_dicts[0]["annotations"] = [{"bbox": [0, 0, 10, 40], "category_id": 1, "iscrowd": 0}]
    val.dataset_dicts[0]["annotations"][0]["bbox_mode"] = 1
    remarks = "\n".join(find_remarks({"train": train, "val": val}))
    assert "train: 2 images without objects." in remarks
    assert "train: class 'dog' has 1 object." in remarks
    assert "train: 1 object annotated more than once with the same box, such as [3, 3, 5, 5]" in (
        remarks
    )
    assert "val: class 'dog' has 0 objects." in remarks and "val: class 'cat'" not in remarks
    (same,) = [line for line in remarks.splitlines() if "same picture" in line]
    assert "a/images/2.png" in same and "b/images/1.png" in same


def test_images_of_more_than_8_bits_are_remarked_with_how_they_are_read(tmp_path):
    split = examine(*write_data(tmp_path, *GOOD))
    for item, bits in zip(split.dataset_dicts[:2], (12, 16)):
        levels = np.full((item["height"], item["width"]), 2**bits - 1, dtype=np.uint16)
        Image.fromarray(levels).save(item["file_name"])
    remarks = [line for line in find_remarks({"train": split}) if "8 bits" in line]
    *counts, mixed = remarks
    assert counts == [
        f"train: 1 image of more than 8 bits, levels from 0 to {2**bits - 1} ({bits} bits) are "
        "read as 0 to 255."
        for bits in (12, 16)
    ]
    assert mixed.startswith("train: images of more than 8 bits are read by different levels: scale")


def test_files_that_train_together_are_counted_together(tmp_path):
    paths = [
        write_data(tmp_path / name, *(annotation(i, 1, 5, [0, 0, 9, i]) for i in range(1, 13)))
        for name in ("a", "b")
    ]
    first, second = (examine(*each) for each in paths)
    together = collect_statistics(first, second)
    assert together.objects_per_image.tolist() == [12, 0, 0, 12, 0, 0]
    assert together.images.tolist() == [0] * 12 + [3] * 12
    assert together.objects_per_class.tolist() == [24, 0]
    remarks = find_remarks({"train 1": first, "train 2": second, "val": first})
    assert [remark for remark in remarks if "class" in remark] == [
        "train: class 'cat' has 0 objects.",
        "val: class 'cat' has 0 objects.",
    ]


# Settings


def statistics_of(sizes, image_size=(138, 138), per_image=5):
    """Square objects of these sizes, some in each image."""
    count = math.ceil(len(sizes) / per_image)
    return Statistics(
        class_names=["thing"],
        image_sizes=np.tile(image_size, (count, 1)),
        objects_per_image=np.full(count, per_image),
        classes=np.zeros(len(sizes), dtype=int),
        boxes=np.array([(0, 0, size, size) for size in sizes], dtype=float),
        images=np.arange(len(sizes)) // per_image,
    )


def values(advice):
    return {item.setting: item.value for item in advice}


# As the textured shapes: small objects of 27 pixels, large ones of 67, in images of 138.
LIKE_SHAPES = np.linspace(22, 72, 101)


@pytest.mark.parametrize("num_scales, beta", [(1, 2.0), (3, 0.5)])
def test_objects_as_in_the_study_get_its_best_settings(num_scales, beta):
    advice = values(recommend(statistics_of(LIKE_SHAPES), 8, num_scales))
    assert advice["model.decoder.modulation.beta"] == beta
    assert advice["short_sides"] == 128 and advice["model.num_queries"] == 40
    assert "one of stride 8" in advice["scales"]


def test_one_scale_in_place_of_three_is_said_with_its_own_beta():
    statistics = statistics_of(np.full(50, 100), image_size=(400, 400))
    three, one = (recommend(statistics, 16, num_scales) for num_scales in (3, 1))
    assert (
        f"model.decoder.modulation.beta={values(one)['model.decoder.modulation.beta']}."
        in three[-1].reason
    )
    assert "model.decoder.modulation.beta" not in one[-1].reason


@pytest.mark.parametrize("num_scales", [1, 3])
@pytest.mark.parametrize("size", [60, 100])
def test_beta_starts_the_models_maps_at_a_third_of_a_small_object(size, num_scales):
    stride = 16
    statistics = statistics_of(np.full(50, size), image_size=(400, 400))
    advice = values(recommend(statistics, stride, num_scales))
    small = size * advice["short_sides"] / 400
    # As the model is built, before its first step.
    beta = advice["model.decoder.modulation.beta"]
    sizes = dict(embed_dim=8, num_heads=1, num_scales=num_scales)
    modulation = WeightMapPredictor(Modulation(beta=beta), **sizes)
    scales = [SimpleNamespace(stride=stride << index, size=(9, 9)) for index in range(num_scales)]
    finest = modulation(torch.randn(1, 1, 8), torch.zeros(1, 1, 2), scales)[0]
    radius = stride / math.sqrt(2 * finest.precisions[0, 0, 0, 0].item())
    assert radius == pytest.approx(small / 3, rel=0.15)


def test_objects_of_many_sizes_need_several_scales():
    sizes = np.geomspace(60, 500, 100)
    assert values(recommend(statistics_of(sizes, (1000, 800)), 16, 3))["scales"] == "several"


def test_tiny_objects_need_the_fine_scale_and_the_largest_images():
    advice = recommend(statistics_of(np.full(20, 8.0), (1600, 1200)), 16, 3)
    assert values(advice)["short_sides"] == 800
    assert values(advice)["scales"] == "several, from stride 8"
    assert "cost too much" in next(a.reason for a in advice if a.setting == "short_sides")


def test_a_class_of_small_objects_is_named():
    statistics = statistics_of(np.where(np.arange(400) % 20 == 0, 10, LIKE_SHAPES.mean()))
    statistics.class_names = ["cell", "platelet"]
    statistics.classes = (statistics.sizes == 10).astype(int)
    (reason,) = [a.reason for a in recommend(statistics, 8, 1) if a.setting == "short_sides"]
    assert "Objects of the class 'platelet' become only 9 pixels" in reason


def test_queries_cover_the_fullest_image():
    crowded = statistics_of(np.full(180, 50.0), (1000, 800), per_image=90)
    assert values(recommend(crowded, 16, 3))["model.num_queries"] == 130


def test_without_objects_there_is_no_advice():
    assert recommend(statistics_of([]), 16, 3) == []


# Pictures and command line


def test_the_class_with_most_objects_is_drawn_first(tmp_path):
    train, val = (collect_statistics(examine(*write_data(tmp_path / split, *objects)))
                  for split, objects in (("train", GOOD), ("val", GOOD[:1])))  # fmt: skip
    classes = draw_statistics({"train": train, "val": val}).axes[0]
    assert [label.get_text() for label in classes.get_yticklabels()] == ["cat", "dog"]
    widths = [[bar.get_width() for bar in bars] for bars in classes.containers]
    assert widths == [[2, 1], [0, 1]]


def test_names_of_classes_and_files_are_no_formulas(tmp_path):
    json_file, image_root = write_data(tmp_path, *GOOD)
    text = Path(json_file).read_text().replace('"cat"', json.dumps(ODD_NAMES[0]))
    Path(json_file).write_text(text)
    os.rename(f"{image_root}/1.png", f"{image_root}/$1$_{{.png")
    Path(json_file).write_text(text.replace('"1.png"', '"$1$_{.png"'))
    assert run_tool("--json", json_file, "--images", image_root, "--output", tmp_path / "out") == 0


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


def test_colors_of_a_bgr_mapper_are_turned_back(tmp_path):
    split = examine(*write_data(tmp_path, *GOOD))
    sheets = []
    for image_format in ("RGB", "BGR"):
        mapper = DetrDatasetMapper(True, [T.Resize((480, 640))], image_format=image_format)
        figure = draw_training_images(mapper, split, 1, image_format=image_format)
        sheets.append(figure.axes[0].images[0].get_array())
    assert (sheets[0] == sheets[1]).all()


def run_tool(*arguments):
    return tool.main([str(argument) for argument in arguments])


def test_the_command_counts_problems_and_writes_its_files(tmp_path, capsys):
    json_file, image_root = write_data(tmp_path, *GOOD, *BAD, *(
        annotation(20 + i, 1, 5, [0, 0, 0, i]) for i in range(4)))  # fmt: skip
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command, "--num-examples", 2) == 1
    out = capsys.readouterr().out
    assert "9 problems" in out and "6 x annotation: bbox without area" in out
    assert "annotation 5 (of image 1) has bbox [0, 0, 0, 20]" in out and "..." in out
    assert "annotation 20 " not in out  # the third example
    assert "model.decoder.modulation.beta = " in out
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"check.json", "statistics.png", "training_images.jpg"}
    check = json.loads((tmp_path / "out" / "check.json").read_text(), parse_constant=pytest.fail)
    assert check["splits"]["train"]["problems"]["annotation: unknown image_id"] == 1
    assert check["splits"]["train"]["statistics"]["objects"] == 3
    for name in names - {"check.json"}:
        Image.open(tmp_path / "out" / name).load()


def test_the_printed_overrides_do_what_the_advice_says(tmp_path, capsys):
    json_file, image_root = write_data(tmp_path, *GOOD)
    config = str(ROOT / "configs" / "custom_coco.py")
    data = [f"data.{split}_json={json_file}" for split in ("train", "val")]
    data += [f"data.{split}_images={image_root}" for split in ("train", "val")]
    run_tool("--config-file", config, "--output", tmp_path / "out", "--no-decode", *data)
    pasted = capsys.readouterr().out.partition("As overrides:")[2].partition("Written:")[0]
    cfg = load_config(config, [*data, *shlex.split(pasted.replace("\\\n", " "))])
    advice = json.loads((tmp_path / "out" / "check.json").read_text())["advice"]
    value = {item["setting"]: item["value"] for item in advice}
    assert cfg.model.num_queries == value["model.num_queries"]
    assert cfg.model.decoder.modulation.beta == value["model.decoder.modulation.beta"]
    item = {"file_name": f"{image_root}/1.png", "height": 60, "width": 80, "image_id": 1}
    train, test = (instantiate(cfg.dataloader[split].mapper) for split in ("train", "test"))
    shapes = [train({**item, "annotations": []})["image"].shape for _ in range(9)]
    shapes.append(test(dict(item))["image"].shape)
    assert {min(shape[1:]) for shape in shapes} == {value["short_sides"]}


def test_an_output_that_cannot_be_written_is_said_before_anything_is_read(tmp_path, monkeypatch):
    json_file, image_root = write_data(tmp_path)
    (tmp_path / "out").touch()
    monkeypatch.setattr(tool, "examine", None)
    with pytest.raises(UserError, match="out cannot be written: File exists"):
        tool.main(["--json", json_file, "--images", image_root, "--output", str(tmp_path / "out")])


def test_a_good_data_set_has_the_exit_code_0(tmp_path, capsys):
    json_file, image_root = write_data(tmp_path, *GOOD)
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command, "--no-decode") == 0
    assert "0 problems" in capsys.readouterr().out
    assert not (tmp_path / "out" / "training_images.jpg").exists()


def test_a_data_set_without_objects_is_only_reported(tmp_path):
    json_file, image_root = write_data(tmp_path)
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command) == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["check.json"]
    check = json.loads((tmp_path / "out" / "check.json").read_text())
    assert f"train: {json_file} has no objects: there is nothing" in "".join(check["remarks"])


@pytest.mark.parametrize(
    "objects, words",
    [
        ([annotation(1, 1, 5, [0.1, 0.2, 0.3, 0.4])], "1 x annotation: bbox from 0 to 1"),
        ([annotation(1, 1, 5, [0, 0, 9, 9], area=math.nan)], "has area nan, which must be"),
        ([annotation(1, 1, 5, [0, 0, 9, 9], iscrowd=1)], "have iscrowd 1, which marks crowds"),
    ],
)
def test_what_training_stops_at_is_a_problem(tmp_path, capsys, objects, words):
    json_file, image_root = write_data(tmp_path, *objects)
    command = ["--json", json_file, "--images", image_root, "--output", tmp_path / "out"]
    assert run_tool(*command) == 1
    out = capsys.readouterr().out
    assert words in out and "; 1 problems" in out


def test_both_splits_of_a_config_are_checked(tmp_path, capsys):
    first = write_data(tmp_path / "a", *GOOD)
    second = write_data(tmp_path / "b", *BAD, seed=1)
    overrides = [
        f"data.train_json=[{first[0]},{first[0]}]",
        f"data.train_images={first[1]}",
        f"data.val_json={second[0]}",
        f"data.val_images={second[1]}",
    ]
    config = ROOT / "configs" / "custom_coco.py"
    assert run_tool("--config-file", config, "--output", tmp_path / "out", *overrides) == 1
    check = json.loads((tmp_path / "out" / "check.json").read_text())
    assert list(check["splits"]) == ["train 1", "train 2", "val"]
    assert not check["splits"]["train 2"]["problems"]
    assert sum(check["splits"]["val"]["problems"].values()) == 5


def test_the_advice_is_on_all_files_that_train(tmp_path, capsys):
    crowded = [annotation(i, 1, 5, [0, 0, 9, i / 2]) for i in range(1, 91)]
    first, second = write_data(tmp_path / "a", *GOOD), write_data(tmp_path / "b", *crowded)
    config, out = ROOT / "configs" / "custom_coco.py", tmp_path / "out"
    overrides = [
        f"data.train_json=[{first[0]},{second[0]}]",
        f"data.train_images=[{first[1]},{second[1]}]",
        f"data.val_json={first[0]}",
        f"data.val_images={first[1]}",
    ]
    run_tool("--config-file", config, "--output", out, "--no-decode", *overrides)
    check = json.loads((out / "check.json").read_text())
    (queries,) = [a["value"] for a in check["advice"] if a["setting"] == "model.num_queries"]
    assert queries == 130
    assert "train: class 'cat' has 2 objects." in check["remarks"]
    assert not [remark for remark in check["remarks"] if "'dog'" in remark and "train" in remark]


def test_options_that_contradict_are_refused(tmp_path):
    with pytest.raises(UserError, match="--json together with --images"):
        run_tool("--json", "a.json")
    with pytest.raises(UserError, match="--json together with --images"):
        run_tool("--json", "a.json", "--images", "b", "--config-file", write_smca_config(tmp_path))


@pytest.mark.parametrize(
    "config, expected",
    [
        ("smca_r50_50ep", (16, 3, 16)),
        ("smca_single_scale_r50_50ep", (32, 1, 32)),
        ("smca_shapes", (8, 1, 8)),
        ("smca_conv_r50_50ep", (8, 4, 16)),
    ],
)
def test_strides_and_the_number_of_scales_are_the_models(config, expected):
    assert tool.scales_of(model_zoo.get_config(config).model) == expected


def test_a_dilated_stage_keeps_its_stride():
    model = model_zoo.get_config("smca_single_scale_r50_50ep").model
    model.backbone.dilated_res5 = True
    assert tool.scales_of(model) == (16, 1, 16)


def test_the_convolutional_model_has_beta_for_the_scale_that_its_decoder_reads():
    statistics = statistics_of(np.full(50, 100), image_size=(400, 400))
    conv, same = recommend(statistics, 8, 4, map_stride=16), recommend(statistics, 8, 4)
    # The finest has a radius of sqrt(16 beta stride) pixels.
    assert values(same)["model.decoder.modulation.beta"] == pytest.approx(
        2 * values(conv)["model.decoder.modulation.beta"], rel=0.3
    )
    assert "at stride 16" in conv[2].reason and "in_features" not in conv[3].reason


def test_a_config_of_small_images_is_told_to_let_them_grow():
    sizes = np.full(50, 40)
    advice = recommend(statistics_of(sizes, (640, 480)), 8, 1, max_size=256)
    assert advice[1].overrides[-1] == "dataloader.test.mapper.augmentations.max_size=1333"
    assert values(advice) == values(recommend(statistics_of(sizes, (640, 480)), 8, 1))
