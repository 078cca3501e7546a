import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

import draw_training as tool
from helpers import CLASS_NAMES, make_smca, write_image, write_smca_config
from smca.analysis import (
    LayerRecord,
    ModulationStatistics,
    NoModulationError,
    Recorder,
    collect,
    collect_examples,
    draw_examples,
    draw_training,
    modulation_maps,
    summarize,
)
from smca.errors import UserError, exit_code
from smca.inference import Predictor
from smca.modeling.weight_map import MAPS


def make_record(head_centers, precisions, strides=(8,), scale_weights=None, spread=None):
    """Of one query on an input of 80 x 40 pixels; head_centers and precisions are (L, H', ...).
    The spreads are the precisions' roots."""
    spread = spread or ("covariance" if len(precisions[0][0]) == 3 else "independent")
    weight_maps = [
        MAPS[spread](
            centers=torch.tensor(centers)[None, :, None],
            spreads=torch.tensor(p).sqrt()[None, :, None],
            factor=1.0,
            size=(5, 10),
        )
        for centers, p in zip(head_centers, precisions)
    ]
    weights = None if scale_weights is None else torch.tensor(scale_weights)[None, None]
    center, image_sizes = torch.tensor([[[40.0, 10.0]]]), torch.tensor([[80.0, 40.0]])
    return LayerRecord(0, 1, weight_maps, center, list(strides), image_sizes, weights)


def statistics_of(record, size, box=(0.0, 0.0, 10.0, 10.0)):
    return ModulationStatistics.of_image(record, torch.tensor([0]), torch.tensor([box]), size)


def make_statistics(boxes, head_centers, **changes):
    """Radii are half the boxes."""
    boxes, head_centers = np.array(boxes, dtype=float), np.array(head_centers, dtype=float)
    radii = np.repeat((boxes[:, None, 2:] - boxes[:, None, :2]) / 2, head_centers.shape[1], axis=1)
    values = dict(strides=[8], boxes=boxes, head_centers=head_centers, head_radii=radii)
    return ModulationStatistics(**{**values, **changes})


# Where heads look


def test_cells_of_the_models_input_become_pixels_of_the_original_image():
    # The original is twice as wide as the input and three times as high.
    record = make_record([[[2.0, 3.0], [0.0, 1.0]]], [[[0.5, 0.125], [2.0, 0.5]]])
    statistics = statistics_of(record, size=(120, 160))
    assert statistics.head_centers.tolist() == [[[32, 72], [0, 24]]]
    # 1 / sqrt(2 p) is 1 and 2 cells for the one head, 0.5 and 1 for the other.
    assert statistics.head_radii[0] == pytest.approx(np.array([[16, 48], [8, 24]]))
    assert statistics.scale_weights is None


@pytest.mark.parametrize(
    "spread, precision, expected",
    [
        ("independent", [0.02, 0.005], (5, 10)),
        ("covariance", [0.02, 0.005, 7.0], (5, 10)),
        # (a_xy dy)^2 + (a_y dy)^2 = (0.0018 + 0.0032) dy^2
        ("rotated", [0.02, 0.0032, 0.0018], (5, 10)),
        ("laplacian", [0.01, 0.0025], (5, 10)),
    ],
)
def test_along_the_axes_a_map_has_fallen_to_exp_minus_half_at_its_radius(
    spread, precision, expected
):
    record = make_record([[[30.0, 20.0]]], [[precision]], strides=(1,), spread=spread)
    rx, ry = (float(r) for r in statistics_of(record, size=(40, 80)).head_radii[0, 0])
    assert (rx, ry) == pytest.approx(expected)
    (weight_map,) = record.weight_maps
    for x, y in ((30 + rx, 20), (30 - rx, 20), (30, 20 + ry), (30, 20 - ry)):
        log_weight = weight_map.log_weights(torch.tensor([float(x)]), torch.tensor([float(y)]))
        assert float(log_weight) == pytest.approx(-0.5, rel=1e-5)


def test_scales_count_by_their_weights():
    heads, precisions = [[[4.0, 2.0]], [[1.0, 1.0]]], [[[0.5, 0.5]], [[0.5, 0.5]]]
    record = make_record(heads, precisions, strides=(8, 16), scale_weights=[0.75, 0.25])
    statistics = statistics_of(record, size=(40, 80))
    # At (32, 16) and (16, 16) pixels.
    assert statistics.head_centers[0, 0] == pytest.approx([28, 16])
    assert statistics.scale_weights.tolist() == [[0.75, 0.25]]


# Numbers


BOX = [10, 20, 30, 60]  # of center (20, 40), half 10 x 20


def test_a_distance_is_less_than_one_inside_the_box():
    heads = [[[20, 40], [25, 40], [20, 59], [29.9, 21], [35, 40], [15, 70]]]
    distances = make_statistics([BOX], heads).head_distances[0]
    assert distances == pytest.approx([0, 0.5, 0.95, 0.99, 1.5, 1.5])


def test_heads_lie_apart_in_boxes():
    # Two heads half a width to the left and to the right of their mean, wherever that is.
    assert make_statistics([BOX], [[[80, 0], [100, 0]]]).head_deviations == pytest.approx([0.5])
    # A quarter of the height up and down.
    assert make_statistics([BOX], [[[5, 10], [5, 30]]]).head_deviations == pytest.approx([0.25])
    # Of four heads two at the mean: the mean square halves.
    heads = [[[10, 0], [0, 0], [0, 0], [-10, 0]]]
    assert make_statistics([BOX], heads).head_deviations == pytest.approx([0.5 / math.sqrt(2)])


def squares(*sides):
    return [[0, 0, side, side] for side in sides]


def test_thirds_are_of_the_objects_by_size():
    sides = [60, 10, 40, 20, 30, 50]
    weights = np.array([[side / 100, 1 - side / 100] for side in sides])
    heads = [[[0, 0]]] * 6
    radii = np.repeat(np.array(sides, dtype=float)[:, None, None], 2, axis=2) * 3
    statistics = make_statistics(
        squares(*sides), heads, strides=[8, 16], scale_weights=weights, head_radii=radii
    )
    sizes = summarize(statistics)["sizes"]
    assert list(sizes) == ["small", "medium", "large"]
    assert [size["sqrt_area"] for size in sizes.values()] == [[10, 20], [30, 40], [50, 60]]
    assert [size["half_size"] for size in sizes.values()] == [7.5, 17.5, 27.5]
    assert [size["radius"] for size in sizes.values()] == [45, 105, 165]
    assert [size["scale_weights"] for size in sizes.values()] == [
        {"8": 0.15, "16": 0.85},
        {"8": 0.35, "16": 0.65},
        {"8": 0.55, "16": 0.45},
    ]


def test_the_summary_has_quartiles_and_the_share_inside():
    centers = np.array([[20 + 10 * d, 40] for d in (0, 0.2, 0.4, 0.6, 2)])
    heads = np.stack([centers, centers + [10, 0]], axis=1)  # 1 to the right of that
    summary = summarize(make_statistics([BOX] * 5, heads))
    assert summary["num_objects"] == 5
    assert summary["head_center_distance"] == pytest.approx([0.45, 1.1, 1.55])
    assert summary["head_centers_inside"] == 0.4
    assert summary["head_deviation"] == [0.25, 0.25, 0.25]


# A model's queries


@pytest.fixture(scope="module")
def predictor(tmp_path_factory):
    config = write_smca_config(tmp_path_factory.mktemp("model"), "smca")
    return Predictor.from_model(make_smca(config), class_names=CLASS_NAMES)


def make_item(folder, boxes, classes, seed=0, **crowds):
    path = folder / f"{seed}.png"
    image = write_image(path, seed=seed)
    annotations = [
        {"bbox": list(map(float, box)), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(index)}
        for box, index in zip(boxes, classes)
    ]
    item = {"file_name": str(path), "height": 90, "width": 120, "annotations": annotations}
    return item, image


def predicted(predictor, image, query):
    """Box and best class of a query, found among the detections."""
    found = predictor(image, threshold=0)
    index = (found.query_indices == query).nonzero()[0, 0]  # best first
    return found.pred_boxes.tensor[index].tolist(), int(found.pred_classes[index])


def test_an_object_belongs_to_the_query_that_predicts_it(predictor, tmp_path):
    image = write_image(tmp_path / "image.png")
    queries = [4, 1]
    boxes, classes = zip(*(predicted(predictor, image, query) for query in queries))
    item, image = make_item(tmp_path, boxes, classes)
    expected = {
        d.query: d for d in modulation_maps(predictor, image, lambda i: range(len(i)), layer=0)
    }
    expected = [expected[query] for query in queries]

    examples = collect_examples(predictor, [item], layer=0)
    assert {e.query for e in examples} == set(queries)

    statistics = collect(predictor, [item], layer=0)
    order = np.argsort([boxes.index(tuple_of(box, boxes)) for box in statistics.boxes])
    to_original = 120 / 384  # from the picture's pixels
    for name, values in (
        ("head_centers", [to_original * d.mean_head_centers() for d in expected]),
        ("scale_weights", [d.scale_weights for d in expected]),
    ):
        assert getattr(statistics, name)[order] == pytest.approx(np.array(values), abs=1e-3), name


def tuple_of(box, boxes):
    """The one of `boxes` that equals `box`."""
    return min(boxes, key=lambda other: np.abs(np.array(other) - box).max())


def test_crowds_and_boxes_without_area_are_no_objects(predictor, tmp_path):
    boxes = [[5, 5, 30, 40], [0, 0, 120, 90], [7, 7, 7, 30]]
    item, _ = make_item(tmp_path, boxes, [0, 1, 2])
    item["annotations"][1]["iscrowd"] = 1
    empty, more = (make_item(tmp_path, squares(*sides), [0] * len(sides), seed)[0]
                   for seed, sides in ((1, []), (2, range(10, 90, 10))))  # fmt: skip
    statistics = collect(predictor, [empty, item, more])
    assert statistics.boxes[0].tolist() == [5, 5, 30, 40]
    assert statistics.head_radii.shape == (1 + 6, 2, 2)  # six queries
    assert statistics.scale_weights.shape == (1 + 6, 3)


def test_examples_are_the_largest_objects_of_an_image_that_has_enough(predictor, tmp_path):
    items = [
        make_item(tmp_path, squares(*sides), [0, 1, 2, 0][: len(sides)], seed)[0]
        for seed, sides in enumerate(([80], [10, 60, 20, 40], [30, 31, 32, 33, 34]))
    ]
    sides = [e.box[2] * 120 / 384 for e in collect_examples(predictor, items, num_objects=3)]
    assert sides == pytest.approx([60, 40, 20])


def test_errors_say_what_is_missing(predictor, tmp_path):
    item, _ = make_item(tmp_path, [BOX], [0])
    with pytest.raises(UserError, match="no decoder layer 2, the model has 2"):
        collect(predictor, [item], layer=2)
    with pytest.raises(UserError, match="class 3, the model has 3"):
        collect(predictor, [make_item(tmp_path, [BOX], [3])[0]])
    with pytest.raises(UserError, match="no objects"):
        collect(predictor, [make_item(tmp_path, [], [])[0]])
    with pytest.raises(NoModulationError, match="modulation=null"):
        Recorder(make_smca(write_smca_config(tmp_path, "detr")))


# Pictures


def test_the_panels_show_the_summaries_over_the_steps():
    def at_distance(d):
        heads = [[[20 + 10 * d, 40], [20 + 10 * d, 40 + 20]]] * 3
        weights = np.array([[0.1, 0.9], [0.2, 0.8], [0.7, 0.3]])
        boxes = [[20 - w, 40 - h, 20 + w, 40 + h] for w, h in ((10, 20), (20, 40), (40, 80))]
        return make_statistics(boxes, heads, strides=[8, 16], scale_weights=weights)

    figure = draw_training({100: at_distance(0.8), 200: at_distance(0.4)})
    panels = {axes.get_title(): axes.lines for axes in figure.axes}
    centers, edge = panels["Do centers settle on their objects?"]
    assert centers.get_xydata() == pytest.approx(np.array([[100, 0.45], [200, 0.325]]))
    assert edge.get_ydata() == [1, 1]
    # The second head is on the first box's edge, the third's distances are less than the second's.
    (inside,) = panels["Are they inside the boxes?"]
    assert inside.get_ydata() == pytest.approx([500 / 6] * 2, abs=0.01)
    # Radii are half the boxes: each line lies on the dotted one of its size.
    medians = [line.get_ydata()[0] for line in panels["Do maps fit the objects?"]]
    assert medians == [15, 30, 60, 15, 30, 60]
    weights = [[line.get_ydata().tolist() for line in lines] for title, lines in panels.items()
               if "pixels)" in title]  # fmt: skip
    assert weights == [
        [[0.1, 0.1], [0.9, 0.9]],
        [[0.2, 0.2], [0.8, 0.8]],
        [[0.7, 0.7], [0.3, 0.3]],
    ]
    plain = draw_training({1: make_statistics([BOX], [[[20, 40]]])})  # one head, no such weights
    titles = {axes.get_title() for axes in plain.axes}
    assert "Do heads differ?" in panels and "Do heads differ?" not in titles and len(titles) == 3


def test_examples_have_a_row_an_object_and_a_column_a_step(predictor, tmp_path):
    item, _ = make_item(tmp_path, squares(20, 40), [0, 1])
    examples = collect_examples(predictor, [item])
    figure = draw_examples(dict.fromkeys(range(10, 110, 10), examples), CLASS_NAMES)
    assert len(figure.axes) == 2 * 6  # of ten steps six, the first and the last among them
    titles = [axes.get_title() for axes in figure.axes[:6]]
    assert "10 steps" in titles[0] and "100 steps" in titles[5] and "square" in titles[0]
    for axes, example in zip(figure.axes[::6], examples, strict=True):
        *heads, center = (line.get_xydata()[0] for line in axes.lines)
        assert center == pytest.approx(example.center)
        assert heads == pytest.approx(example.mean_head_centers())
        opacity = np.asarray(axes.images[1].get_array())[..., 3]
        expected = np.max([0.8 * m**0.6 for m in example.combined()], axis=0)
        assert opacity == pytest.approx(expected, abs=1e-5)


# The command


def command(*args):
    return exit_code(tool.run, tool.get_parser().parse_intermixed_args(map(str, args)))


@pytest.fixture
def data(tmp_path):
    """The name of a data set of two images."""
    items = [make_item(tmp_path, squares(20, 40, 60), [0, 1, 2], seed)[0] for seed in range(2)]
    DatasetCatalog.register("tiny_statistics", lambda: items)
    return "dataloader.test.dataset.names=tiny_statistics"


def write_training(folder, base="smca"):
    """Weights of steps 10 and 20, and the final ones, which are the latter."""
    run = folder / "run"
    run.mkdir()
    config = write_smca_config(folder, base)
    LazyConfig.save(LazyConfig.load(config), str(run / "config.yaml"))
    model = make_smca(config)
    for name, iteration in (("0000019", 19), ("final", 19), ("0000009", 9)):
        with torch.no_grad():
            model.query_embed.weight.normal_(generator=torch.Generator().manual_seed(iteration))
        checkpoint = {"model": model.state_dict(), "iteration": iteration}
        torch.save(checkpoint, run / f"model_{name}.pth")
    torch.save({"model": model.state_dict()}, run / "model_best.pth")
    return run


def test_a_trainings_checkpoints_are_drawn_by_their_iteration(tmp_path, data):
    run, out = write_training(tmp_path), tmp_path / "deep" / "pictures"
    paths = command(run, "--output", out, data, "--layer", 0)
    assert paths == [str(out / n) for n in ("modulation.json", "modulation.png", "examples.jpg")]
    for path in paths[1:]:
        with Image.open(path) as image:
            image.load()

    numbers = json.loads((out / "modulation.json").read_text())
    assert list(numbers) == ["10", "20"]
    for step, name in (("10", "0000009"), ("20", "0000019")):
        model = make_smca(str(tmp_path / "tiny_smca.py"))
        model.load_state_dict(torch.load(run / f"model_{name}.pth")["model"])
        items = DatasetCatalog.get("tiny_statistics")
        predictor = Predictor.from_model(
            model, [T.ResizeShortestEdge([96, 96], 160)]
        )  # as in the config
        assert numbers[step] == summarize(collect(predictor, items, layer=0))
    assert numbers["10"] != numbers["20"]


def test_the_best_checkpoint_has_the_steps_of_its_evaluation(tmp_path, data):
    run, out = write_training(tmp_path), tmp_path / "pictures"
    best = {"metric": "bbox/AP", "value": 1.0, "iteration": 4}
    weights = torch.load(run / "model_final.pth")["model"]
    torch.save({"model": weights, "best": best}, run / "model_best.pth")
    words = [data, "train.max_iter=20", "--output", out, "--num-images", 1]
    command(run / "model_best.pth", *words)
    assert list(json.loads((out / "modulation.json").read_text())) == ["5"]


def test_the_commands_errors_are_one_sentence(tmp_path, data, capsys):
    def error(*args):
        assert command(*args, "--output", tmp_path / "out") == 1
        assert not any((tmp_path / "out").rglob("*"))
        return capsys.readouterr().err

    run = write_training(tmp_path)
    (tmp_path / "empty").mkdir()
    assert "empty holds no checkpoints" in error(tmp_path / "empty")
    assert "No checkpoint given" in error("train.device=cpu")
    assert "nowhere.pth does not exist" in error(tmp_path / "nowhere.pth")
    assert "model_best.pth does not say at which iteration" in error(run / "model_best.pth", data)
    assert "no objects" in error(run, data, "--num-images", 0)
    # Not COCO, which may be there.
    DatasetCatalog.register("lost_data", list)
    MetadataCatalog.get("lost_data").set(json_file=str(tmp_path / "lost.json"))
    assert "lost.json, which does not exist" in error(
        run, "dataloader.test.dataset.names=lost_data"
    )
