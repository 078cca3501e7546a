"""The detector around encoder and decoder: scales, heads, losses, detections."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

import reference
from helpers import (
    IMAGE_SIZES,
    assert_close,
    assert_same_detections,
    assert_uniform,
    match_detections,
    randomize,
)
from smca.errors import UserError
from smca.modeling.backbone import build_resnet
from smca.modeling.conv_encoder import ConvEncoder
from smca.modeling.criterion import SetCriterion
from smca.modeling.decoder import DecoderOutput
from smca.modeling.detector import SMCA, Predictions
from smca.modeling.encoder import TransformerEncoder
from test_modeling_decoder import make_decoder

D, H, FFN, Q, C = 32, 4, 48, 7, 5
MODELS = ["single scale", "multi scale", "conv"]
PATTERNS = {"single scale": "II", "multi scale": "IM"}


def make_model(
    kind="multi scale", dropout=0.0, encoder_settings=None, decoder_settings=None, **settings
):
    encoder_settings, decoder_settings = encoder_settings or {}, decoder_settings or {}
    features = {"single scale": ["res5"], "multi scale": ["res4", "res5"]}
    features = features.get(kind, ["res3", "res4", "res5"])
    num_extra_scales = 0 if kind == "single scale" else 1
    if kind == "conv":
        arguments = dict(num_layers=2, kernel_size=3, num_scales=4, reduce_finest=True)
        arguments.update(embed_dim=D, ffn_dim=FFN, dropout=dropout)
        encoder = ConvEncoder(**{**arguments, **encoder_settings})
    else:
        arguments = dict(pattern=PATTERNS[kind], embed_dim=D, num_heads=H, ffn_dim=FFN)
        encoder = TransformerEncoder(**{**arguments, **encoder_settings}, dropout=dropout)
    decoder_settings = {"scale_selection": kind != "single scale", **decoder_settings}
    num_scales = len(features) + num_extra_scales
    decoder = make_decoder(num_scales, dropout=dropout, **decoder_settings)
    defaults = dict(in_features=features, num_classes=C, num_queries=Q, embed_dim=D)
    defaults["criterion"] = SetCriterion()
    settings = {**defaults, **settings}
    return SMCA(
        backbone=build_resnet(
            depth=18, out_features=features, norm="GN", freeze_at=0, num_blocks=(1, 1, 1, 1)
        ),
        num_extra_scales=num_extra_scales,
        encoder=encoder,
        decoder=decoder,
        dropout=dropout,
        pixel_mean=(123.675, 116.28, 103.53),
        pixel_std=(58.395, 57.12, 57.375),
        **settings,
    )


def make_inputs(num_objects=None, image_sizes=None):
    """Detectron2's list of dicts; with `num_objects` an image, also instances for training."""
    generator = torch.Generator().manual_seed(0)
    inputs = []
    for i, (height, width) in enumerate(image_sizes or IMAGE_SIZES):
        image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
        inputs.append({"image": image, "height": 3 * height, "width": 2 * width})
        if num_objects is not None:
            count = num_objects[i]
            corner = torch.rand(count, 2, generator=generator) * 0.5
            size = torch.rand(count, 2, generator=generator) * 0.4 + 0.1
            boxes = torch.cat([corner, corner + size], 1) * torch.tensor([width, height] * 2)
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(boxes)
            instances.gt_classes = torch.randint(0, C, (count,), generator=generator)
            inputs[-1]["instances"] = instances
    return inputs


@pytest.mark.parametrize(
    "constraints, size",
    [({"square_size": 160}, (160, 160)), ({"size_divisibility": 50}, (100, 150))],
)
def test_images_are_padded_as_the_backbone_wants(monkeypatch, constraints, size):
    model = make_model()
    monkeypatch.setattr(type(model.backbone), "padding_constraints", constraints)
    images = model.preprocess(make_inputs(image_sizes=[(64, 96), (96, 128)]))
    assert images.tensor.shape[-2:] == size and images.image_sizes == [(64, 96), (96, 128)]


# ------------------------------------------------------------------------------- the whole detector


@pytest.mark.parametrize("center", [None, 0.3])
def test_boxes_start_from_the_center(center):
    model = randomize(make_model()).train()
    hidden = torch.randn(2, 1, Q, D, generator=torch.Generator().manual_seed(0))
    references = None if center is None else torch.full((2, 1, Q, 2), center)
    logits, boxes = model.forward_head(DecoderOutput(hidden, references))
    shift = torch.tensor([center or 0.0] * 2 + [0.0] * 2)
    assert_close(boxes, (model.box_embed(hidden) + shift).sigmoid(), 1e-6)
    assert_close(logits, model.class_embed(hidden), 1e-6)


@pytest.mark.parametrize("pattern", ["MM", "IM"])
def test_multi_scale_model_of_one_scale_is_the_single_scale_model(pattern):
    multi = randomize(
        make_model("single scale", 0.0, {"pattern": pattern}, {"scale_selection": True})
    )
    single = make_model("single scale")
    # No scale to tell apart or to choose: neither has parameters for that.
    single.load_state_dict(multi.state_dict(), strict=True)
    for result, expected in zip(multi.eval()(make_inputs()), single.eval()(make_inputs())):
        assert_same_detections(result["instances"], expected["instances"], 1e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("num_objects", [[2, 0], [0, 0], [12, 1]], ids=str)
def test_every_parameter_gets_a_gradient(kind, num_objects):
    model = make_model(kind)
    sum(model.train()(make_inputs(num_objects)).values()).backward()
    missing = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing


def test_dropout_is_on_in_training_and_off_in_eval():
    model = make_model(dropout=0.3)
    inputs = make_inputs([1, 1])
    torch.manual_seed(0)
    first, second = model.train()(inputs), model(inputs)
    assert first["loss_ce"] != second["loss_ce"]
    scores = [model.eval()(inputs)[0]["instances"].scores for _ in range(2)]
    assert torch.equal(*scores)


def test_training_without_a_criterion_is_an_error_and_detection_is_not():
    model = make_model(criterion=None)
    with pytest.raises(UserError, match="criterion=None.*SetCriterion"):
        model.train()(make_inputs([1, 1]))
    assert len(model.eval()(make_inputs())) == 2


def test_an_object_of_a_class_that_the_model_lacks_is_named():
    """Data that were registered without the names of their classes."""
    model = make_model(num_classes=2).train()
    inputs = make_inputs([1, 2])
    for item in inputs:
        item["instances"].gt_classes.zero_()
    model(inputs)
    inputs[1]["file_name"] = "b.jpg"
    inputs[1]["instances"].gt_classes[1] = 2
    with pytest.raises(UserError, match="b.jpg has an object of class index 2, .* 2 classes"):
        model(inputs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(max_detections=0), "max_detections=0 must be at least 1"),
        (dict(num_classes=0), "num_classes=0 must be at least 1"),
        (dict(num_queries=-1), "num_queries=-1 must be at least 1"),
        (dict(embed_dim=30), "embed_dim=30 must be a multiple of 4"),
        (
            dict(in_features=["res5"]),
            "in_features and num_extra_scales give 2 scales, .*made for 3.*num_scales=2",
        ),
        (dict(in_features=["res3", "res5"]), r"in_features names \['res3'\].*out_features"),
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_an_error_that_names_the_argument(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        make_model(**settings)


# ------------------------------------------------------------------------------------ detections


def random_predictions(num_images=2):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, num_images, Q, C, generator=generator)
    return Predictions(logits, torch.rand(1, num_images, Q, 4, generator=generator))


@pytest.mark.parametrize("max_detections", [None, 1, 20, Q * C, 1000])
def test_detections_equal_the_reference(max_detections):
    model = make_model(max_detections=max_detections)
    predictions, inputs = random_predictions(), make_inputs()
    results = model.postprocess(predictions, inputs, IMAGE_SIZES)
    assert len(results) == 2
    for i, result in enumerate(results):
        detections = result["instances"]
        height, width = inputs[i]["height"], inputs[i]["width"]
        top_k = min(max_detections or Q, Q * C)
        scores, labels, boxes = reference.inference(
            predictions.logits[-1, i], predictions.boxes_cxcywh[-1, i], height, width, top_k
        )
        assert detections.image_size == (height, width)
        assert_close(detections.scores, scores, 1e-6)
        chosen = match_detections(detections, scores, labels, boxes)
        assert_close(detections.pred_boxes.tensor[chosen], boxes, 1e-5)


def test_without_a_height_and_width_boxes_are_in_pixels_of_the_image():
    model = make_model().eval()
    inputs = [{"image": x["image"]} for x in make_inputs()]
    with_size = [
        {"image": x["image"], "height": h, "width": w} for x, (h, w) in zip(inputs, IMAGE_SIZES)
    ]
    for result, expected, size in zip(model(inputs), model(with_size), IMAGE_SIZES, strict=True):
        assert result["instances"].image_size == size
        assert_close(
            result["instances"].pred_boxes.tensor, expected["instances"].pred_boxes.tensor, 1e-6
        )


@pytest.mark.parametrize("image_size", [(1, 1), (1, 200), (33, 65)], ids=str)
@pytest.mark.parametrize("kind", MODELS)
def test_images_of_any_size_are_detected_on(kind, image_size):
    (result,) = make_model(kind).eval()(make_inputs(image_sizes=[image_size]))
    assert result["instances"].pred_boxes.tensor.isfinite().all()


# --------------------------------------------------------------------------------- initial values


def test_initial_values_of_the_heads_and_embeddings():
    torch.manual_seed(0)
    model = make_model("conv")
    state_dict = dict(model.named_parameters())
    bias = torch.full((C,), -4.59512)  # -log(0.99 / 0.01)
    assert_close(state_dict["class_embed.bias"].data, bias, 1e-5)
    for name in ("query_embed.weight", "scale_embed.weight"):
        value = state_dict[name]
        slack = 4 / value.numel() ** 0.5
        assert abs(value.mean()) < slack and abs(value.std() - 1) < slack
    for name, value in state_dict.items():
        if name.startswith(("neck.", "class_embed.weight", "box_embed.")):
            weight = state_dict[name.replace("bias", "weight")]
            assert_uniform(value, weight[0].numel() ** -0.5)
