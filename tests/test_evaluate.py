"""The report on evaluated detectors, and its command line."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from PIL import Image

from helpers import (
    CLASS_NAMES,
    ODD_NAMES,
    full_disk,
    make_smca,
    write_coco,
    write_smca_config,
    write_weights,
)
from smca.analysis.evaluation import Evaluation, detect, load_truth
from smca.analysis.report import draw_confusion, worst_images, write_report
from smca.cli import evaluate as tool
from smca.data import register_coco
from smca.errors import UserError
from smca.inference import Predictor


@pytest.fixture
def data(tmp_path):
    """A data set of three images of noise with one or two objects: its name."""
    objects = [(4, 0), (5, 0), (5, 1), (6, 0)]  # image id, and number in the image
    annotations = [
        {
            "id": index,
            "image_id": image_id,
            "category_id": 10 + number,
            "bbox": [5 + 30 * number, 10, 20, 30],
            "area": 600,
            "iscrowd": 0,
        }
        for index, (image_id, number) in enumerate(objects, 1)
    ]
    paths, classes = (tmp_path / "data.json", tmp_path / "images"), enumerate(CLASS_NAMES, 10)
    content = write_coco(*paths, annotations, dict(classes), (4, 5, 6), (60, 80))
    return register_coco(*paths), content


class FixedDetector:
    """Finds the first object of every image, and something in the corner."""

    model = torch.nn.Linear(1, 1)
    class_names = CLASS_NAMES

    def __call__(self, image, *, threshold):
        assert threshold == 0
        return Instances(
            image.shape[:2],
            pred_boxes=Boxes(torch.tensor([[5.0, 10, 25, 40], [0.0, 0, 4, 4]])),
            scores=torch.tensor([0.9, 0.3]),
            pred_classes=torch.tensor([0, 2]),
        )


def evaluation_of(data, name="fixed", **kwargs):
    dataset, content = data
    dicts = DatasetCatalog.get(dataset)
    found, seconds = detect(FixedDetector(), dicts, [10, 11, 12])
    return Evaluation(name, load_truth(content), found, seconds, **kwargs), dicts


def test_detections_are_coco_results_with_the_data_sets_ids(data):
    found, seconds = detect(FixedDetector(), DatasetCatalog.get(data[0]), [10, 11, 12])
    assert len(found) == 6 and len(seconds) == 3
    assert found[0] == {
        "image_id": 4,
        "category_id": 10,
        "bbox": [5, 10, 20, 30],
        "score": pytest.approx(0.9),
    }
    assert found[1]["category_id"] == 12
    with pytest.raises(UserError, match="class of index 2, the data set only 2 classes"):
        detect(FixedDetector(), DatasetCatalog.get(data[0]), [10, 11])


def test_average_precision_is_that_of_detectron2s_evaluator(data, tmp_path):
    predictor = Predictor.from_model(
        make_smca(write_smca_config(tmp_path)), class_names=CLASS_NAMES
    )
    dicts = DatasetCatalog.get(data[0])
    evaluator = COCOEvaluator(data[0], distributed=False)
    evaluator.reset()
    found, _ = detect(predictor, dicts, [10, 11, 12])
    for item in dicts:
        instances = predictor(np.asarray(Image.open(item["file_name"])))
        evaluator.process([item], [{"instances": instances}])
    # A good detection, so that the numbers are not all zero.
    good = Instances(
        (60, 80),
        pred_boxes=Boxes(torch.tensor([[6.0, 10, 25, 40]])),
        scores=torch.tensor([1.5]),
        pred_classes=torch.tensor([0]),
    )
    evaluator.process([{"image_id": 4}], [{"instances": good}])
    found.append({"image_id": 4, "category_id": 10, "bbox": [6, 10, 19, 30], "score": 1.5})
    expected = evaluator.evaluate()["bbox"]
    assert expected["AP"] > 1
    actual = Evaluation("", load_truth(data[1]), found)
    for key in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
        assert actual.overall[key] == pytest.approx(expected[key], abs=1e-6, nan_ok=True)
    for category_id, name in zip((10, 11, 12), CLASS_NAMES):
        value = actual.classes[category_id]["AP"]
        assert value == pytest.approx(expected[f"AP-{name}"], abs=1e-6, nan_ok=True)


def test_an_evaluation_has_what_can_be_counted_by_hand(data):
    # Of the objects 4a, 5a, 5b, 6a those called "a" are found; the corner is false each time.
    evaluation, _ = evaluation_of(data)
    assert evaluation.threshold == pytest.approx(0.9) and evaluation.f1 == pytest.approx(600 / 7)
    assert evaluation.counts == {4: (1, 0, 0), 5: (1, 0, 1), 6: (1, 0, 0)}
    assert worst_images(evaluation, 8) == [5]
    low, _ = evaluation_of(data, threshold=0.1)
    assert low.counts == {4: (1, 1, 0), 5: (1, 1, 1), 6: (1, 1, 0)}
    assert low.f1 == pytest.approx(100 * 6 / 10)
    assert worst_images(low, 2) == [5, 4]
    assert low.confusion.tolist() == [[3, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 0, 3, 0]]
    (axes,) = draw_confusion([low]).axes
    numbers = {text.get_position(): text.get_text() for text in axes.texts}
    assert numbers == {(0, 0): "3", (3, 1): "1", (2, 3): "3"}  # (detected as, truth)


def test_the_page_needs_no_other_file(data, tmp_path):
    first, dicts = evaluation_of(data, "first")
    second, _ = evaluation_of(data, "second <b>", threshold=0.1)
    first.milliseconds, second.milliseconds = 300, 400
    paths = write_report([first, second], dicts, str(tmp_path / "report"), dataset="noise")
    text = (tmp_path / "report" / "report.html").read_text()
    addresses = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    for address in addresses:
        kind, _, content = address.partition(";base64,")
        magic = {"data:image/png": b"\x89PNG", "data:image/jpeg": b"\xff\xd8\xff\xe0"}[kind]
        assert base64.b64decode(content).startswith(magic)
    assert len(addresses) == 2 + 1 + 3  # curves, confusions, worst images
    assert "second &lt;b&gt;" in text and "second <b>" not in text
    ap = first.overall["AP"]
    best = '<td class="best">'  # of each row
    assert re.search(rf"<td>AP</td>\s*{best}{ap:.1f}</td>\s*{best}", text)
    assert re.search(rf"<td>F1</td>\s*{best}85.7</td>\s*<td>60.0", text)
    assert re.search(rf"<td>ms</td>\s*{best}300.0</td>\s*<td>400.0", text)
    html_file, json_file = paths
    assert html_file == str(tmp_path / "report" / "report.html")
    with open(json_file) as file:
        detector, _ = json.load(file, parse_constant=pytest.fail)["detectors"]
    assert detector["overall"]["AP"] == pytest.approx(ap)
    assert detector["overall"]["APl"] is None  # there are no large objects
    assert detector["confusion"]["truth_by_detection"][0] == [3, 0, 0, 0]
    assert detector["images"]["5"] == {"found": 1, "false": 0, "missed": 1}


def run_tool(data, folder, *arguments):
    config = write_smca_config(folder)
    weights = write_weights(folder, config)
    options = ["--config-file", config, "--output", str(folder / "out")]
    names = f"dataloader.test.dataset.names={data[0]}"
    command = [*options, "--weights", weights, *arguments, names]
    return tool.run(tool.get_parser().parse_intermixed_args(command))


def test_several_data_sets_are_refused(data, tmp_path):
    with pytest.raises(UserError, match="There are 2 sets of test data, a report is on one"):
        run_tool([f"[{data[0]},{data[0]}]"], tmp_path)


def test_the_command_writes_a_report_on_two_files_in_two_types(data, tmp_path, capsys, monkeypatch):
    dtypes = []

    def watch(predictor, *args, **kwargs):
        dtypes.append(predictor._amp_dtype)
        return detect(predictor, *args, **kwargs)

    monkeypatch.setattr(tool, "detect", watch)
    (tmp_path / "b").mkdir()
    other = write_weights(tmp_path / "b", write_smca_config(tmp_path))
    run_tool(data, tmp_path, other, "--max-images", "2", "--num-worst", "0",
             "--dtype", "fp32", "--dtype", "bf16")  # fmt: skip
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    whole, half, *others = report["detectors"]
    assert [len(d["images"]) for d in report["detectors"]] == [2] * 4
    assert len({d["name"] for d in report["detectors"]}) == 4
    assert whole["name"].endswith(", fp32") and half["name"] == whole["name"][:-4] + "bf16"
    for first, second in zip((whole, half), others):
        assert first["overall"] == second["overall"]
    assert dtypes == [None, torch.bfloat16] * 2
    assert whole["milliseconds_per_image"] > 0 and "AP50" in capsys.readouterr().out
    monkeypatch.setattr(tool, "write_report", full_disk)
    with pytest.raises(UserError, match="out cannot be written: No space"):
        run_tool(data, tmp_path, other)


def test_names_and_ids_of_the_report_are_the_data_sets_own(data, tmp_path):
    """Two detectors that have the classes in different orders, on images with large ids."""
    content = data[1]
    for category, name in zip(content["categories"], ODD_NAMES):
        category["name"] = name
    for image in content["images"]:
        image["id"] += 2**64
    for annotation in content["annotations"]:
        annotation["image_id"] += 2**64
    (tmp_path / "large.json").write_text(json.dumps(content))
    name = register_coco(tmp_path / "large.json", tmp_path / "images")
    config, folder = write_smca_config(tmp_path), tmp_path / "_$run$_{"
    folder.mkdir()
    model = make_smca(config)
    model.class_embed.bias.data[0] += 10  # so that a wrong order of the classes would show
    for order in ([0, 1, 2], [2, 0, 1]):
        weights = model.state_dict()
        for key in ("class_embed.weight", "class_embed.bias"):
            weights[key] = weights[key][order]
        names = [ODD_NAMES[index] for index in order]
        torch.save({"model": weights, "smca": {"class_names": names}}, folder / f"{order[0]}.pth")
    command = ["--weights", str(folder / "0.pth"), str(folder / "2.pth"), "--num-worst", "1"]
    command += ["--config-file", config, "--output", str(tmp_path / "out")]
    command += ["--confidence-threshold", "0", f"dataloader.test.dataset.names={name}"]
    tool.run(tool.get_parser().parse_intermixed_args(command))
    first, second = json.loads((tmp_path / "out" / "report.json").read_text())["detectors"]
    assert first["confusion"] == second["confusion"]
    detected, *_, last, _ = np.sum(first["confusion"]["truth_by_detection"], axis=0)
    assert detected > last and list(first["classes"]) == ODD_NAMES[:3]
    assert first["overall"] == pytest.approx(second["overall"], nan_ok=True)
    assert sorted(first["images"]) == [str(2**64 + number) for number in (4, 5, 6)]


@pytest.mark.parametrize(
    "count, names, words",
    [
        (2, None, "a.pth has other classes than the data set '.*', it has 2, the data 3 .*round"),
        (4, None, "it has 4, the data 3 .*round"),
        (3, ["cat", "round", "cow"], "2 only in the weights .cat, cow.; 2 only in the data .long"),
    ],
)
def test_weights_of_other_classes_are_refused_and_named(data, tmp_path, count, names, words):
    config = write_smca_config(tmp_path)
    model = instantiate({**LazyConfig.load(config).model, "num_classes": count})
    provenance = {"smca": {"class_names": names}} if names else {}
    torch.save({"model": model.state_dict(), **provenance}, tmp_path / "a.pth")
    command = ["--weights", str(tmp_path / "a.pth"), "--config-file", config]
    command += [f"dataloader.test.dataset.names={data[0]}", f"model.num_classes={count}"]
    with pytest.raises(UserError, match=words):
        tool.run(tool.get_parser().parse_intermixed_args(command))


def test_column_names_are_short_and_different():
    assert tool.column_names(["a/x.pth", "b/y.pth"]) == ["x", "y"]
    assert tool.column_names(["run/a/x.pth", "run/b/x.pth"]) == ["a/x", "b/x"]
    assert len(set(tool.column_names(["x.pth", "x.pth"]))) == 2
