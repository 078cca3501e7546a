import io
import json
from dataclasses import replace
from pathlib import Path

import matplotlib
import matplotlib.font_manager
import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from PIL import Image

import draw
import reference
from helpers import CLASS_NAMES, ODD_NAMES, make_image, make_smca, write_image, write_smca_config
from smca.analysis import (
    detections,
    draw_contact_sheet,
    draw_curves,
    draw_gaussians,
    draw_instances,
    modulation_maps,
    read_metrics,
)
from smca.data import read_image
from smca.errors import UserError
from smca.inference import Predictor
from smca.modeling.weight_map import MAPS

VARIANTS = {
    "several scales": ("smca", {}),
    "one scale": ("smca_single_scale", {}),
    "head shared": ("smca", {"modulation.per_head": False}),
    "covariance": ("smca", {"modulation.map": "covariance"}),
    "fixed": ("smca_single_scale", {"modulation.map": "fixed"}),
    "no scale selection": ("smca", {"scale_selection": False}),
}


def make_predictor(folder, variant):
    base, decoder = VARIANTS[variant]
    model = make_smca(write_smca_config(folder, base, **decoder))
    return Predictor.from_model(model, class_names=CLASS_NAMES)


@pytest.fixture(scope="module", params=VARIANTS)
def predictor(request, tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(scope="module")
def multi_scale(tmp_path_factory):
    return make_predictor(tmp_path_factory.mktemp("model"), "several scales")


def boxes_of(**fields):
    return Instances((60, 80), **fields)


def test_labels_do_not_cover_one_another():
    visualizer = detections._Visualizer(np.zeros((400, 600, 3), np.uint8), font_size_scale=1.4)
    boxes = np.array([[20, 50, 300, 300], [24, 52, 290, 300], [22, 48, 280, 290]])
    labels = ["ellipse 53%", "a triangle 61%", "star 9%"]
    output = visualizer.overlay_instances(boxes=boxes, labels=labels)
    renderer = output.canvas.get_renderer()
    places = [text.get_window_extent(renderer) for text in output.ax.texts]
    assert len(places) == 3
    assert all(place.count_overlaps(places) == 1 for place in places)  # itself


TRUTH = boxes_of(gt_boxes=Boxes(torch.tensor([[10.0, 10, 40, 30]])), gt_classes=torch.tensor([1]))
DETECTIONS = boxes_of(
    pred_boxes=Boxes(torch.tensor([[10.0, 20, 60, 50], [-5.0, 0, 90, 70]])),
    scores=torch.tensor([0.9, 0.6]),
    pred_classes=torch.tensor([0, 2]),
)


# Detections and truth


def test_a_box_is_drawn_around_its_object_and_a_small_image_grows_by_a_whole_factor():
    image = np.zeros((160, 160, 3), dtype=np.uint8)
    instances = Instances((160, 160))
    instances.pred_boxes = Boxes(torch.tensor([[200.0, 250, 300, 400]]) / 3)
    instances.scores, instances.pred_classes = torch.tensor([0.5]), torch.tensor([0])
    changed = draw_instances(image, instances, [""]).any(axis=2)
    assert changed.shape == (480, 480)
    rows, columns = np.nonzero(changed[300:])
    assert abs(rows.max() + 300 - 400) <= 3
    assert abs(columns.min() - 200) <= 3 and abs(columns.max() - 300) <= 3
    assert not changed[300:380, 210:290].any()
    assert draw_instances(make_image(301, 485), DETECTIONS).shape == (301, 485, 3)
    assert draw_instances(make_image(1, 1), DETECTIONS[:0]).shape == (480, 480, 3)


def test_a_class_may_have_any_name(multi_scale):
    classes = torch.arange(len(ODD_NAMES))
    boxes = Boxes(torch.tensor([[5.0, 5, 50, 50]]).repeat(len(classes), 1))
    instances = boxes_of(pred_boxes=boxes, pred_classes=classes)
    picture = draw_instances(make_image(60, 80), instances, ODD_NAMES)
    (maps, *_) = modulation_maps(multi_scale, make_image())
    maps = [replace(maps, class_index=index) for index in classes.tolist()]
    draw_gaussians(maps, ODD_NAMES).savefig(io.BytesIO(), dpi=30)
    names = [f"{name}.jpg" for name in ODD_NAMES]
    names[0] = "long_name.rf." * 12
    sheet = draw_contact_sheet([picture] * len(names), names)
    sheet.savefig(io.BytesIO(), dpi=30)
    assert sheet.axes[0].title.get_window_extent().width < sheet.bbox.width / 2


@pytest.mark.filterwarnings("error")
def test_letters_of_any_installed_font_are_drawn(monkeypatch):
    monkeypatch.setitem(matplotlib.rcParams, "font.family", ["sans-serif"])
    manager = matplotlib.font_manager.fontManager
    fonts = [font for font in manager.ttflist if font.name.startswith(("DejaVu Sans", "STIX"))]
    monkeypatch.setattr(manager, "ttflist", fonts)
    label, classes = "cat \ue000 \U0001d49c", torch.tensor([0])
    instances = boxes_of(pred_boxes=Boxes([[5, 5, 50, 50]]), pred_classes=classes)
    picture = draw_instances(make_image(60, 80), instances, [label])
    draw_contact_sheet([picture], [label]).savefig(io.BytesIO())
    first, *others = matplotlib.rcParams["font.family"]
    assert first == "sans-serif" and sorted(others) == ["STIXGeneral", "STIXNonUnicode"]


@pytest.mark.filterwarnings("error")
def test_letters_of_no_font_are_said_once(caplog):
    instances = boxes_of(pred_boxes=Boxes([[5, 5, 50, 50]]), pred_classes=torch.tensor([0]))
    for name in ("\U000f0123\U000f0124", "\U000f0125"):  # whose meaning is private
        draw_instances(make_image(60, 80), instances, [name])
    (message,) = caplog.messages
    assert "No installed font has the letters \U000f0123, \U000f0124: pictures" in message


# Gaussian maps


def record_call(module, call):
    """Inputs and output of a module during a call."""
    seen = []
    handle = module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output)))
    result = call()
    handle.remove()
    return seen[0], result


def test_maps_equal_the_formula_at_each_pixels_place_in_cells(predictor):
    image = make_image()  # 120 pixels wide, drawn 384 wide: 3.2 times as large
    layer = predictor.model.decoder.layers[1].modulation
    (inputs, weight_maps), (detection,) = record_call(
        layer, lambda: modulation_maps(predictor, image, layer=1)
    )
    assert detection.image.shape == (288, 384, 3)
    assert detection.center == pytest.approx(3.2 * inputs[1][0, detection.query].numpy(), abs=1e-3)
    spread = {shape: name for name, shape in MAPS.items()}[layer.shape]
    for index, (scale, weight_map) in enumerate(zip(inputs[2], weight_maps, strict=True)):
        # (1, 1, H', ...) of the detection's query
        centers, spreads = (
            x[:, :, detection.query, None].transpose(1, 2)
            for x in (weight_map.centers, weight_map.spreads)
        )
        for row, column in ((0, 0), (17, 301), (200, 45), (287, 383)):
            place = torch.tensor([column, row]) / 3.2 / scale.stride
            factor = weight_map.factor * 8
            # A map of one cell, which lies at that place.
            expected = reference.log_weights(1, 1, centers - place, spreads, spread, 8.0, factor)
            weights = detection.maps[index, :, row, column]
            assert weights == pytest.approx(expected.exp()[0, :, 0, 0].numpy(), abs=1e-5)


def test_maps_are_of_the_same_place_whatever_size_the_model_sees(multi_scale):
    from detectron2.data import transforms as T

    model = multi_scale.model
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    resized = Predictor.from_model(model, [T.Resize((192, 256))], class_names=CLASS_NAMES)
    image = make_image(96, 128)
    (inputs, weight_maps), (detection,) = record_call(
        model.decoder.layers[-1].modulation, lambda: modulation_maps(resized, image)
    )
    in_model = weight_maps[0].centers[0, :, detection.query] * inputs[2][0].stride  # of 256 pixels
    assert detection.head_centers[0] == pytest.approx(in_model.numpy() * 384 / 256, abs=1e-3)


def test_scale_weights_are_the_decoders(multi_scale):
    layer = multi_scale.model.decoder.layers[0]
    (_, logits), (detection,) = record_call(
        layer.scale_weight, lambda: modulation_maps(multi_scale, make_image(), layer=0)
    )
    weights = logits[0, detection.query].softmax(-1).numpy()
    assert detection.scale_weights == pytest.approx(weights, abs=1e-6)


def test_maps_belong_to_the_detections_chosen(multi_scale):
    image = make_image()
    instances = multi_scale(image, threshold=0)
    detections = modulation_maps(multi_scale, image, indices=[2, 0])
    for detection, index in zip(detections, (2, 0), strict=True):
        assert detection.query == instances.query_indices[index]
        assert detection.score == pytest.approx(instances.scores[index].item())
        assert detection.class_index == instances.pred_classes[index]
        box = instances.pred_boxes.tensor[index].numpy() * 3.2
        assert detection.box == pytest.approx(box, abs=1e-3)


@pytest.mark.parametrize("variant", ["several scales", "head shared"])
def test_every_head_has_a_panel(tmp_path, variant):
    predictor = make_predictor(tmp_path, variant)
    detections = modulation_maps(predictor, make_image(), indices=[0, 1])
    shown = [axes.images for axes in draw_gaussians(detections, CLASS_NAMES).axes if axes.images]
    num_heads = predictor.model.decoder.layers[0].modulation.num_heads
    assert len(shown) == 2 * (1 + num_heads)
    assert sum(len(images) == 2 for images in shown) == 2 * num_heads  # with a map on top


def test_a_single_scale_can_be_drawn_and_what_the_model_lacks_is_an_error(multi_scale, tmp_path):
    detections = modulation_maps(multi_scale, make_image())
    figure = draw_gaussians(detections, CLASS_NAMES, scale=2)
    assert "stride 64" in figure.subfigs[0].get_suptitle()
    with pytest.raises(UserError, match="no scale 3, the model has 3"):
        draw_gaussians(detections, scale=3)
    with pytest.raises(UserError, match="no decoder layer 2, the model has 2"):
        modulation_maps(multi_scale, make_image(), layer=2)
    detr = Predictor.from_model(make_smca(write_smca_config(tmp_path, "detr")))
    with pytest.raises(UserError, match="modulation=null"):
        modulation_maps(detr, make_image())


# Curves


def write_metrics(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def losses(*iterations, run=1.0):
    return [{"iteration": i, "total_loss": run + i, "loss_ce": 1.0} for i in iterations]


def result(iteration):
    return {"iteration": iteration, "bbox/AP": 3.0}


@pytest.mark.parametrize(
    "lines, expected",
    [
        # Lines that are cut off or say no iteration are skipped.
        ([*losses(0, 10), '{"iteration": 20, "total_l'], {0: 1, 10: 11}),
        ([*losses(0), '{"iteration": 10, "tot', *losses(10)], {0: 1, 10: 11}),
        ([*losses(0), {"total_loss": 9.0}, {"iteration": "1", "total_loss": 9.0}], {0: 1}),
        # A resumed run replaces what came after its start.
        (losses(0, 10, 20, 30) + losses(15, 25, run=100.0), {0: 1, 10: 11, 15: 115, 25: 125}),
        (losses(0, 10) + losses(10, run=100.0), {0: 1, 10: 110}),
        # So it does where it begins before an evaluation.
        ([*losses(19), result(14), *losses(29), result(24), *losses(19, run=100.0)], {19: 119}),
        # JSONWriter writes an evaluation after the losses of the next log step.
        ([*losses(9, 19), result(14), *losses(29)], {9: 10, 19: 20, 29: 30}),
    ],
)
def test_losses_are_read_by_their_iterations(tmp_path, lines, expected):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (tmp_path / "m.json").write_text(text)
    iterations, values = read_metrics(tmp_path / "m.json")["total_loss"]
    assert dict(zip(iterations, values)) == expected


def test_losses_ap_and_averaged_weights_have_curves_of_their_own():
    metrics = {"bbox/AP": ([0, 5], [1.0, 2.0]), "ema/bbox/AP": ([5], [3.0])}
    losses, axes = draw_curves({"total_loss": ([0, 10], [1.0, 11.0]), **metrics}).axes
    assert losses.lines[0].get_xydata().tolist() == [[0, 1], [10, 11]]
    lines = {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
    assert lines == {"AP": [[0, 1], [5, 2]], "AP, averaged weights": [[5, 3]]}


def test_what_is_absent_is_left_out(tmp_path):
    only_losses = draw_curves({"total_loss": ([0, 1], [2.0, 1.0])})
    only_results = draw_curves({"bbox/AP": ([0], [float("nan")]), "lr": ([0], [1.0])})
    assert len(only_losses.axes) == len(only_results.axes) == 1
    with pytest.raises(UserError, match="neither losses nor AP"):
        draw_curves({"lr": ([0], [1.0])})


def test_a_missing_or_empty_metrics_file_is_named(tmp_path):
    with pytest.raises(UserError, match="nowhere.json cannot be read"):
        read_metrics(str(tmp_path / "nowhere.json"))
    (tmp_path / "empty.json").write_text("")
    with pytest.raises(UserError, match="empty.json holds no metrics"):
        read_metrics(str(tmp_path / "empty.json"))


# All pictures of a run


@pytest.fixture
def dataset_dicts(tmp_path):
    items = []
    for seed in range(3):
        path = tmp_path / f"{seed}.png"
        write_image(path, seed=seed)
        annotation = {"bbox": [5, 5, 30, 40], "bbox_mode": BoxMode.XYWH_ABS, "category_id": seed}
        items.append(
            {"file_name": str(path), "height": 90, "width": 120, "annotations": [annotation]}
        )
    return items


def run_draw(predictor, dataset_dicts, folder, monkeypatch, *options):
    """Run tools/draw.py; gives the names of the pictures."""
    monkeypatch.setattr(draw, "predictor_of", lambda args: predictor)
    monkeypatch.setattr(draw, "load_test_dataset", lambda cfg: dataset_dicts)
    command = ["--weights", str(folder / "a.pth"), "--output", str(folder / "out"), *options]
    paths = draw.run(draw.get_parser().parse_args(command))
    for path in paths:
        with Image.open(path) as image:
            image.load()
    return [Path(path).name for path in paths]


def test_a_run_gets_pictures_of_its_surest_detections(
    multi_scale, dataset_dicts, tmp_path, monkeypatch
):
    best = [
        modulation_maps(multi_scale, read_image(item["file_name"]))[0] for item in dataset_dicts
    ]
    best.sort(key=lambda detection: detection.score, reverse=True)
    assert best[0].score > best[1].score > best[2].score
    drawn = []
    monkeypatch.setattr(
        draw,
        "draw_gaussians",
        lambda maps, *args: drawn.extend(maps) or draw_gaussians(maps, *args),
    )
    write_metrics(tmp_path / "metrics.json", losses(0, 10))
    names = run_draw(multi_scale, dataset_dicts, tmp_path, monkeypatch, "--num-detections", "2")
    assert names == ["validation.png", "gaussians.png", "curves.png"]
    assert [(maps.query, maps.score) for maps in drawn] == [(m.query, m.score) for m in best[:2]]


def test_detr_gets_the_other_pictures(dataset_dicts, tmp_path, monkeypatch):
    predictor = Predictor.from_model(make_smca(write_smca_config(tmp_path, "detr")))
    assert run_draw(predictor, dataset_dicts, tmp_path, monkeypatch) == ["validation.png"]
