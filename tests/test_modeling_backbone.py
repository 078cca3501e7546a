"""Frozen batch norm folded into convolutions: the same function, names and gradients."""

import copy
from unittest import mock

import pytest
import torch
import torchvision
from detectron2.layers import Conv2d, FrozenBatchNorm2d, ShapeSpec
from torch import nn

from smca.modeling import backbone, neck
from smca.modeling.backbone import FrozenNormConv2d, build_resnet, fold_frozen_norms


def resnet(depth=18, norm="FrozenBN", freeze_at=2, **settings):
    """Without the folding."""
    with mock.patch.object(backbone, "fold_frozen_norms"):
        return build_resnet(
            depth=depth, out_features=["res5"], norm=norm, freeze_at=freeze_at, **settings
        )


def randomize_norms(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for norm in module.modules():
        if isinstance(norm, FrozenBatchNorm2d):
            for buffer in norm.buffers():
                buffer.copy_(0.5 + torch.rand(buffer.shape, generator=generator))
    return module


def run(module, image):
    """Output and the gradients of all parameters."""
    output = module(image)
    output = output["res5"] if isinstance(output, dict) else output
    module.zero_grad()
    output.square().mean().backward()
    return output.detach(), {name: p.grad for name, p in module.named_parameters()}


def assert_same(folded, plain, image):
    (output, gradients), (expected, expected_gradients) = run(folded, image), run(plain, image)
    torch.testing.assert_close(output, expected, atol=1e-5 * expected.abs().max().item(), rtol=0)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        if gradient is None:  # a frozen stage
            assert gradients[name] is None, name
            continue
        largest = gradient.abs().max().item()
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4 * largest, rtol=0)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", [None, nn.functional.relu])
def test_a_folded_convolution_equals_convolution_norm_activation(bias, activation):
    torch.manual_seed(0)
    norm = FrozenBatchNorm2d(8)
    settings = dict(stride=2, padding=1, groups=2, bias=bias, norm=norm, activation=activation)
    plain = randomize_norms(Conv2d(6, 8, 3, **settings))
    folded = fold_frozen_norms(copy.deepcopy(plain))
    assert isinstance(folded, FrozenNormConv2d)
    assert_same(folded, plain, torch.randn(2, 6, 9, 11))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_a_folded_convolution_follows_what_changes(with_gradients):
    torch.manual_seed(0)
    plain = randomize_norms(Conv2d(6, 8, 3, bias=False, norm=FrozenBatchNorm2d(8)))
    folded, image = fold_frozen_norms(plain), torch.randn(2, 6, 9, 11)
    unfolded = Conv2d(6, 8, 3, bias=False, norm=plain.norm)
    unfolded.weight = plain.weight
    with torch.set_grad_enabled(with_gradients):
        for tensor in [None, *folded.state_dict().values()]:
            if tensor is not None:
                tensor.mul_(1.5)
            torch.testing.assert_close(folded(image), unfolded(image), atol=1e-4, rtol=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            assert folded(image).dtype == torch.bfloat16
        torch.testing.assert_close(folded(image), unfolded(image), atol=1e-4, rtol=1e-4)
    copied = copy.deepcopy(folded)
    with torch.no_grad():
        copied.norm.weight.zero_()
        assert torch.equal(copied(image), folded.norm.bias.expand(2, 7, 9, 8).permute(0, 3, 1, 2))


@pytest.mark.parametrize("depth, channels", [(18, [16, 32, 64, 128]), (50, [64, 128, 256, 512])])
def test_width_scales_all_channels(depth, channels):
    model = resnet(depth, width=16)
    assert [stage[-1].out_channels for stage in model.stages] == channels
    assert model.stem.conv1.out_channels == model.stages[0][0].in_channels == 16


def test_a_dilated_stage_is_torchvisions():
    def convolutions(blocks):
        return [(b.conv2.stride, b.conv2.dilation, b.conv2.padding) for b in blocks]

    expected = torchvision.models.resnet50(replace_stride_with_dilation=[False, False, True])
    stages = resnet(50, dilated_res5=True).stages
    assert convolutions(stages[3]) == convolutions(expected.layer4)
    assert convolutions(stages[2]) == convolutions(expected.layer3)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_folded_resnet_equals_the_plain_one(depth):
    torch.manual_seed(0)
    plain = randomize_norms(resnet(depth, num_blocks=[1, 1, 1, 1])).train()
    folded = fold_frozen_norms(copy.deepcopy(plain))
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert_same(folded, plain, torch.randn(1, 3, 64, 96))


def test_every_norm_of_a_resnet_is_folded():
    modules = list(
        build_resnet(depth=50, out_features=["res5"], norm="FrozenBN", freeze_at=2).modules()
    )
    norms = sum(isinstance(m, FrozenBatchNorm2d) for m in modules)
    assert norms == sum(isinstance(m, FrozenNormConv2d) for m in modules) == 53


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_norms_that_learn_are_left_alone(norm):
    model = fold_frozen_norms(resnet(norm=norm, freeze_at=0))
    assert not any(isinstance(m, FrozenNormConv2d) for m in model.modules())


def test_a_norm_that_learns_put_in_later_is_the_one_that_runs():
    torch.manual_seed(0)
    plain = randomize_norms(Conv2d(6, 8, 3, norm=FrozenBatchNorm2d(8), activation=torch.relu))
    folded = fold_frozen_norms(copy.deepcopy(plain))
    plain.norm, folded.norm = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    image = torch.randn(2, 6, 9, 11)
    assert_same(folded, plain, image)  # the batch's statistics, and gradients of the norm
    assert torch.equal(folded.norm.running_mean, plain.norm.running_mean)
    assert folded.norm.running_mean.any()
    plain.norm = folded.norm = None
    assert torch.equal(folded(image), plain(image))


def test_each_extra_scale_is_made_from_the_one_before():
    shapes = {"res4": ShapeSpec(channels=6, stride=16), "res5": ShapeSpec(channels=10, stride=32)}
    projection = neck.ScaleProjection(shapes, ["res4", "res5"], num_extra_scales=2, embed_dim=4)
    fine, coarse = torch.randn(1, 6, 16, 24), torch.randn(1, 10, 8, 12)
    first = projection.extra[0](coarse)
    expected = [
        projection.projections["res4"](fine),
        projection.projections["res5"](coarse),
        first,
        projection.extra[1](first),
    ]
    maps = projection({"res4": fine, "res5": coarse})
    assert all(torch.equal(*pair) for pair in zip(maps, expected, strict=True))
    assert projection.strides == [16, 32, 64, 128]


@pytest.mark.parametrize(
    "in_features, num_extra_scales, message",
    [
        (["res5"], 0, "in_features names .'res5'., but the backbone gives .'res4'."),
        ([], 1, "in_features is empty"),
        (["res4"], -1, "num_extra_scales=-1 must not be negative"),
    ],
)
def test_scales_that_cannot_be_made_are_an_error(in_features, num_extra_scales, message):
    shapes = {"res4": ShapeSpec(channels=6, stride=16)}
    with pytest.raises(ValueError, match=message):
        neck.ScaleProjection(shapes, in_features, num_extra_scales, embed_dim=4)
