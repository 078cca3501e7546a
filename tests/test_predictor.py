"""smca.Predictor: a detector from its file, whatever images it is given."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import transforms as T
from detectron2.structures import Boxes, Instances
from PIL import Image

import smca
from helpers import (
    CLASS_NAMES,
    assert_same_detections,
    make_image,
    make_ramp,
    make_smca,
    write_image,
    write_smca_config,
)
from smca.analysis import draw_instances
from smca.errors import CheckpointError, UserError
from smca.inference import Detections

SHORT_SIDE, LONG_SIDE = 96, 160  # of the tiny config's evaluation


def write_checkpoint(folder, **others):
    """A checkpoint beside its config.yaml, as training leaves it."""
    config = write_smca_config(folder)
    LazyConfig.save(LazyConfig.load(config), str(folder / "config.yaml"))
    path = folder / "model_best.pth"
    provenance = {"class_names": CLASS_NAMES, "num_classes": 3}
    torch.save({"model": make_smca(config).state_dict(), "smca": provenance, **others}, path)
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("predictor"))


@pytest.fixture(scope="module")
def predictor(checkpoint):
    return smca.Predictor(checkpoint)


# What it takes


@pytest.fixture
def download(tmp_path, monkeypatch):
    """Addresses are of files in this folder."""
    open_url = lambda url, timeout: open(tmp_path / url.rpartition("/")[2], "rb")  # noqa: E731
    monkeypatch.setattr("urllib.request.urlopen", open_url)


@pytest.mark.usefixtures("download")
def test_every_kind_of_image_gives_the_same_detections(predictor, tmp_path):
    image = write_image(tmp_path / "a.png", 70, 110)
    expected = predictor(image, threshold=0)
    assert len(expected) == 6
    for given in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        "https://example.com/a.png",
        (tmp_path / "a.png").as_uri(),
        Image.fromarray(image),
        image[:, ::-1][:, ::-1],  # of other strides
        torch.from_numpy(image.transpose(2, 0, 1).copy()),
    ):
        assert_same_detections(predictor(given, threshold=0), expected, 0)


@pytest.mark.usefixtures("download")
def test_a_file_is_turned_upright_and_pixels_are_taken_as_they_are(predictor, tmp_path):
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.fromarray(make_image(40, 60)).save(tmp_path / "a.jpg", exif=exif)
    assert predictor(tmp_path / "a.jpg").image_size == (60, 40)
    assert predictor("https://example.com/a.jpg").image_size == (60, 40)
    with Image.open(tmp_path / "a.jpg") as image:
        assert predictor(image).image_size == (40, 60)


def test_the_threshold_keeps_the_surer_detections(predictor):
    everything = predictor(make_image(), threshold=0)
    threshold = float(everything.scores[:2].mean())
    assert_same_detections(predictor(make_image(), threshold=threshold), everything[:1], 0)
    assert len(predictor(make_image())) == int((everything.scores >= 0.5).sum())
    assert len(predictor(make_image(), threshold=1)) == 0


# Batches


def test_a_batch_of_several_sizes_is_the_models_own_batch(checkpoint, predictor):
    # Of sizes that the config's evaluation leaves as they are: its short side and below its long.
    images = [make_image(*size, 0) for size in ((96, 130), (130, 96), (96, 96))]
    inputs = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())} for image in images]
    model = make_smca(str(checkpoint.with_name("tiny_smca.py")))
    with torch.no_grad():
        expected = model(inputs[:2]) + model(inputs[2:])
    found = predictor(images, threshold=0, batch_size=2)
    for detections, output, image in zip(found, expected, images):
        assert_same_detections(detections, output["instances"])
        assert detections.image_size == image.shape[:2]


# What it gives


def test_detections_are_instances_with_names(predictor):
    found = predictor(make_image(), threshold=0)
    assert isinstance(found, Instances) and isinstance(found[:2].to("cpu"), Detections)
    assert found.names == [CLASS_NAMES[index] for index in found.pred_classes]
    chosen = found[found.scores > found.scores[2]]
    assert len(chosen) == 2 and chosen.names == found.names[:2]
    assert len(Instances.cat([found, found])) == 12


def test_coco_results_have_corner_and_size():
    instances = Instances(
        (90, 120), pred_boxes=Boxes(torch.tensor([[1.0, 2, 31, 42], [0, 0, 5, 6]]))
    )
    instances.scores, instances.pred_classes = torch.tensor([0.75, 0.5]), torch.tensor([2, 0])
    found = Detections(instances, make_image(), CLASS_NAMES, {0: 11, 1: 12, 2: 90})
    assert found.names == ["long", "round"]
    results = json.loads(json.dumps(found.to_coco(image_id=7)))
    assert results == [
        dict(image_id=7, category_id=90, category_name="long", bbox=[1, 2, 30, 40], score=0.75),
        dict(image_id=7, category_id=11, category_name="round", bbox=[0, 0, 5, 6], score=0.5),
    ]
    unknown = Detections(instances, make_image())
    assert unknown.names == ["2", "0"]
    assert [result["category_id"] for result in unknown.to_coco()] == [2, 0]


def test_a_data_set_of_another_number_of_classes_does_not_name_them(tmp_path):
    config = write_smca_config(tmp_path)  # of embedded data, whose three classes have names
    model = instantiate({**LazyConfig.load(config).model, "num_classes": 5})
    torch.save({"model": model.state_dict()}, tmp_path / "five.pth")
    predictor = smca.Predictor(
        tmp_path / "five.pth", config_file=config, overrides=["model.num_classes=5"]
    )
    assert predictor.class_names == [] and predictor.category_ids == {}
    found = predictor(make_image(), threshold=0)
    assert found.names == [str(index) for index in found.pred_classes.tolist()]
    assert found.draw().size[0] > 0


def test_the_drawing_is_that_of_the_boxes_and_names(predictor, tmp_path):
    image = write_image(tmp_path / "a.png", 480, 500)
    found = predictor(tmp_path / "a.png", threshold=0)
    drawn = np.asarray(found.draw())
    assert drawn.shape == image.shape and not np.array_equal(drawn, image)
    assert np.array_equal(drawn, draw_instances(image, found, CLASS_NAMES))
    ramp = make_ramp(480, 500)
    empty = np.asarray(predictor(ramp, threshold=0)[:0].draw())
    np.testing.assert_allclose(empty.astype(int), ramp, atol=3, rtol=0)


# The average of the weights


@pytest.mark.parametrize(
    "best, asked, expected",
    [
        ({"metric": "bbox/AP"}, None, "model"),
        ({"metric": "ema/bbox/AP"}, None, "ema"),
        ({"metric": "bbox/AP"}, "ema", "ema"),
    ],
)
def test_the_average_is_used_if_the_best_was_chosen_by_it_or_if_asked_for(
    tmp_path, best, asked, expected
):
    trained = make_smca(write_smca_config(tmp_path)).state_dict()
    average = {name: value + 0.01 for name, value in trained.items()}
    path = write_checkpoint(tmp_path, model_ema=average, best=best)
    predictor = smca.Predictor(path, weights=asked)
    assert predictor.weights == expected
    source = average if expected == "ema" else trained
    for name, value in predictor.model.state_dict().items():
        assert torch.equal(value, source[name]), name


# Precision


def test_half_precision_runs_and_is_near(checkpoint, predictor):
    image = make_image()
    half = smca.Predictor(checkpoint, dtype="bf16")
    kinds = []
    handle = half.model.backbone.register_forward_hook(
        lambda module, inputs, output: kinds.extend(value.dtype for value in output.values())
    )
    found, expected = half(image, threshold=0), predictor(image, threshold=0)
    handle.remove()
    assert set(kinds) == {torch.bfloat16}
    order = found.query_indices.argsort(), expected.query_indices.argsort()
    assert (found.scores[order[0]] - expected.scores[order[1]]).abs().max() < 0.1
    assert found.pred_boxes.tensor.dtype == torch.float32


# The config's channel order


def test_the_channels_are_in_the_models_order(checkpoint):
    seen = []

    class Keep(torch.nn.Module):
        def forward(self, batch):
            seen.extend(batch)
            size = (batch[0]["height"], batch[0]["width"])
            return [{"instances": Instances(size, scores=torch.zeros(0))}]

    image = make_image(20, 30)
    smca.Predictor.from_model(Keep(), [T.Resize((20, 30))], image_format="BGR")(image)
    assert (seen[0]["image"].permute(1, 2, 0).numpy() == image[:, :, ::-1]).all()
    resized = smca.Predictor(checkpoint)._input(image)["image"].shape
    assert resized == (3, SHORT_SIDE, SHORT_SIDE * 30 // 20)


# Errors


def test_what_is_no_image_is_named(predictor, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (tmp_path / "notes.txt").write_text("no image")
    write_image(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:2000])
    for given, words in (
        ("gone.png", "The image gone.png does not exist."),
        (tmp_path, "is a folder, no image."),
        (
            tmp_path / "notes.txt",
            "notes.txt is empty, no image (perhaps a pointer of Git LFS), or of a kind that Pillow",
        ),
        (tmp_path / "cut.png", "cut.png cannot be decoded, perhaps it was cut short ("),
        ("http://127.0.0.1:9/a.png", "http://127.0.0.1:9/a.png cannot be loaded: "),
        (7, "An image is a path, a URL, a PIL image, an array or a tensor, or a list of them, not"),
        (make_image() / 255, "An array has to be RGB of uint8 (height, width, 3), not"),
        (make_image()[..., 0], "not uint8 (90, 120)."),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "not uint8 (2, 3, 8, 8)."),
        (torch.zeros(3, 8, 8), "A tensor has to be RGB of uint8 (3, height, width), not"),
    ):
        for images in (given, [make_image(), given]):
            with pytest.raises(UserError) as error:
                predictor(images)
            assert words in str(error.value)
            assert "\n" not in str(error.value)


def test_wrong_settings_are_named(checkpoint, predictor):
    for threshold in (-0.1, 50, float("nan"), "0.5", None):
        with pytest.raises(UserError, match="The threshold has to be "):
            predictor(make_image(), threshold=threshold)
    for batch_size in (0, 1.5):
        with pytest.raises(UserError, match="batch_size has to be a positive whole number"):
            predictor(make_image(), batch_size=batch_size)
    with pytest.raises(UserError, match="dtype has to be fp32, bf16 or fp16, not 'int8'"):
        smca.Predictor(checkpoint, dtype="int8")
    with pytest.raises(UserError, match="weights has to be model or ema, not 'best'"):
        smca.Predictor(checkpoint, weights="best")
    with pytest.raises(CheckpointError, match="model_best.pth has no average of the weights"):
        smca.Predictor(checkpoint, weights="ema")
    with pytest.raises(UserError, match="gone.pth does not exist"):
        smca.Predictor("gone.pth")
