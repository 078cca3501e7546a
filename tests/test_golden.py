"""The models compute the published figures: see golden/README.md."""

import gc
import json

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.structures import Boxes, Instances

import reference
from convert_checkpoint import convert_file, official_names
from helpers import ROOT, build_model, match_detections
from smca.modeling import kernels

GOLDEN = ROOT / "tests" / "golden"

COMMON = ["model.num_queries=50", "model.num_classes=92", "model.dropout=0.0"]
CONV = [
    "model.encoder.num_layers=5",
    "model.encoder.kernel_size=5",
    "model.encoder.share_cross_scale=False",
]
VARIANT = ["model.encoder.pattern=MIM", "model.decoder.scale_selection=False"]

# Config and overrides of each case, beside the common ones.
CASES = {
    "single_scale_fixed": (
        "smca_single_scale_r50_50ep",
        ["model.decoder.modulation.map=smca.modeling.FixedGaussian"],
    ),
    "single_scale_single": (
        "smca_single_scale_r50_50ep",
        ["model.decoder.modulation.map=smca.modeling.SingleGaussian"],
    ),
    "single_scale_independent": ("smca_single_scale_r50_50ep", []),
    "single_scale_covariance": (
        "smca_single_scale_r50_50ep",
        ["model.decoder.modulation.map=smca.modeling.CovarianceGaussian"],
    ),
    "single_scale_odd_sizes": ("smca_single_scale_r50_50ep", []),
    "multi_scale": ("smca_r50_50ep", []),
    "multi_scale_variant": (
        "smca_r50_50ep",
        ["model.decoder.modulation.map=smca.modeling.SingleGaussian", *VARIANT],
    ),
    "conv_multi_scale": ("smca_conv_r50_50ep", CONV),
    "conv_multi_scale_odd_size": ("smca_conv_r50_50ep", CONV),
    "conv_multi_scale_batch": ("smca_conv_r50_50ep", CONV),
}

# Noise of float32, relative to the largest value of a tensor.
TOLERANCE, GRADIENT_TOLERANCE, PARAMETER_TOLERANCE, BACKBONE_TOLERANCE = 1e-5, 1e-4, 1e-3, 3e-3
# This case's figure for layer2.2.conv2 is itself 3.3e-3 off the value in float64.
BACKBONE_TOLERANCES = {"conv_multi_scale_batch": 4e-3}
# Their made-up weights make rounding differences of 1e-6 up to 5e-3 in the backbone, and these
# depend on the processor and the threads. Their gradients are computed in float64.
EXACT_GRADIENTS = [
    "single_scale_covariance",
    "single_scale_single",
    "conv_multi_scale_batch",
]
# Zero in exact arithmetic: the queries that it multiplies are.
NOISE = "transformer.decoder.layers.0.self_attn.in_proj_weight"


def load_case(name):
    """What went in and the scalars that came out; the arrays that came out."""
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return case, dict(arrays)


def make_batch(case):
    """The case's images and targets in Detectron2's form."""
    batch = []
    images, targets = reference.make_images(case), reference.make_targets(case)
    for image, target in zip(images, targets, strict=True):
        height, width = image.shape[:2]
        instances = Instances((height, width))
        boxes = reference.corners(target["boxes"])
        instances.gt_boxes = Boxes(boxes * torch.tensor([width, height, width, height]))
        instances.gt_classes = target["labels"]
        image = torch.from_numpy(image).permute(2, 0, 1).contiguous()
        batch.append({"image": image, "height": height, "width": width, "instances": instances})
    return batch


def convert_official(case, folder):
    """The case's official checkpoint, written and converted: what the converter says of it, and
    its output."""
    official, converted = folder / "official.pth", folder / "smca.pth"
    torch.save({"model": reference.make_state_dict(case)}, official)
    conversion = convert_file(str(official), str(converted), classes="keep")
    official.unlink()
    return conversion, converted


def load_model(name, checkpoint):
    """The model of a case's config and overrides, with the converted weights."""
    config, overrides = CASES[name]
    model = build_model(config, *COMMON, *overrides)
    DetectionCheckpointer(model).load(str(checkpoint))
    return model


def run(model, batch, backward):
    """Detections; logits and boxes of all layers; losses. Gradients stay in the model."""
    with torch.no_grad():
        detections = [result["instances"] for result in model.eval()(batch)]
    predictions = []
    hook = model.criterion.register_forward_pre_hook(lambda _, args: predictions.extend(args[0]))
    with torch.set_grad_enabled(backward):
        losses = model.train()(batch)
    hook.remove()
    if backward:
        sum(losses.values()).backward()
    return detections, predictions, losses


def gradients_in_float64(model, batch):
    """Leaves them in the model, whose steps in float32 are in float64, too."""
    for item in batch:
        item["instances"].gt_boxes.tensor = item["instances"].gt_boxes.tensor.double()
    model.zero_grad()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        patch.setattr(kernels, "_can_fuse", lambda *args: True)  # it looks in float32
        sum(model.double().train()(batch).values()).backward()


def relative(actual, expected):
    """Largest difference, relative to the largest expected value."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return np.abs(actual - expected).max() / np.abs(expected).max()


def output_differences(predictions, detections, arrays):
    logits, boxes = (prediction.detach() for prediction in predictions)
    result = {
        "logits": relative(logits[-1], arrays["pred_logits"]),
        "boxes": relative(boxes[-1], arrays["pred_boxes"]),
        "first layer's logits": relative(logits[0], arrays["first_layer_logits"]),
        "first layer's boxes": relative(boxes[0], arrays["first_layer_boxes"]),
        "scores of detections": 0.0,
        "boxes of detections": 0.0,
    }
    for i, found in enumerate(detections):
        scores, classes, boxes = (
            torch.from_numpy(arrays[f"top_{key}_{i}"]) for key in ("scores", "labels", "boxes")
        )
        chosen = match_detections(found, scores, classes, boxes, TOLERANCE)
        for key, difference in (
            ("scores of detections", relative(found.scores[: len(scores)], scores)),
            ("boxes of detections", relative(found.pred_boxes.tensor[chosen], boxes)),
        ):
            result[key] = max(result[key], difference)
    return result


def loss_differences(losses, case):
    weights = case["loss_weights"]
    losses = {key: loss.item() for key, loss in losses.items()}
    unweighted = {k: v / weights["_".join(k.split("_")[:2])] for k, v in losses.items()}
    assert unweighted.keys() == case["losses"].keys()
    terms = [relative(unweighted[key], value) for key, value in case["losses"].items()]
    total = relative(sum(losses.values()), case["total_loss"])
    return {"loss terms": max(terms), "total loss": total}


def gradient_differences(model, case):
    parameters = dict(model.named_parameters())
    norms = {
        # In float64, since float32's sum over millions of squares is 2e-4 off.
        official: parameters[name].grad.double().norm().item()
        for name, official in official_names(parameters).items()
        if parameters[name].requires_grad
    }
    expected = case["gradient_norms"]
    assert norms.keys() == expected.keys()
    each = {key: relative(norms[key], expected[key]) for key in norms if key != NOISE}
    whole = relative(np.linalg.norm(list(norms.values())), case["gradient_norm"])
    return {
        "gradient": whole,
        "parameters' gradients": max(v for k, v in each.items() if "backbone" not in k),
        "backbone's gradients": max(v for k, v in each.items() if "backbone" in k),
    }


def measure(name, folder):
    """All differences of a case by quantity; what the converter said; number of parameters."""
    case, arrays = load_case(name)
    conversion, checkpoint = convert_official(case, folder)
    model = load_model(name, checkpoint)
    exact = name in EXACT_GRADIENTS
    detections, predictions, losses = run(model, make_batch(case), backward=not exact)
    if exact:
        gradients_in_float64(model, make_batch(case))
    differences = {
        **output_differences(predictions, detections, arrays),
        **loss_differences(losses, case),
        **gradient_differences(model, case),
    }
    checkpoint.unlink()
    num_trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return case, differences, conversion, num_trainable


@pytest.fixture(scope="module", params=CASES)
def measured(request, tmp_path_factory):
    yield (request.param, *measure(request.param, tmp_path_factory.mktemp("golden")))
    gc.collect()


def test_outputs_and_losses_equal_the_published_ones(measured):
    _, _, differences, _, _ = measured
    gradients = [key for key in differences if "gradient" in key]
    too_large = {k: v for k, v in differences.items() if k not in gradients and v > TOLERANCE}
    assert len(gradients) == 3 and not too_large


def test_gradients_equal_the_published_ones(measured):
    name, _, differences, _, _ = measured
    assert differences["gradient"] < GRADIENT_TOLERANCE
    assert differences["parameters' gradients"] < PARAMETER_TOLERANCE
    tolerance = BACKBONE_TOLERANCES.get(name, BACKBONE_TOLERANCE)
    assert differences["backbone's gradients"] < tolerance


def test_model_has_the_published_number_of_trainable_parameters(measured):
    _, case, _, _, num_trainable = measured
    assert num_trainable == case["trainable_parameters"]


def test_converter_names_the_config_and_its_overrides(measured):
    name, _, _, conversion, _ = measured
    config, overrides = CASES[name]
    expected = {key for key in COMMON + overrides if "dropout" not in key}
    if name == "multi_scale_variant":  # not to be seen in the weights, and said to be assumed
        expected = expected - {"model.encoder.pattern=MIM"} | {"model.encoder.pattern=IMI"}
        assert any('"IMI" is assumed' in note for note in conversion.notes)
    assert (conversion.config, set(conversion.overrides)) == (config, expected)
