"""Conversion of official checkpoints, DETR's and torchvision's."""

import argparse
import os

import numpy as np
import pytest
import torch
import torchvision
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog

import convert_checkpoint
import reference
from convert_checkpoint import convert, convert_file, official_names
from helpers import build_model
from smca import model_zoo
from smca.checkpoint import SMCACheckpointer
from smca.errors import CheckpointError
from smca.inference import Predictor
from smca.version import __version__

D, FFN, Q = 16, 24, 5

SINGLE, MULTI, CONV = "smca_single_scale_r50_50ep", "smca_r50_50ep", "smca_conv_r50_50ep"
SMALL = [
    f"model.embed_dim={D}",
    f"model.num_queries={Q}",
    f"model.encoder.ffn_dim={FFN}",
    f"model.decoder.ffn_dim={FFN}",
    "model.decoder.num_layers=2",
]
TINY = [*SMALL, "model.backbone.depth=18"]
# Config, its overrides beside those of SMALL, and what the description has to mention.
MODELS = [
    (SINGLE, ["model.decoder.modulation.map=smca.modeling.FixedGaussian"], "spread fixed"),
    (SINGLE, [], "one scale, ResNet-50, spread independent"),
    (SINGLE, ["model.decoder.modulation.map=smca.modeling.CovarianceGaussian"], "covariance"),
    (SINGLE, ["model.decoder.modulation.per_head=False"], "one scale"),
    (MULTI, [], "several scales"),
    (MULTI, ["model.decoder.scale_selection=False"], "several scales"),
    (CONV, [], "convolutional encoder"),
    (CONV, ["model.encoder.share_cross_scale=False"], "convolutional encoder"),
    (CONV, ["model.encoder.pointwise=False"], "convolutional encoder"),
    ("smca_conv_r101_50ep", [], "ResNet-101"),
]


def official_shapes(config, *overrides):
    """Names and shapes of the official checkpoint of that model, which has 92 class outputs."""
    with torch.device("meta"):
        state_dict = build_model(config, *overrides, "model.num_classes=92").state_dict()
    return {name: state_dict[ours].shape for ours, name in official_names(state_dict).items()}


def without_values(config, *overrides):
    """An official checkpoint whose tensors have shapes only."""
    shapes = official_shapes(config, *overrides)
    return {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}


def made_up(config, *overrides):
    """An official checkpoint with random values."""
    shapes = official_shapes(config, *overrides)
    return reference.make_state_dict({"weight_seed": 0, "state_dict": list(shapes.items())})


@pytest.fixture(scope="module")
def checkpoint():
    return made_up(SINGLE, *TINY)


@pytest.fixture(scope="module")
def detr():
    """91 category ids and no object."""
    return made_up("detr_r50_50ep", *TINY)


# ------------------------------------------------------------------------------ recognizing models


@pytest.mark.parametrize("config, overrides, words", MODELS)
def test_finds_config_and_overrides_of_every_model(config, overrides, words):
    conversion = convert(without_values(config, *SMALL, *overrides), classes="keep")
    assert conversion.config == config
    expected = {*SMALL, *overrides, "model.num_classes=92"}
    assert set(conversion.overrides) == expected
    assert words in conversion.description
    with torch.device("meta"):
        model = build_model(config, *expected)
    model.load_state_dict(conversion.model, strict=True, assign=True)
    if conversion.config == MULTI:
        assert any('"IIMII" is assumed' in note for note in conversion.notes)


def test_convolutions_between_scales_go_where_they_belong():
    checkpoint = made_up(CONV, *SMALL, "model.encoder.share_cross_scale=False")
    converted = convert(checkpoint, classes="keep").model
    for index in range(3):
        for official, ours in (("high_to_low", "down"), ("low_to_high", "up")):
            expected = checkpoint[f"transformer.encoder.layers.1.{official}_{index + 1}.weight"]
            assert torch.equal(converted[f"encoder.layers.1.{ours}.{index}.weight"], expected)


def test_every_value_and_all_classes_are_kept(checkpoint):
    conversion = convert(checkpoint, classes="keep")
    names = official_names(conversion.model)
    assert sorted(names.values()) == sorted(checkpoint)
    for name, value in conversion.model.items():
        assert torch.equal(value, checkpoint[names[name]]), name
    assert (conversion.class_names[1], conversion.class_names[90]) == ("person", "toothbrush")
    assert len(conversion.class_names) == 92


# ----------------------------------------------------------------------------------------- classes


def test_coco80_picks_the_used_category_ids_in_detectron2s_order(checkpoint):
    conversion = convert(checkpoint, classes="coco80")
    metadata = MetadataCatalog.get("coco_2017_val")
    contiguous = metadata.thing_dataset_id_to_contiguous_id
    assert len(contiguous) == 80
    for category_id, index in contiguous.items():
        for part in ("weight", "bias"):
            row = conversion.model[f"class_embed.{part}"][index]
            assert torch.equal(row, checkpoint[f"class_embed.{part}"][category_id])
    assert conversion.class_names == metadata.thing_classes
    assert not any("num_classes" in override for override in conversion.overrides)


# ------------------------------------------------------------------------- DETR and torchvision


def test_detr_is_converted_to_its_config(detr):
    conversion = convert(detr)
    assert conversion.config == "detr_r50_50ep"
    assert set(conversion.overrides) == set(TINY)
    assert "DETR" in conversion.description and "initialization" in " ".join(conversion.notes)
    model = build_model("detr_r50_50ep", *TINY)
    model.load_state_dict(conversion.model, strict=True)


@pytest.mark.parametrize("classes, num_outputs", [("coco80", 80), ("keep", 91)])
def test_detrs_classes_become_probabilities_against_no_object(detr, classes, num_outputs):
    model = convert(detr, classes).model
    hidden = torch.randn(3, D, generator=torch.Generator().manual_seed(1))
    soft = reference.linear(detr, "class_embed", hidden).softmax(-1)
    against_none = soft[:, :-1] / (soft[:, :-1] + soft[:, -1:])
    ids = sorted(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    if classes == "coco80":
        against_none = against_none[:, ids]
    scores = reference.linear(model, "class_embed", hidden).sigmoid()
    assert scores.shape == (3, num_outputs)
    torch.testing.assert_close(scores, against_none)


def test_torchvision_resnet_computes_the_same_features():
    depth = 18
    torch.manual_seed(0)
    resnet = getattr(torchvision.models, f"resnet{depth}")(weights=None).eval()
    for name, buffer in resnet.named_buffers():
        if "running" in name:
            low = 0.5 if name.endswith("var") else -0.5
            torch.nn.init.uniform_(buffer, low, low + 1)
    conversion = convert(resnet.state_dict())
    assert conversion.config is None and f"ResNet-{depth}" in conversion.description
    config = model_zoo.get_config(SINGLE)
    config.model.backbone.depth = depth
    backbone = instantiate(config.model).backbone.eval()
    weights = {name.removeprefix("backbone."): v for name, v in conversion.model.items()}
    assert not backbone.load_state_dict(weights, strict=False).unexpected_keys
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        x = resnet.maxpool(resnet.relu(resnet.bn1(resnet.conv1(image))))
        expected = resnet.layer4(resnet.layer3(resnet.layer2(resnet.layer1(x))))
        features = backbone(image)["res5"]
    assert (features - expected).abs().max() < 1e-4 * expected.abs().max()


# ----------------------------------------------------------------------------------------- errors


def test_missing_extra_and_misshapen_tensors_are_named(checkpoint):
    broken = dict(checkpoint)
    del broken["transformer.decoder.layers.1.norm2.bias"]
    broken["transformer.decoder.layers.1.norm5.bias"] = torch.zeros(D)
    broken["bbox_embed.layers.1.weight"] = torch.zeros(D, D + 1)
    with pytest.raises(CheckpointError) as error:
        convert(broken)
    message = str(error.value)
    assert "1 missing (transformer.decoder.layers.1.norm2.bias)" in message
    assert "1 unknown (transformer.decoder.layers.1.norm5.bias)" in message
    assert "bbox_embed.layers.1.weight ((16, 17), not (16, 16))" in message


@pytest.mark.parametrize(
    "key",
    [
        "class_embed.weight",
        "transformer.decoder.layers.1.point3.weight",
        "transformer.decoder.layers.0.point3.weight",
        "backbone.0.body.layer3.1.conv1.weight",
    ],
)
def test_a_missing_tensor_is_named_wherever_it_is(checkpoint, key):
    with pytest.raises(CheckpointError) as error:
        convert({k: v for k, v in checkpoint.items() if k != key})
    assert key in str(error.value)


@pytest.mark.parametrize(
    "content, output, words",
    [
        (b"PK\x03\x04" + b"\0" * 100, "out.pth", r"in\.pth cannot be read"),
        ([1, 2], "out.pth", "holds no tensors"),
        ({"model": {"a": 1}}, "out.pth", "holds other things than tensors"),
        (
            {"a": torch.zeros(1)},
            "out.pth",
            r"in\.pth is no checkpoint of an official .* called a\.",
        ),
        ({}, "out.pkl", r"out\.pkl needs a name that ends in \.pth"),
        (None, "out.pth", r"in\.pth does not exist"),
        ("a folder", "out.pth", "is a folder: name a checkpoint in it"),
    ],
)
def test_a_file_that_cannot_be_converted_is_an_error(tmp_path, content, output, words):
    path = tmp_path / "in.pth"
    if content == "a folder":
        path.mkdir()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=words):
        convert_file(str(path), str(tmp_path / output))
    assert not (tmp_path / output).exists()


# ------------------------------------------------------------------------------------------ files


@pytest.fixture
def official_file(checkpoint, tmp_path):
    """As the official training script writes it."""
    path = tmp_path / "official.pth"
    torch.save({"model": checkpoint, "epoch": 49, "args": argparse.Namespace(lr=1e-4)}, path)
    return path


def test_output_loads_and_says_where_it_comes_from(official_file, tmp_path):
    output = tmp_path / "folder" / "smca.pth"
    convert_file(str(official_file), str(output))
    model = build_model(SINGLE, *TINY)
    SMCACheckpointer(model, need_detector=True).load(str(output))
    metadata = torch.load(output, weights_only=True)["smca"]
    assert metadata["config"] == f"{SINGLE}.py"
    assert set(metadata["overrides"]) == set(TINY)
    assert len(metadata["class_names"]) == 80
    assert metadata["version"] == __version__
    assert sorted(os.listdir(tmp_path)) == ["folder", "official.pth"]


def test_tool_says_how_to_use_its_output_which_needs_no_config(official_file, tmp_path, capsys):
    output = tmp_path / "smca.pth"
    arguments = ["--input", official_file, "--output", output, "--classes", "keep"]
    assert convert_checkpoint.main(list(map(str, arguments))) == 0
    printed = capsys.readouterr().out
    assert "SMCA, one scale, ResNet-18, spread independent" in printed
    use = printed.splitlines()[-1]
    assert f"--config-file configs/{SINGLE}.py train.init_checkpoint={output}" in use
    assert "model.num_classes=92" in use
    predictor = Predictor(output, device="cpu")
    model = predictor.cfg.model
    assert (model.num_queries, model.num_classes) == (Q, 92)
    assert len(predictor(np.zeros((64, 96, 3), np.uint8), threshold=0)) == Q
