"""SMCA under autocast on the CPU against itself in float32: how far a half type's rounding takes
centers, boxes, losses and gradients, and that coordinates are computed in float32 all the same."""

from functools import cache
from typing import List, NamedTuple
from unittest import mock

import pytest
import torch
from detectron2.config import instantiate
from detectron2.structures import Boxes, Instances

from helpers import ROOT, randomize
from smca.config import load_config
from smca.modeling import HungarianMatcher
from smca.modeling.detector import Predictions
from smca.modeling.weight_map import WeightMap

SMALL = ["model.embed_dim=32", "model.num_queries=12", "model.num_classes=5", "model.dropout=0"]
SMALL += ["model.backbone.depth=18", "model.backbone.norm=GN", "model.encoder.ffn_dim=48"]
SMALL += ["model.decoder.num_layers=3", "model.decoder.ffn_dim=48", "model.decoder.num_heads=4"]

CASES = {
    "multi_scale": ("smca_r50_50ep", ["model.encoder.pattern=IM"]),
    "conv": ("smca_conv_r50_50ep", ["model.encoder.num_layers=1", "model.encoder.kernel_size=3"]),
}
# In units of the type's eps (2^-7 for bfloat16, 2^-10 for float16), since rounding is the only
# cause. Each is two to five times the largest that was measured on all cases, four seeds and
# kernels for plain x86, AVX2 and AVX-512: these add products in different orders and, where the
# CPU has products of a half type, round at other places.
BOX = 2  # of the image's side
LOGIT = 8
LOSS = 6  # relative
# Cosine between the gradients of all parameters, as one vector.
GRADIENT = {torch.bfloat16: 0.985, torch.float16: 0.998}

# (height, width). So small that encoder layers attend to fewer than 64 cells: on more, PyTorch's
# kernel for bfloat16 fails where ATEN_CPU_CAPABILITY allows less than the CPU has.
SIZES = [(96, 112), (64, 96)]


class Outputs(NamedTuple):
    reference: torch.Tensor
    weight_maps: List[WeightMap]  # of the decoder's layers and their scales
    predictions: Predictions
    losses: dict
    gradient: torch.Tensor


@cache
def make_model(name):
    base, overrides = CASES[name]
    heads = ["model.encoder.num_heads=4"] if name != "conv" else []
    cfg = load_config(str(ROOT / "configs" / f"{base}.py"), [*SMALL, *heads, *overrides])
    cfg.model.backbone.update(num_blocks=[1, 1, 1, 1], width=32)
    model = randomize(instantiate(cfg.model)).train()
    with torch.no_grad():
        for modulation in modulations(model):
            # Maps of different widths, none so narrow that it is all or nothing.
            modulation.spread.weight.mul_(0.5)
    return model


def modulations(model):
    layers = model.decoder.layers
    return [layer.modulation for layer in layers if layer.modulation is not None]


def make_batch():
    generator = torch.Generator().manual_seed(0)
    batch = []
    for height, width in SIZES:
        side = torch.tensor([width, height])
        corner = 0.6 * torch.rand(3, 2, generator=generator) * side
        size = (0.1 + 0.3 * torch.rand(3, 2, generator=generator)) * side
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.cat([corner, corner + size], 1))
        instances.gt_classes = torch.randint(0, 5, (3,), generator=generator)
        shape = (3, height, width)
        image = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        batch.append({"image": image, "instances": instances})
    return batch


def autocast(dtype):
    """None is float32."""
    return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


@cache
def run(name, dtype):
    exact = None if dtype is None else run(name, None).predictions
    model, batch, weight_maps = make_model(name), make_batch(), []
    hooks = [
        module.register_forward_hook(lambda module, args, output: weight_maps.extend(output))
        for module in modulations(model)
    ]
    targets = [model._targets(x) for x in batch]
    matcher = model.criterion.matcher
    with autocast(dtype):
        output = model.forward_features(model.preprocess(batch))
        predictions = model.forward_head(output)
        # Always that of float32: of two queries that suit an object alike, rounding may choose.
        logits, boxes = exact or predictions
        matching = matcher(logits, boxes, targets)
        with mock.patch.object(HungarianMatcher, "forward", lambda *args: matching):
            losses = model.criterion(predictions, targets)
    for hook in hooks:
        hook.remove()
    # float16 would lose small gradients without the factor that the trainer uses, too.
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(1024 * sum(losses.values()), parameters)
    gradient = torch.cat([g.flatten() / 1024 for g in gradients])
    references = None if output.references is None else output.references[0]
    return Outputs(references, weight_maps, predictions, losses, gradient)


def largest(a, b):
    return (a - b).abs().max().item()


every_case = pytest.mark.parametrize("name", CASES)
every_type = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@every_type
@every_case
def test_classes_boxes_and_losses_are_within_a_few_roundings_of_float32(name, dtype):
    eps, half, exact = torch.finfo(dtype).eps, run(name, dtype), run(name, None)
    assert largest(half.predictions.logits, exact.predictions.logits) < LOGIT * eps
    boxes, expected = half.predictions.boxes_cxcywh, exact.predictions.boxes_cxcywh
    assert 0 < largest(boxes, expected) < BOX * eps
    assert half.losses.keys() == exact.losses.keys() and len(half.losses) == 9
    for key, value in exact.losses.items():
        assert half.losses[key].item() == pytest.approx(value.item(), rel=LOSS * eps), key


@every_type
@every_case
def test_the_gradient_points_where_that_of_float32_does(name, dtype):
    half, exact = run(name, dtype).gradient, run(name, None).gradient
    assert torch.cosine_similarity(half, exact, dim=0) > GRADIENT[dtype]
    assert half.norm().item() == pytest.approx(exact.norm().item(), rel=0.1)


@every_type
@every_case
def test_heads_look_where_float32_says_of_the_same_queries(name, dtype):
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(2, 12, 32, generator=generator)
    center = 300 * torch.rand(2, 12, 2, generator=generator)
    model = make_model(name)
    scales = model.encoder(model.scales(model.preprocess(make_batch())))
    for modulation in modulations(model):
        with autocast(dtype):
            maps = modulation(queries, center, scales)
        for actual, expected in zip(maps, modulation(queries, center, scales), strict=True):
            assert largest(actual.centers, expected.centers) < 1e-4
            torch.testing.assert_close(actual.spreads, expected.spreads)
