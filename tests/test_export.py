"""Exported detectors give what the model itself gives, in onnxruntime, OpenVINO and PyTorch."""

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch.export.passes import move_to_device_pass
from torch.torch_version import TorchVersion

import publish
from helpers import (
    CLASS_NAMES,
    ROOT,
    error_of,
    make_image,
    match_detections,
    write_image,
    write_smca_config,
    write_weights,
)
from smca.cli import export as tool
from smca.inference import Predictor
from smca.inference.export import (
    METADATA_NAME,
    OLDEST_TORCH,
    OUTPUTS,
    ExportableDetector,
    export_detector,
)
from smca.inference.images import rgb_array

needs_onnx = pytest.mark.skipif(
    torch.__version__ < OLDEST_TORCH["onnx"]
    or not all(map(importlib.util.find_spec, ("onnx", "onnxscript", "onnxruntime"))),
    reason="ONNX files need PyTorch 2.9 and the extra 'export': onnx, onnxscript, onnxruntime",
)
needs_export = pytest.mark.skipif(
    torch.__version__ < max(OLDEST_TORCH.values(), key=TorchVersion),
    reason="needs a PyTorch that writes every format",
)
# What the tiny models have and no more, for an export takes seconds.
CHANGES = {
    "smca": """
    model.update(in_features=["res5"], num_extra_scales=1)
    model.encoder.pattern = "M"
    """,
    "smca_conv": """
    model.backbone.norm = "FrozenBN"
    model.update(in_features=["res4", "res5"], num_extra_scales=0)
    model.encoder.pop("pattern"), model.encoder.pop("num_heads")
    model.encoder.update(num_layers=1, kernel_size=3)
    """,
    "smca_single_scale": "",
    "detr": """
    model.backbone.norm = "FrozenBN"
    """,
}

# Batches of (height, width); what is smaller than the largest is padded.
BATCHES = [
    [(96, 128)],
    [(70, 300)],
    [(101, 99), (40, 99), (101, 33)],
    [(20, 33)],  # smaller than a cell of the coarsest scale
]


def write_detector(folder, base, **decoder):
    """A tiny detector's config and weights, as arguments of the tool."""
    torch.manual_seed(0)
    config = write_smca_config(folder, base, **{"num_layers": 1, **decoder})
    with open(config, "a") as file:
        file.write(textwrap.dedent(CHANGES[base]))
    provenance = {"class_names": CLASS_NAMES, "category_ids": [7, 9, 2]}
    return ["--config-file", config, "--weights", write_weights(folder, config, smca=provenance)]


def load_predictor(detector):
    return Predictor(detector[3], config_file=detector[1])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny detector's predictor, the ONNX file that the tool writes and its folder."""
    folder = tmp_path_factory.mktemp("smca")
    detector = write_detector(folder, "smca")
    output = folder / "new" / "model.onnx"
    assert tool.main([*detector, "--output", str(output), "--confidence-threshold", "0.2"]) == 0
    return load_predictor(detector), str(output), folder


def make_batch(sizes, seed=0):
    """Random images of these sizes; the same as one array, padded with noise, and the sizes."""
    images = [make_image(*size, seed=seed + i) for i, size in enumerate(sizes)]
    padded = np.random.default_rng(seed).uniform(0, 255, (len(sizes), 3, *np.max(sizes, axis=0)))
    padded = padded.astype(np.float32)
    for pixels, image in zip(padded, images):
        pixels[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return images, padded, np.array(sizes, dtype=np.int64)


def detect(model, images):
    """The model's own detections of a batch, in Detectron2's format."""
    items = [{"image": torch.from_numpy(image.transpose(2, 0, 1).copy())} for image in images]
    with torch.no_grad():
        return [result["instances"] for result in model(items)]


def assert_same(outputs, expected, box_tolerance, score_tolerance=1e-5):
    """Outputs of a graph and the model's detections; boxes in parts of the image's long side."""
    boxes, scores, labels = map(torch.as_tensor, outputs)
    assert boxes.dtype == scores.dtype == torch.float32 and labels.dtype == torch.int64
    for image, wanted in enumerate(expected):
        assert (scores[image].diff() <= 0).all()
        torch.testing.assert_close(scores[image], wanted.scores, rtol=0, atol=score_tolerance)
        chosen = match_detections(
            wanted, scores[image], labels[image], boxes[image], score_tolerance
        )
        difference = (wanted.pred_boxes.tensor[chosen] - boxes[image]).abs().max()
        assert difference <= box_tolerance * max(wanted.image_size)


def run_in(runtime, path):
    if runtime.__name__ == "onnxruntime":
        session = runtime.InferenceSession(path)
        return lambda inputs: session.run(None, inputs)
    # Its plug-in for the CPU may else take bfloat16.
    compiled = runtime.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda inputs: [compiled(inputs)[name] for name in OUTPUTS]


@needs_onnx
@pytest.mark.parametrize("runtime", ["onnxruntime", "openvino"])
def test_runtimes_give_the_models_detections_for_every_size_and_batch(exported, runtime):
    predictor, path, _ = exported
    run = run_in(pytest.importorskip(runtime), path)
    for sizes in BATCHES:
        images, padded, image_sizes = make_batch(sizes)
        outputs = run({"images": padded, "image_sizes": image_sizes})
        assert_same(outputs, detect(predictor.model, images), box_tolerance=1e-5)


@needs_onnx
def test_graph_has_standard_operators_dynamic_sizes_and_metadata(exported):
    onnx = pytest.importorskip("onnx")
    predictor, path, _ = exported
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert not model.functions
    assert not any(node.domain for node in model.graph.node)
    values = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*model.graph.input, *model.graph.output)
    }
    assert values == {
        "images": ["B", 3, "H", "W"],
        "image_sizes": ["B", 2],
        "boxes": ["B", 6, 4],
        "scores": ["B", 6],
        "labels": ["B", 6],
    }
    metadata = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert metadata.pop("smca_version")
    # Those of the attention to each scale are named.
    exact = set(metadata.pop("float32_nodes"))
    kinds = {node.name: node.op_type for node in model.graph.node}
    assert exact < set(kinds)
    num_scales = predictor.model.decoder.num_scales
    assert [kinds[name] for name in exact].count("Softmax") == num_scales
    assert metadata == {
        "class_names": CLASS_NAMES,
        "category_ids": [7, 9, 2],
        "short_side": 96,
        "max_size": 160,
        "threshold": 0.2,
    }


@needs_onnx
def test_example_without_torch_prints_the_models_detections(exported):
    predictor, path, folder = exported
    items, names = [], [str(folder / "a.png"), str(folder / "b.png")]
    for name, size in zip(names, [(90, 120), (200, 90)]):
        resized = T.AugInput(write_image(name, *size))
        predictor.augmentations(resized)
        pixels = torch.from_numpy(resized.image.transpose(2, 0, 1).copy())
        items.append({"image": pixels, "height": size[0], "width": size[1]})
    with torch.no_grad():
        results = [result["instances"] for result in predictor.model(items)]
    code = (
        "import sys, runpy\n"
        "sys.modules['torch'] = sys.modules['detectron2'] = sys.modules['smca'] = None\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    example = str(ROOT / "tools" / "onnx_example.py")
    command = [sys.executable, "-c", code, example, path, *names]
    nothing = subprocess.run([*command, "--threshold", "1"], capture_output=True, text=True)
    assert not nothing.stdout and f"{names[0]}: no score is 1 or more." in nothing.stderr
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [line.split(" ") for line in output.splitlines()]
    for name, found in zip(names, results):
        confident = found[found.scores >= 0.2]
        printed = [line[1:] for line in lines if line[0] == name]
        assert len(printed) == len(confident) > 0
        labels = torch.tensor([CLASS_NAMES.index(label) for label, *_ in printed])
        scores, boxes = torch.tensor([[float(x) for x in line[1:]] for line in printed]).split(
            [1, 4], dim=1
        )
        chosen = match_detections(confident, scores[:, 0], labels, boxes, tolerance=6e-4)
        torch.testing.assert_close(confident.pred_boxes.tensor[chosen], boxes, rtol=0, atol=0.06)


@pytest.mark.parametrize("name", ["gray.png", "10.png", "16.tif", "float.tif", "floats.tif"])
def test_the_example_reads_images_as_the_predictor_does(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "onnxruntime", ModuleType("onnxruntime"))
    example = importlib.import_module("onnx_example")
    gray = make_image()[..., 0]
    levels = {"gray": gray, "10": gray.astype(np.uint16) * 4, "16": gray.astype(np.uint16) * 257}
    levels.update(float=np.float32(gray / 255), floats=np.float32(gray / 2 - 20))
    info = PngInfo()
    info.add(b"sBIT", bytes([12]))  # of the camera, whatever levels the image has
    exif = Image.Exif()
    exif[274] = 6  # turned by 90 degrees
    Image.fromarray(levels[Path(name).stem]).save(tmp_path / name, exif=exif, pnginfo=info)
    pixels = np.asarray(example.read_image(str(tmp_path / name)))
    np.testing.assert_array_equal(pixels, rgb_array(tmp_path / name))
    assert 100 < pixels.mean() < 150


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny detector's config and weights."""
    return write_detector(tmp_path_factory.mktemp("tiny"), "smca_single_scale")


@needs_export
def test_the_average_of_the_weights_and_a_published_folder_can_be_exported(
    tiny, tmp_path, monkeypatch
):
    pytest.importorskip("safetensors", reason="the extra 'publish' is missing")
    seen = []

    def export(predictor, output, *_):
        seen.append(predictor)
        Path(output).touch()

    monkeypatch.setattr("smca.cli.export.export_detector", export)
    average = {name: value * 2 for name, value in torch.load(tiny[3])["model"].items()}
    config = ["--config-file", tiny[1]]
    weights = write_weights(tmp_path, tiny[1], model_ema=average)
    averaged = Predictor(weights, config_file=tiny[1], weights="ema")
    publish.save_pretrained(averaged, str(tmp_path / "published"))
    for given in (
        [*config, "--weights", weights, "--weights-kind", "ema"],
        ["--weights", str(tmp_path / "published")],
    ):
        command = [*given, "--format", "pt2", "--output", str(tmp_path / "model.pt2")]
        assert tool.main(command) == 0
        weight = seen.pop().model.class_embed.weight
        assert torch.equal(weight, average["class_embed.weight"])


@needs_export
def test_pt2_gives_the_models_detections(tmp_path, capfd):
    detector, path = write_detector(tmp_path, "smca_conv"), str(tmp_path / "model.pt2")
    assert tool.main([*detector, "--format", "pt2", "--output", path]) == 0
    assert capfd.readouterr().err == ""  # nothing about names that the user did not give
    extra_files = {METADATA_NAME: ""}
    program = torch.export.load(path, extra_files=extra_files).module()
    predictor = load_predictor(detector)
    for sizes in BATCHES[:-1]:  # it wants two cells a side
        images, padded, image_sizes = make_batch(sizes)
        with torch.no_grad():
            outputs = program(torch.from_numpy(padded), torch.from_numpy(image_sizes))
        assert_same(outputs, detect(predictor.model, images), box_tolerance=1e-5)
    # On a GPU it has to be moved: the graph makes tensors, too.
    moved = move_to_device_pass(torch.export.load(path), "meta")
    nodes = [node for node in moved.graph.nodes if "device" in node.kwargs]
    assert nodes and {str(node.kwargs["device"]) for node in nodes} == {"meta"}
    metadata = json.loads(extra_files[METADATA_NAME])
    assert (metadata["short_side"], metadata["max_size"], metadata["threshold"]) == (96, 160, 0.5)


# ---- The function that is exported


def test_what_lies_under_padding_does_not_matter(tiny):
    detector = ExportableDetector(load_predictor(tiny).model)
    _, padded, image_sizes = make_batch([(101, 99), (40, 60)])
    images = torch.from_numpy(padded)
    other = images.clone()
    other[1, :, 40:], other[1, :, :, 60:] = torch.nan, 0.0
    for one, two in zip(*(detector(x, torch.from_numpy(image_sizes)) for x in (images, other))):
        assert torch.equal(one, two)


def test_frozen_norms_are_absorbed_without_a_change(tmp_path):
    model = load_predictor(write_detector(tmp_path, "detr")).model
    before = set(model.state_dict())
    images, padded, image_sizes = make_batch([(101, 99), (40, 60)])
    detector = ExportableDetector(model)
    outputs = detector(torch.from_numpy(padded), torch.from_numpy(image_sizes))
    assert_same([x.detach() for x in outputs], detect(model, images), box_tolerance=1e-6)
    assert set(model.state_dict()) == before
    assert not any("running_var" in name for name in detector.state_dict())


# ---- Errors


def test_unknown_formats_and_other_names_of_the_file_are_refused(tiny, tmp_path, capsys):
    message = error_of(capsys, tool.main, *tiny, "--format", "onxn", "--output", "a.onnx")
    assert message.endswith("There is no --format onxn, did you mean onnx?")
    message = error_of(capsys, tool.main, *tiny, "--format", "pt2", "--output", "a.onnx")
    assert message.endswith("The output a.onnx needs a name that ends in .pt2.")


@needs_export
def test_other_models_and_other_preprocessing_than_a_resize_are_refused(tiny, tmp_path):
    predictor = load_predictor(tiny)
    predictor.augmentations = T.AugmentationList([T.RandomFlip()])
    for other, words in (
        (predictor, "keep T.ResizeShortestEdge of one size"),
        (Predictor.from_model(torch.nn.Linear(1, 1)), "Only an SMCA or DETR model .* not Linear"),
    ):
        with pytest.raises(ValueError, match=words):
            export_detector(other, str(tmp_path / "model.pt2"), "pt2")
    assert os.listdir(tmp_path) == []
