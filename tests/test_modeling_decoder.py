"""Decoder, and encoder and decoder together, against the reference."""

import pytest
import torch

import reference
from helpers import (
    IMAGE_SIZES,
    assert_close,
    assert_same_gradients,
    assert_uniform,
    bend_dropout,
    make_scales,
    official_state_dict,
    randomize,
    weighted_sum,
    with_leaves,
)
from smca.modeling.decoder import Decoder
from smca.modeling.encoder import TransformerEncoder
from smca.modeling.queries import Queries
from smca.modeling.scales import Scale
from smca.modeling.weight_map import MAPS, Modulation, WeightMap

D, H, FFN, Q = 32, 4, 48, 5
SIZES = dict(embed_dim=D, num_heads=H, ffn_dim=FFN, dropout=0.0)

# (modulation, spread); without modulation the spread has no meaning.
MODES = [(m, s) for m in ("multi_head", "head_shared") for s in MAPS] + [("none", "independent")]


def make_decoder(num_scales=1, num_layers=2, modulation="multi_head", dropout=0.0, **settings):
    """With weight maps of a kind and a spread that the reference knows, or a `Modulation`."""
    keys = {"spread": "map", "beta": "beta", "offset_gain": "offset_gain"}
    maps = {keys[name]: settings.pop(name) for name in keys if name in settings}
    if isinstance(modulation, str):
        per_head = modulation == "multi_head"
        modulation = None if modulation == "none" else Modulation(per_head=per_head, **maps)
    sizes = dict(num_scales=num_scales, num_layers=num_layers, modulation=modulation)
    return Decoder(**{**SIZES, **sizes, "dropout": dropout, **settings})


def query_position(num_queries=Q):
    return torch.randn(num_queries, D, generator=torch.Generator().manual_seed(5))


def pixel_sizes(image_sizes=None):
    """(B, 2) widths and heights."""
    return torch.tensor([[w, h] for h, w in image_sizes or IMAGE_SIZES], dtype=torch.float32)


def decode(decoder, scales, position=None, image_sizes=None):
    position = query_position() if position is None else position
    content = torch.zeros_like(position).expand(len(scales[0].tokens), -1, -1)
    return decoder(scales, Queries(content, position), pixel_sizes(image_sizes))


# Scales, modulation, spread, selection of scales, beta and number of layers.
DECODERS = [([16, 32, 64], *mode, selects, 8.0, 2) for mode in MODES for selects in (False, True)]
DECODERS += [([32], *mode, False, 8.0, 2) for mode in MODES]
DECODERS += [([stride], "multi_head", "independent", False, 8.0, 2) for stride in (8, 16, 64)]
DECODERS += [
    ([16, 16, 32, 64], "multi_head", "independent", True, 8.0, 2),
    ([16, 32], "multi_head", "independent", True, 3.0, 6),
]


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    "strides, modulation, spread, scale_selection, beta, num_layers", DECODERS, ids=str
)
def test_decoder_equals_the_reference(
    strides, modulation, spread, scale_selection, beta, num_layers, dropout, monkeypatch
):
    choices = dict(modulation=modulation, spread=spread, scale_selection=scale_selection, beta=beta)
    decoder = randomize(make_decoder(len(strides), num_layers, dropout=dropout, **choices))
    if dropout:
        bend_dropout(monkeypatch)
    scales, inputs = with_leaves(make_scales(strides))
    inputs["query_position"] = query_position().requires_grad_()
    state_dict = official_state_dict(decoder, "decoder")
    settings = reference.Settings(decoder_layers=num_layers, num_heads=H, **choices)
    position, memory = inputs["query_position"], reference.Memory(*zip(*scales))
    expected, r = reference.decoder(state_dict, position, memory, IMAGE_SIZES, settings)
    hidden, references = decode(decoder, scales, inputs["query_position"])
    assert hidden.shape == (num_layers, len(IMAGE_SIZES), Q, D)
    outputs, expected = [hidden], [torch.stack(expected)]
    if modulation == "none":
        assert references is None
    else:
        assert (references == references[0]).all()
        outputs, expected = outputs + [references[-1]], expected + [r]
    for got, wanted in zip(outputs, expected, strict=True):
        assert_close(got, wanted)
    # Through the Gaussians and two layers, gradients collect a little more than outputs.
    assert_same_gradients(outputs, expected, {**inputs, **state_dict}, 3e-4)


# ------------------------------------------------------------------------- parts and their absence


class Disc(WeightMap):
    """exp(-d^4): all that a shape has to say."""

    initial_spreads = (1.0,)

    def log_weights_at(self, dx, dy):
        (a,) = self.spreads[..., None, None, :].unbind(-1)
        return -((self.factor * (dx**2 + dy**2)) ** 2) * a**2


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_a_map_of_ones_own_is_a_setting(per_head, dropout):
    path = f"{__name__}.Disc"
    assert Modulation(path).map is Disc
    decoder = make_decoder(2, 2, Modulation(Disc, per_head=per_head), dropout)
    weighted_sum([decode(decoder, make_scales([16, 32])).hidden]).backward()
    for layer in decoder.layers:
        assert layer.modulation.spread.weight.grad.any()
        assert layer.modulation.spread.weight.shape[0] == 2 * layer.modulation.num_heads


@pytest.mark.parametrize("name", ["wide", "os.path"])
def test_an_unknown_map_is_named(name):
    with pytest.raises(ValueError, match=name):
        Modulation(name)


# ---------------------------------------------------------------------------- padding and batches


@pytest.mark.parametrize("modulation, spread", MODES)
def test_an_image_gives_the_same_alone_and_padded_in_a_batch(modulation, spread):
    encoder = randomize(TransformerEncoder(pattern="IMI", **SIZES))
    decoder = randomize(make_decoder(3, 2, modulation=modulation, spread=spread))
    batch = make_scales([16, 32, 64])
    small = IMAGE_SIZES[1]
    alone = []
    for scale in batch:
        height, width = [-(-side // scale.stride) for side in small]
        cells = torch.arange(scale.size[0] * scale.size[1]).view(scale.size)
        cells = cells[:height, :width].flatten()
        assert not scale.padding_mask[1, cells].any()
        tokens, position = scale.tokens[1:, cells], scale.position[1:, cells]
        alone.append(Scale(tokens, position, None, (height, width), scale.stride))
    expected = decode(decoder, encoder(alone), image_sizes=[small]).hidden[:, 0]
    assert_close(decode(decoder, encoder(batch)).hidden[:, 1], expected)


# --------------------------------------------------------------------------------- initial values


@pytest.mark.parametrize("modulation, spread", MODES)
def test_initial_values(modulation, spread):
    torch.manual_seed(0)
    decoder = make_decoder(3, 2, modulation=modulation, spread=spread)
    for name, value in decoder.named_parameters():
        if "norm" in name:
            assert (value == (1 if name.endswith("weight") else 0)).all(), name
        elif "spread" in name:
            assert (value == (0 if name.endswith("weight") else 1)).all(), name
        elif "attention" in name and name.endswith("bias"):
            assert not value.any(), name
        elif name.endswith("bias"):
            bound = decoder.get_parameter(name.replace("bias", "weight")).shape[1] ** -0.5
            assert value.abs().max() <= bound, name
            assert value.any(), name
        else:  # Xavier: fan in and fan out of the whole tensor, q, k and v stacked
            assert_uniform(value, (6 / (value.shape[0] + value.shape[1])) ** 0.5)


@pytest.mark.parametrize(
    ("settings", "gain"),
    [
        ({"offset_gain": 0.25}, 0.25),
        ({"offset_gain": 3.0}, 3.0),
        # Without one, as many radii of a map from the center as published: radii are sqrt(beta).
        ({"beta": 0.5}, 0.25),
        ({"beta": 72.0}, 3.0),
        ({"beta": 0.5, "offset_gain": 1.0}, 1.0),
    ],
)
def test_offsets_start_with_their_gain_and_nothing_else_does(settings, gain):
    torch.manual_seed(0)
    decoder, plain = make_decoder(3, 2, **settings), make_decoder(3, 2)
    for (name, value), other in zip(decoder.named_parameters(), plain.parameters(), strict=True):
        if "offset.weight" in name:
            assert_uniform(value, gain * (6 / (value.shape[0] + value.shape[1])) ** 0.5)
        elif value.dim() > 1 and value.any():
            assert value.abs().max().item() == pytest.approx(other.abs().max().item(), rel=0.1)
