"""Attention encoder, convolutional encoder and pyramid encoder against the reference."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import reference
from helpers import (
    IMAGE_SIZES,
    assert_close,
    assert_same_gradients,
    assert_uniform,
    bend_dropout,
    make_scales,
    needs_fake_gpu,
    official_state_dict,
    randomize,
    valid_cells,
    weighted_sum,
    with_leaves,
)
from smca.modeling import layers
from smca.modeling.conv_encoder import ConvEncoder
from smca.modeling.encoder import TransformerEncoder
from smca.modeling.kernels import additive_mask
from smca.modeling.pyramid_encoder import PyramidEncoder
from smca.modeling.scales import Scale

D, H, FFN = 32, 4, 48


def attention_encoder(pattern, dropout=0.0, num_heads=H):
    return TransformerEncoder(
        pattern=pattern, embed_dim=D, num_heads=num_heads, ffn_dim=FFN, dropout=dropout
    )


def conv_encoder(dropout=0.0, **settings):
    defaults = dict(num_layers=2, kernel_size=3, share_cross_scale=False, pointwise=True)
    defaults.update(num_scales=4, reduce_finest=True, embed_dim=D, ffn_dim=FFN, dropout=dropout)
    return ConvEncoder(**{**defaults, **settings})


def pyramid_encoder(dropout=0.0):
    return PyramidEncoder(
        num_scales=3, embed_dim=D, num_heads=H, ffn_dim=FFN, hidden_dim=16, dropout=dropout
    )


ENCODERS = {
    "attention": (partial(attention_encoder, "IMI"), [16, 32, 64]),
    "conv": (conv_encoder, [8, 16, 32, 64]),
    "conv shared": (partial(conv_encoder, share_cross_scale=True), [8, 16, 32, 64]),
    "conv without 1x1": (partial(conv_encoder, pointwise=False), [8, 16, 32, 64]),
}


# ------------------------------------------------------------------------------ attention encoder


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("pattern", ["I", "M", "IM", "MI", "IIMII"])
@pytest.mark.parametrize("strides", [[32], [16, 32, 64]], ids=["one scale", "three scales"])
def test_attention_encoder_equals_the_reference(strides, pattern, dropout, monkeypatch):
    encoder = randomize(attention_encoder(pattern, dropout))
    if dropout:
        bend_dropout(monkeypatch)
    scales, inputs = with_leaves(make_scales(strides))
    state_dict = official_state_dict(encoder, "encoder")
    expected = reference.attention_encoder(
        state_dict,
        [scale.tokens for scale in scales],
        [scale.position for scale in scales],
        [scale.padding_mask for scale in scales],
        pattern,
        H,
    )
    expected = valid_cells(expected, scales)
    output = valid_cells([scale.tokens for scale in encoder(scales)], scales)
    for got, wanted in zip(output, expected, strict=True):
        assert_close(got, wanted)
    assert_same_gradients(output, expected, {**inputs, **state_dict}, 3e-4)


@pytest.mark.parametrize("pattern", ["IXI", "imi"])
def test_unknown_letter_in_the_pattern_is_an_error(pattern):
    with pytest.raises(ValueError, match="pattern"):
        attention_encoder(pattern)


# ---------------------------------------------------------------------------------- conv encoder


@pytest.mark.parametrize("kernel_size", [3, 7])
@pytest.mark.parametrize("share_cross_scale", [False, True])
@pytest.mark.parametrize("pointwise", [False, True])
@pytest.mark.parametrize("strides", [[8, 16, 32, 64], [16, 32, 64]], ids=str)
def test_conv_encoder_equals_the_reference(
    kernel_size, share_cross_scale, pointwise, strides, monkeypatch
):
    settings = dict(share_cross_scale=share_cross_scale, pointwise=pointwise)
    settings.update(num_scales=len(strides), reduce_finest=strides[0] == 8)
    encoder = randomize(conv_encoder(0.1, kernel_size=kernel_size, **settings))
    bend_dropout(monkeypatch)
    scales, inputs = with_leaves(make_scales(strides, [(96, 129), (60, 90)]))
    state_dict = official_state_dict(encoder, "encoder")
    maps = [scale.tokens.transpose(1, 2).unflatten(2, scale.size) for scale in scales]
    positions = [scale.position.transpose(1, 2).unflatten(2, scale.size) for scale in scales]
    expected = reference.conv_encoder(state_dict, maps, positions, num_layers=2)
    if settings["reduce_finest"]:
        expected[0] = reference.convolution(state_dict, "transformer.conv", expected[0], stride=2)
    expected = [reference.to_tokens(x) for x in expected]
    output = [scale.tokens for scale in encoder(scales)]
    for got, wanted in zip(output, expected, strict=True):
        assert_close(got, wanted)
    assert_same_gradients(output, expected, {**inputs, **state_dict}, 3e-4)


def pyramid_reference(encoder, scales):
    """The encoder's formula, with its parameters by name."""
    p = dict(encoder.named_parameters())

    def norm(x, name):
        return F.group_norm(x, 16, p[f"{name}.weight"], p[f"{name}.bias"])

    def block(x, name):
        y = F.relu(norm(F.conv2d(x, p[f"{name}.layers.0.weight"]), f"{name}.layers.1"))
        y = F.conv2d(y, p[f"{name}.layers.3.weight"], padding=1)
        y = F.relu(norm(y, f"{name}.layers.4"))
        return F.relu(x + norm(F.conv2d(y, p[f"{name}.layers.6.weight"]), f"{name}.layers.7"))

    fine, middle, coarse = (
        norm(scale.tokens.mT.unflatten(2, scale.size), f"input_norms.{index}")
        for index, scale in enumerate(scales)
    )
    mask = additive_mask(scales[2].padding_mask, torch.float32)
    tokens = encoder.attention(coarse.flatten(2).mT, scales[2].position, None, [mask])
    coarse = tokens.mT.unflatten(2, scales[2].size)

    def larger(x, like):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)[..., : like[0], : like[1]]

    def down(x, name):
        weight, bias = p[f"{name}.weight"], p[f"{name}.bias"]
        return F.conv2d(x, weight, bias, stride=2, padding=1, groups=D)

    middle = block(middle + larger(coarse, scales[1].size), "to_fine.1")
    fine = block(fine + larger(middle, scales[0].size), "to_fine.0")
    middle = block(middle + down(fine, "down.0"), "to_coarse.0")
    coarse = block(coarse + down(middle, "down.1"), "to_coarse.1")
    weight, bias = p["norm.weight"], p["norm.bias"]
    return [F.layer_norm(x.flatten(2).mT, (D,), weight, bias) for x in (fine, middle, coarse)]


def test_pyramid_encoder_equals_the_reference():
    encoder = randomize(pyramid_encoder())
    scales = make_scales([8, 16, 32])
    for got, wanted in zip(encoder(scales), pyramid_reference(encoder, scales), strict=True):
        assert_close(got.tokens, wanted)


def test_reduced_scale_takes_over_all_else_from_the_second():
    scales = make_scales([8, 16, 32, 64])
    output = conv_encoder()(scales)
    assert [scale.stride for scale in output] == [16, 16, 32, 64]
    assert output[0].size == output[1].size == scales[1].size
    assert torch.equal(output[0].position, scales[1].position)
    assert torch.equal(output[0].padding_mask, scales[1].padding_mask)
    assert not torch.equal(output[0].tokens, output[1].tokens)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(kernel_size=4), "kernel_size=4 must be odd"),
        (dict(num_scales=1), "reduce_finest=True needs at least two scales"),
    ],
)
def test_a_conv_encoder_that_cannot_be_is_an_error(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        conv_encoder(**settings)


# ------------------------------------------------------------------------------------------ both


def run_in_training(encoder, scales):
    """Outputs, the parameters' gradients, and the bytes kept between the two passes."""
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(0)
    encoder.train().zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = [scale.tokens for scale in encoder(scales)]
    weighted_sum(outputs).backward()
    return outputs, [p.grad for p in encoder.parameters()], sum(kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_keeps_less_and_changes_nothing(name, dropout, monkeypatch):
    make, strides = ENCODERS[name]
    encoder, scales = make(dropout=dropout), make_scales(strides)
    assert not encoder.checkpointing
    outputs, gradients, kept = run_in_training(encoder, scales)
    encoder.checkpointing = True
    same_outputs, same_gradients, kept_with_checkpointing = run_in_training(encoder, scales)
    for expected, value in zip(outputs + gradients, same_outputs + same_gradients, strict=True):
        assert_close(value, expected, 1e-6)
    assert kept_with_checkpointing < kept / 2
    monkeypatch.setattr(layers, "checkpoint", None)  # which evaluation does not call
    encoder.eval()(scales)


@needs_fake_gpu
@pytest.mark.parametrize("name", ENCODERS)
def test_checkpointing_keeps_the_random_state_of_a_gpu(name, monkeypatch):
    # Else the second pass would drop other elements than the first. No GPU is needed: its tensors
    # have no data here.
    devices = []

    def device(index):
        devices.append(index)
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "_initialized", True)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: torch.zeros(8))
    make, strides = ENCODERS[name]
    with FakeTensorMode(), torch.device("cuda:0"):
        encoder = make(dropout=0.3).train()
        scales = [
            Scale(torch.ones(2, 4**n, D), torch.ones(2, 4**n, D), None, (2**n, 2**n), stride)
            for n, stride in zip((4, 3, 2, 1), strides)
        ]
        encoder(scales)
        assert not devices
        encoder.checkpointing = True
        encoder(scales)
    assert len(devices) >= len(encoder.layers) and set(devices) == {0}


@pytest.mark.parametrize("name", ENCODERS)
def test_initial_values(name):
    torch.manual_seed(0)
    encoder = ENCODERS[name][0]()
    for key, value in encoder.named_parameters():
        if "norm" in key:
            assert (value == (1 if key.endswith("weight") else 0)).all(), key
        elif "attention" in key and key.endswith("bias"):
            assert not value.any(), key
        elif key.endswith("bias"):
            weight = encoder.get_parameter(key.replace("bias", "weight"))
            assert_uniform(value, weight[0].numel() ** -0.5)
        elif key.startswith("reduce"):
            assert_uniform(value, value[0].numel() ** -0.5)
        else:  # Xavier: fan in and fan out of the whole tensor, q, k and v stacked
            area = value[0, 0].numel()
            assert_uniform(value, (6 / ((value.shape[0] + value.shape[1]) * area)) ** 0.5)


def test_image_sizes_pad_every_scale():
    # What the tests of this file rely on.
    assert all(scale.padding_mask[1].any() for scale in make_scales([8, 16, 32, 64], IMAGE_SIZES))
