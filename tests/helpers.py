"""What tests of several files use: tiny detectors, their configs, data and images; comparisons."""

import json
import logging
import os
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import default_argument_parser
from detectron2.structures import Boxes, Instances
from detectron2.utils.logger import setup_logger
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from convert_checkpoint import official_names
from smca import model_zoo
from smca.modeling.dropout_attention import DropoutAttention
from smca.modeling.matcher import Targets
from smca.modeling.scales import Scale

ROOT = Path(__file__).resolve().parents[1]
CLASS_NAMES = ["round", "square", "long"]
# Matplotlib would read a formula, a label to leave out, or one that is wrong.
ODD_NAMES = [r"$\frac{$", "$5 or 5$", "_x", "", "two\nlines", r"\{%s}^"]

needs_fake_gpu = pytest.mark.skipif(
    torch.__version__ < "2.14", reason="fake tensors of older versions ask the driver of a GPU"
)

# ---- Command lines and processes


def arguments(*args):
    """What the training script reads from its command line."""
    return default_argument_parser().parse_args([str(arg) for arg in args])


def error_of(capsys, main, *args):
    """The only line on stderr that an unsuccessful command leaves.

    Args:
        main: the command, a function of the list of words that gives its exit code.
    """
    assert main([str(arg) for arg in args]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("Error: ")
    return line


def full_disk(*args, **kwargs):
    """Write something."""
    raise OSError(28, "No space left on device")


def child_environment():
    """Of a process that finds the tests' modules, and the package where this process does."""
    paths = [str(ROOT / "tests"), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]
    path = os.pathsep.join(filter(None, paths))
    return {**os.environ, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}


def close_logs():
    """Later tests' messages do not go into the files that this one's loggers have open."""
    for name in ("detectron2", "fvcore", "smca"):
        logger = logging.getLogger(name)
        for handler in list(logger.handlers):
            logger.removeHandler(handler)
        logger.propagate = True  # as before `setup_logger`
    setup_logger.cache_clear()


def state_of(folder):
    """Size and time of the last change of every file, by its path."""
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def metrics_of(folder, key):
    """{iteration: value} as far as a run's metrics.json has it."""
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return {row["iteration"]: row[key] for row in rows if key in row}


def assert_same_bits(a, b, path=""):
    """Tensors and plain values in dicts, lists and tuples; `path` is where a difference is."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same_bits(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for n, (x, y) in enumerate(zip(a, b)):
            assert_same_bits(x, y, f"{path}.{n}")
    else:
        assert a == b, path


# ---- A detector, a data set and a config that are as small as they can be


class TinyDetector(nn.Module):
    """
    Says from the mean colors of an image which box there is; with everything that makes
    resuming hard: dropout, batch norm, and losses that depend on the random state.
    """

    def __init__(self, num_classes=2, width=8, dropout=0.1, batch_norm=True):
        super().__init__()
        norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, width, 3, 2), "norm": norm})
        self.class_embed = nn.Linear(width, num_classes)
        self.bbox_embed = nn.Linear(width, 4)
        self.dropout = nn.Dropout(dropout)
        self.num_classes = num_classes

    def forward(self, batch):
        device = self.class_embed.weight.device
        images = [x["image"].to(device)[:, :16, :16].float() / 255 for x in batch]
        features = self.backbone["norm"](self.backbone["stem"](torch.stack(images)))
        features = self.dropout(features.relu().mean((2, 3)))
        logits, boxes = self.class_embed(features), self.bbox_embed(features).sigmoid()
        return self.losses(batch, logits, boxes) if self.training else self.detect(batch, logits)

    def losses(self, batch, logits, boxes):
        truth = [x["instances"] for x in batch]
        classes = torch.stack([t.gt_classes[0] for t in truth]).to(logits.device)
        corners = torch.stack([t.gt_boxes.tensor[0] for t in truth]).to(logits.device) / 32
        return {
            "loss_ce": F.cross_entropy(logits.float(), classes),
            "loss_bbox": F.l1_loss(boxes.float(), corners),
        }

    def detect(self, batch, logits):
        results = []
        for x, scores in zip(batch, logits.softmax(-1)):
            boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]] * self.num_classes)
            results.append(
                Instances(
                    (x["height"], x["width"]),
                    pred_boxes=Boxes(boxes),
                    scores=scores.cpu(),
                    pred_classes=torch.arange(self.num_classes),
                )
            )
        return [{"instances": result} for result in results]


class MeanLoss(nn.Module):
    """A linear layer whose loss is the mean over the batch, a tensor (N, 3)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return {"loss": self.layer(batch).float().square().mean()}


def write_coco(json_file, image_root, annotations, categories, image_ids, size, seed=0):
    """Images of noise, which are called by their ids, and their COCO JSON; gives its content.

    Args:
        categories: names by id.
        size: (height, width) of all images.
    """
    image_root.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    images = []
    for image_id in image_ids:
        name = f"{image_id}.png"
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(image_root / name)
        images.append({"id": image_id, "file_name": name, "height": size[0], "width": size[1]})
    categories = [{"id": key, "name": name} for key, name in categories.items()]
    content = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    json_file.write_text(json.dumps(content))
    return content


def write_dataset(folder, num_objects=(1,) * 8):
    """Random 32 x 32 images, each with so many boxes, as files and COCO JSON, in a new folder or
    one that is there."""
    annotations = []
    for n, count in enumerate(num_objects):
        of_image = {"image_id": n + 1, "category_id": 1 + n % 2, "iscrowd": 0}
        for k in range(count):
            width, height = 16 - 3 * k, 16 - k
            box = {"bbox": [4 + n % 3 + 3 * k, 4 + k, width, height], "area": width * height}
            annotations.append({"id": len(annotations) + 1, **of_image, **box})
    classes, image_ids = {1: "round", 2: "square"}, range(1, 1 + len(num_objects))
    write_coco(folder / "truth.json", folder, annotations, classes, image_ids, (32, 32))


def write_tiny_config(folder, **changes):
    """
    A LazyConfig for :class:`TinyDetector` on :func:`write_dataset`, in `folder`.

    Args:
        changes: of ``train``, e.g. ``max_iter=4``.
    """
    write_dataset(folder)
    text = f"""
        import detectron2.data.transforms as T
        import torch
        from detectron2.config import LazyCall as L
        from detectron2.data import (
            DatasetCatalog, DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
        )
        from detectron2.data.datasets import register_coco_instances
        from detectron2.evaluation import COCOEvaluator
        from detectron2.solver.build import get_default_optimizer_params
        from fvcore.common.param_scheduler import MultiStepParamScheduler

        from helpers import TinyDetector
        from smca.configs.common.train import train as default_train
        from smca.data.loader import build_train_loader

        name = "tiny:{folder}"
        if name not in DatasetCatalog:
            register_coco_instances(name, {{}}, "{folder}/truth.json", "{folder}")

        model = L(TinyDetector)(num_classes=2)
        dataloader = dict(
            train=L(build_train_loader)(
                dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
                mapper=L(DatasetMapper)(
                    is_train=True,
                    image_format="RGB",
                    augmentations=[L(T.RandomFlip)(), L(T.RandomBrightness)(
                        intensity_min=0.5, intensity_max=1.5)],
                ),
                total_batch_size=4,
                num_workers=0,
                seed="${{train.seed}}",
            ),
            test=L(build_detection_test_loader)(
                dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
                mapper=L(DatasetMapper)(is_train=False, image_format="RGB", augmentations=[]),
                num_workers=0,
            ),
            evaluator=L(COCOEvaluator)(dataset_name=name),
        )
        optimizer = L(torch.optim.AdamW)(
            params=L(get_default_optimizer_params)(base_lr="${{..lr}}"), lr=1e-2
        )
        lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[2, 4])
        train = dict(default_train)
        train.update(output_dir="{folder}/run", device="cpu", max_iter=4, eval_period=2)
        train.update(log_period=1, checkpointer=dict(period=2, max_to_keep=5))
        train.update(model_ema=dict(enabled=True, decay=0.9))
        train.update({changes!r})
    """
    path = folder / "config.py"
    path.write_text(textwrap.dedent(text))
    return str(path)


# ---- A tiny SMCA with random weights, its config and images


def build_model(config, *overrides):
    """The model of one of the package's configs, or of configs/common/models, by its name."""
    common = ROOT / "configs" / "common" / "models" / f"{config}.py"
    config = LazyConfig.load(str(common)) if common.exists() else model_zoo.get_config(config)
    return instantiate(LazyConfig.apply_overrides(config, list(overrides)).model)


_SMCA_CONFIG = """
    from detectron2.config import LazyConfig
    from omegaconf import OmegaConf

    common = "{root}/configs/common/"
    model = LazyConfig.load(common + "models/{base}.py").model
    dataloader = LazyConfig.load(common + "coco.py").dataloader
    optimizer = LazyConfig.load(common + "optimizer.py").optimizer
    train = LazyConfig.load(common + "train.py").train

    model.backbone.update(depth=18, num_blocks=[1, 1, 1, 1], width=32, norm="GN", freeze_at=0)
    model.update(embed_dim=16, num_classes=3, num_queries=6)
    model.encoder.update(pattern="I", ffn_dim=16, num_heads=2)
    model.decoder.update(num_layers=2, ffn_dim=16, num_heads=2)
    for _key, _value in {decoder!r}.items():
        OmegaConf.update(model.decoder, _key, _value)
    dataloader.test.mapper.augmentations.update(short_sides=96, max_size=160)
    dataloader.test.num_workers = 0
    dataloader.test.dataset.names = "smca_shapes_val"
    optimizer.lr = 1e-4
    lr_multiplier = dict()
    train.update(device="cpu", output_dir="{folder}/run")
"""


def write_smca_config(folder, base="smca", **decoder):
    """A LazyConfig of a tiny variant of configs/common/models/{base}.py.

    Args:
        decoder: changes of its decoder, by keys such as "modulation.map".
    """
    path = folder / f"tiny_{base}.py"
    text = _SMCA_CONFIG.format(root=ROOT, base=base, folder=folder, decoder=decoder)
    path.write_text(textwrap.dedent(text))
    return str(path)


def make_smca(config):
    """
    The model of a config with random weights. Its scores are on both sides of 1/2, no spread or
    scale weight is at its start, and heads' centers are near their query's.
    """
    model = randomize(instantiate(LazyConfig.load(config).model)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "class_embed" in name:
                parameter.mul_(0 if name.endswith("bias") else 4)
        for layer in model.decoder.layers:
            if layer.modulation is not None and layer.modulation.spread is not None:
                layer.modulation.spread.weight.mul_(0.3)
            if layer.modulation is not None and layer.modulation.offset is not None:
                layer.modulation.offset.weight.mul_(0.3)
    return model


def write_weights(folder, config, **others):
    """The weights of :func:`make_smca`, and what a checkpoint holds beside them."""
    path = folder / "tiny.pth"
    torch.save({"model": make_smca(config).state_dict(), **others}, path)
    return str(path)


def make_image(height=90, width=120, seed=0):
    """A random uint8 RGB image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def make_ramp(height, width):
    """A uint8 RGB image that keeps its values within 3 where a library resamples it: from left to
    right, from top to bottom, and even."""
    x, y = np.linspace(0, 255, width), np.linspace(0, 255, height)[:, None]
    return np.stack(np.broadcast_arrays(x, y, 100.0), axis=-1).astype(np.uint8)


def write_image(path, *args, **kwargs):
    """Lossless, so that what is read is what was made."""
    image = make_image(*args, **kwargs)
    Image.fromarray(image).save(path)
    return image


# ---- Inputs of the model's parts, and comparisons of tensors

# (height, width) in pixels; the second is padded in a batch of both, at every stride up to 64.
IMAGE_SIZES = [(96, 128), (40, 60)]


def pixel_mask(image_sizes):
    """(B, H, W) mask, True on padding, of a batch padded to its largest height and width."""
    height = max(size[0] for size in image_sizes)
    width = max(size[1] for size in image_sizes)
    mask = torch.ones(len(image_sizes), height, width, dtype=torch.bool)
    for image_mask, (h, w) in zip(mask, image_sizes):
        image_mask[:h, :w] = False
    return mask


def make_scales(strides, image_sizes=None, num_channels=32, seed=0):
    """Scales with random features and positions, and the masks of the image sizes."""
    generator = torch.Generator().manual_seed(seed)
    mask = pixel_mask(image_sizes or IMAGE_SIZES)
    scales = []
    for stride in strides:
        size = (-(-mask.shape[1] // stride), -(-mask.shape[2] // stride))
        shape = (len(mask), size[0] * size[1], num_channels)
        scales.append(
            Scale(
                tokens=torch.randn(shape, generator=generator),
                position=torch.randn(shape, generator=generator),
                padding_mask=reference.resize_mask(mask, *size).flatten(1),
                size=size,
                stride=stride,
            )
        )
    return scales


def bend_dropout(monkeypatch):
    """Put a bend in place of dropout in the package and in the reference, so that results tell what
    it was applied to."""

    def bend(x, p=0.5, training=True, inplace=False):
        return x + 0.3 * torch.sin(2 * x) if training and p else x

    def attend(query, key, value, mask, p):
        logits = query @ key.mT
        weights = (logits if mask is None else logits + mask).softmax(-1)
        return bend(weights, p) @ value * (1 - p)

    monkeypatch.setattr(F, "dropout", bend)
    monkeypatch.setattr(DropoutAttention, "apply", staticmethod(attend))
    monkeypatch.setattr(reference, "dropout", bend)


def random_predictions(num_layers, num_images, num_queries, num_classes, seed=0):
    """Logits (N, B, Q, C) and normalized cxcywh boxes (N, B, Q, 4)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_images, num_queries)
    logits = 2 * torch.randn(*shape, num_classes, generator=generator)
    return logits, 0.05 + 0.9 * torch.rand(*shape, 4, generator=generator)


def random_targets(num_objects, num_classes, seed=0):
    """Targets with so many objects in each image."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return [
        Targets(
            torch.randint(0, num_classes, (count,), generator=generator),
            0.1 + 0.8 * torch.rand(count, 4, generator=generator),
        )
        for count in num_objects
    ]


def randomize(module, seed=0):
    """Give every parameter random values, so that none is 0 or 1 where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                near_one = name.endswith(("weight", "spread.bias"))
                parameter.copy_(0.2 * noise + (1.0 if near_one else 0.0))
    return module


def assert_close(actual, expected, tolerance=1e-4):
    """Largest difference at most `tolerance` of the largest expected value (or of 1)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    bound = tolerance * max(expected.abs().max().item(), 1.0) if expected.numel() else 0
    difference = (actual - expected).abs().max().item() if expected.numel() else 0
    assert difference <= bound, f"differs by {difference:.2e}, allowed {bound:.2e}"


def match_detections(found, scores, classes, boxes, tolerance=1e-5):
    """
    Find expected detections of an image among those that were found. Where scores are equal but
    for rounding, chance says which comes first, so places in the lists are not compared.

    Args:
        found (Instances): detections, by falling score.
        scores, classes, boxes: (N,), (N,) and (N, 4) xyxy in pixels, by falling score.
        tolerance: of a score.

    Returns:
        Tensor: (N,) indices of the ones found, each of its expectation's class and score, and
        the nearest of these.
    """
    assert (found.scores.diff() <= 0).all(), "not by falling score"
    wrong = (found.scores[None] - scores[:, None]).abs() > tolerance
    wrong |= found.pred_classes[None] != classes[:, None]
    distances = torch.cdist(boxes.double(), found.pred_boxes.tensor.double(), p=1).detach()
    far = 1 + distances.max() * (len(scores) + 1)
    _, indices = linear_sum_assignment(torch.where(wrong, far, distances).numpy())
    chosen = torch.from_numpy(indices)
    missing = wrong[torch.arange(len(scores)), chosen].nonzero().flatten().tolist()
    assert not missing, f"no detection of the class and score of the expected ones {missing}"
    return chosen


def assert_same_detections(found, expected, tolerance=1e-5):
    """Scores, classes and boxes of two images' detections, but for the order of equal scores."""
    assert len(found) == len(expected) and found.image_size == expected.image_size
    assert_close(found.scores, expected.scores, tolerance)
    boxes = expected.pred_boxes.tensor
    chosen = match_detections(found, expected.scores, expected.pred_classes, boxes, tolerance)
    assert_close(found.pred_boxes.tensor[chosen], boxes, tolerance)


def assert_same_gradients(actual, expected, inputs, tolerance=1e-4):
    """Gradients of two (lists of) outputs by each of `inputs`, a dict name -> tensor."""
    generator = torch.Generator().manual_seed(0)
    actual = actual if isinstance(actual, (list, tuple)) else [actual]
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    weights = [torch.randn(output.shape, generator=generator) for output in expected]
    gradients = []
    for outputs in (actual, expected):
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights))
        gradients.append(
            torch.autograd.grad(total, list(inputs.values()), retain_graph=True, allow_unused=True)
        )
    for name, got, wanted in zip(inputs, *gradients):
        assert got is not None and wanted is not None, f"{name} is not used"
        bound = tolerance * max(wanted.abs().max().item(), 1.0)
        difference = (got - wanted).abs().max().item()
        assert difference <= bound, f"{name}: differs by {difference:.2e}, allowed {bound:.2e}"


def assert_uniform(values, bound):
    """Values look drawn from uniform(-bound, bound)."""
    assert values.abs().max() <= bound * 1.0001
    spread = values.std().item() / (bound / 3**0.5)
    slack = 4 / values.numel() ** 0.5
    assert 1 - slack < spread < 1 + slack, f"{spread:.2f} times the expected standard deviation"


def official_state_dict(module, part=""):
    """The parameters themselves, under the official names: gradients reach the module, which may be
    the `part` "encoder" or "decoder" of a detector."""
    parameters = {f"{part}.{name}".lstrip("."): x for name, x in module.named_parameters()}
    return {official: parameters[name] for name, official in official_names(parameters).items()}


def leaves(tensors):
    """A dict of tensors as leaves that require gradients."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def with_leaves(scales):
    """The scales on leaf tokens and positions, and these leaves by name."""
    inputs = {}
    for i, scale in enumerate(scales):
        inputs[f"tokens{i}"] = scale.tokens
        inputs[f"position{i}"] = scale.position
    inputs = leaves(inputs)
    scales = [
        scale._replace(tokens=inputs[f"tokens{i}"], position=inputs[f"position{i}"])
        for i, scale in enumerate(scales)
    ]
    return scales, inputs


def valid_cells(tokens, scales):
    """Tokens with those under padding set to 0: what these hold has no meaning."""
    return [x.masked_fill(s.padding_mask[..., None], 0) for x, s in zip(tokens, scales)]


def weighted_sum(tensors):
    """A scalar that depends on every element, unlike the sum behind a LayerNorm."""
    generator = torch.Generator().manual_seed(0)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in tensors)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        for output in outputs:
            # A view that repeats one element (stride 0) holds no memory of its own.
            if isinstance(output, torch.Tensor) and 0 not in output.stride():
                self.num_elements = max(self.num_elements, output.numel())
        return result
