"""Attention and spatially modulated co-attention against full maps."""

from functools import lru_cache

import pytest
import torch
from scipy.stats import chisquare

import reference
from helpers import (
    LargestTensor,
    assert_close,
    assert_same_gradients,
    leaves,
    make_scales,
    randomize,
    weighted_sum,
)
from smca.modeling import dropout_attention, kernels
from smca.modeling.attention import CoAttention, MultiheadAttention
from smca.modeling.kernels import additive_mask, attend, fit_channels
from smca.modeling.weight_map import MAPS

D, H, Q, B = 32, 4, 5, 2
HALF_TYPES = [torch.bfloat16, torch.float16]
# What rounding of the inputs and of the result costs any attention, of the largest value.
ROUNDING = {torch.bfloat16: 1.5e-2, torch.float16: 2e-3}
CHANNEL_SPREADS = ["fixed", "single", "independent"]
NUM_SPREADS = {"fixed": 0, "single": 1, "independent": 2, "covariance": 3}


def random_tensor(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_gaussians(size, spread, num_queries=Q, num_heads=H, seed=0):
    """Centers (B, Q, H, 2) on and around a map of (h, w) cells, and spreads (B, Q, H, n)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (B, num_queries, num_heads)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    centers = (torch.rand(*shape, 2, generator=generator) * 1.6 - 0.3) * extent
    spreads = torch.rand(*shape, NUM_SPREADS[spread], generator=generator) * 1.5 + 0.2
    return leaves({"centers": centers, "spreads": spreads})


def make_map(centers, spreads, spread, size, beta=8.0, factor=1.0):
    """The package's map of one scale of (h, w) cells, of centers (B, Q, H, 2) and spreads
    (B, Q, H, n)."""
    return MAPS[spread](centers.transpose(1, 2), spreads.transpose(1, 2), factor / beta, size)


def logit_factor(dtype):
    """What the attention kernel multiplies logits with, the channels' products among them."""
    return (D // H) ** -0.5 if dtype in HALF_TYPES else 1.0


def channels_of(weight_map, dtype=torch.float32):
    """Of the queries and of the cells, as the attention kernel meets them."""
    return fit_channels(weight_map.channels(), dtype, logit_factor(dtype))


def make_mask(scale):
    return additive_mask(scale.padding_mask, torch.float32)


def modulated_attention(query, key, value, weight_map, mask=None, dropout=0.0):
    """(B, N, D) tokens, already projected, to (B, Q, D)."""
    heads = [x.unflatten(-1, (H, D // H)).transpose(1, 2) for x in (query, key, value)]
    return attend(*heads, mask, dropout, weight_map).transpose(1, 2).flatten(2)


def used(inputs, spread):
    return {k: v for k, v in inputs.items() if k != "spreads" or spread != "fixed"}


# ------------------------------------------------------------------------------ plain attention


def test_multihead_attention_reads_the_weights_of_torch():
    attention = randomize(MultiheadAttention(D, H))
    theirs = torch.nn.MultiheadAttention(D, H, batch_first=True)
    theirs.load_state_dict(attention.state_dict())
    query, key = random_tensor(B, Q, D), random_tensor(B, 48, D, seed=1)
    assert_close(attention(query, key, key), theirs(query, key, key)[0], 1e-5)


# ------------------------------------------------------------------- log-weights of the Gaussians


@pytest.mark.parametrize("spread", MAPS)
def test_log_weights_equal_the_reference(spread):
    inputs = random_gaussians((6, 8), spread)
    inputs["spreads"].data.sub_(1)  # of both signs
    expected = reference.log_weights(6, 8, *inputs.values(), spread, beta=8.0, factor=0.5)
    maps = make_map(*inputs.values(), spread, (6, 8), factor=0.5).log_weights().flatten(3)
    assert_close(maps, expected)
    assert_same_gradients(maps, expected, used(inputs, spread))


def spread_far(size, spread, num_queries=Q):
    """Spreads up to 4, and centers from 3 cells outside the map to 3 beyond its other end."""
    inputs = random_gaussians(size, spread, num_queries)
    extent = torch.tensor([size[1], size[0]], dtype=torch.float32)
    with torch.no_grad():
        inputs["centers"].copy_((inputs["centers"] / extent + 0.3) / 1.6 * (extent + 6) - 3)
        inputs["centers"][0, 0, 0] = torch.tensor([0.0, 0.0])
        inputs["centers"][0, 0, 1] = extent - 1
        inputs["centers"][0, 1, 0] = torch.tensor([-3.0, -3.0])
        inputs["centers"][0, 1, 1] = extent + 2
        inputs["spreads"].copy_((inputs["spreads"] - 0.2) / 1.5 * 3.8 + 0.2)
    return inputs


@lru_cache(maxsize=None)
def far_case(size, spread):
    """Such centers and spreads, and the log-weights in float64."""
    inputs = spread_far(size, spread, num_queries=3)
    exact = {name: value.detach().double() for name, value in inputs.items()}
    return inputs, reference.log_weights(*size, *exact.values(), spread)


def dot_products(query, cells):
    """Log-weights that channels give, their products added in float32."""
    return query.float() @ cells.float().T * logit_factor(query.dtype)


# Cells further down than this weigh nothing.
NEGLIGIBLE = -30


@pytest.mark.parametrize("size", [(1, 7), (25, 42), (100, 168)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("spread", CHANNEL_SPREADS)
def test_channels_are_exact_enough_up_to_the_border_of_large_maps(spread, dtype, size):
    inputs, expected = far_case(size, spread)
    query, cells = channels_of(make_map(*inputs.values(), spread, size), dtype)
    assert query.dtype == cells.dtype == dtype
    difference = (dot_products(query, cells) - expected).abs()
    assert difference[expected > NEGLIGIBLE].max() < 1e-2
    # Cells of no weight may be off by more, but not so that they would gain any.
    assert (difference / (1 - expected)).max() < 1e-2


@pytest.mark.parametrize("value", [64.0, 1000.0, 65504.0])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF_TYPES], ids=str)
@pytest.mark.parametrize("spread", [name for name in MAPS if name != "fixed"])
def test_the_narrowest_map_reads_the_cell_at_its_center(spread, dtype, value):
    size, cells = (100, 168), torch.tensor([[0, 0], [167, 99], [84, 50], [3, 98]])
    centers = (cells + torch.tensor([0.2, -0.1]))[None, :, None].requires_grad_()
    spreads = torch.full((1, 4, 1, NUM_SPREADS[spread]), value, requires_grad=True)
    query, key = (torch.zeros(1, 1, n, D, dtype=dtype) for n in (4, size[0] * size[1]))
    memory = random_tensor(*key.shape).to(dtype)
    out = attend(query, key, memory, weight_map=make_map(centers, spreads, spread, size))
    expected = memory[:, :, cells[:, 1] * size[1] + cells[:, 0]]
    assert_close(out, expected, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    gradients = torch.autograd.grad(out.float().sum(), [centers, spreads])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("is_added", [False, True])
@pytest.mark.parametrize("spread", MAPS)
def test_in_float16_no_map_is_nan_wherever_its_center_is(spread, is_added, monkeypatch):
    if is_added:  # as on a GPU
        monkeypatch.setattr(kernels, "_can_add", lambda *args: True)
    size, centers = (25, 42), torch.tensor([[65504.0, 0.0], [-65504.0, 65504.0]])[None, :, None]
    query, key = (torch.zeros(1, 1, n, D, dtype=torch.float16) for n in (2, 25 * 42))
    for value in (1e-4, 1.0, 65504.0):
        spreads = torch.full((1, 2, 1, NUM_SPREADS[spread]), value)
        out = attend(query, key, key + 1, weight_map=make_map(centers, spreads, spread, size))
        assert_close(out.float(), torch.ones(1, 1, 2, D), 1e-2)


@pytest.mark.parametrize("spread", CHANNEL_SPREADS[1:])
def test_an_image_gives_the_same_beside_one_with_narrow_maps(spread):
    size = (25, 42)
    inputs = random_gaussians(size, spread)
    with torch.no_grad():
        inputs["spreads"][1] *= 30
    tokens = [random_tensor(B, n, D, seed=n) for n in (Q, 1050, 1051)]
    tokens[2] = tokens[2][:, 1:]
    both = make_map(*inputs.values(), spread, size)
    alone = make_map(*(x[:1] for x in inputs.values()), spread, size)
    # The neighbor takes more channels.
    assert channels_of(both)[1].shape[1] == 2 * channels_of(alone)[1].shape[1]
    expected = modulated_attention(*(x[:1] for x in tokens), alone)
    assert_close(modulated_attention(*tokens, both)[:1], expected, 1e-5)


# --------------------------------------------------------------------- modulated attention itself


@pytest.mark.parametrize("size", [1.0, 30.0, 1e3, 1e4], ids=str)
def test_gradients_of_logits_of_any_size_are_right(size):
    heads = [(B, H, n, D // H) for n in (300, 1050, 1050)]
    tokens = [random_tensor(*shape, seed=seed) for seed, shape in enumerate(heads)]
    tokens = [(x * factor).requires_grad_() for x, factor in zip(tokens, (size, size, 1))]
    exact = [x.detach().double().requires_grad_() for x in tokens]
    query, key, value = exact
    expected = (query @ key.transpose(-2, -1) / (D // H) ** 0.5).softmax(-1) @ value
    output = attend(*tokens)
    weights = random_tensor(*expected.shape, seed=4)
    gradients = torch.autograd.grad((output * weights).sum(), tokens)
    wanted = torch.autograd.grad((expected * weights).sum(), exact)
    # A logit is rounded by 1e-7 of it, and weights by as much as that is. (Of the largest sizes one
    # weight is 1, and gradients of logits are 0: there, too.)
    assert_close(output.double(), expected, 1e-5 * size)
    for got, want, factor in zip(gradients, wanted, (size, size, 1), strict=True):
        assert (got - want).abs().max() < 1e-5 * (1 + size * factor * want.abs().max())


@pytest.mark.parametrize("size", [(25, 42), (100, 168)], ids=str)
@pytest.mark.parametrize("spread", CHANNEL_SPREADS)
def test_modulated_attention_is_right_for_any_spread_on_large_maps(spread, size):
    # With the Gaussians' products in 5 channels, what is near a border would be off by 5e-4.
    num_cells = size[0] * size[1]
    shapes = {"query": (B, Q, D), "key": (B, num_cells, D), "value": (B, num_cells, D)}
    tokens = {name: random_tensor(*shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    inputs = {**leaves(tokens), **spread_far(size, spread)}
    exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    maps = reference.log_weights(*size, exact["centers"], exact["spreads"], spread)
    expected = reference.attend(*[exact[name] for name in shapes], H, None, maps)

    weight_map = make_map(inputs["centers"], inputs["spreads"], spread, size)
    output = modulated_attention(*[inputs[name] for name in shapes], weight_map)
    assert_close(output.double(), expected, 1e-5)
    weights = random_tensor(*expected.shape, seed=4)
    names = list(used(inputs, spread))
    gradients = torch.autograd.grad((output * weights).sum(), [inputs[n] for n in names])
    wanted = torch.autograd.grad((expected * weights).sum(), [exact[n] for n in names])
    for name, got, want in zip(names, gradients, wanted, strict=True):
        # The spread's gradient is a difference of large sums over squared coordinates.
        tolerance = 3e-4 if name == "spreads" else 2e-5
        assert (got - want).abs().max() < tolerance * want.abs().max(), name


@lru_cache(maxsize=None)
def coco_sized_case(size, spread):
    """Leaves on a map of COCO's size, and the reference's result for them."""
    num_cells = size[0] * size[1]
    tokens = {
        "query": random_tensor(B, Q, D, seed=1),
        "key": random_tensor(B, num_cells, D, seed=2),
        "value": random_tensor(B, num_cells, D, seed=3),
    }
    inputs = {**leaves(tokens), **random_gaussians(size, spread)}
    maps = reference.log_weights(*size, inputs["centers"], inputs["spreads"], spread)
    expected = reference.attend(*[inputs[name] for name in tokens], H, None, maps)
    return inputs, expected


@pytest.mark.parametrize("dropout", [0.0, 1e-12], ids=["without dropout", "with dropout"])
@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("spread", [None, *MAPS])
def test_half_precision_costs_modulated_attention_no_more_than_plain(spread, dtype, dropout):
    # Dropout of next to nothing takes the way of dropout, and the result is still known.
    size = (25, 42)
    inputs, expected = coco_sized_case(size, spread or "fixed")
    tokens = [inputs[name].to(dtype) for name in ("query", "key", "value")]
    if spread is None:
        expected = reference.attend(*[x.float() for x in tokens], H)
        heads = [x.unflatten(-1, (H, D // H)).transpose(1, 2) for x in tokens]
        output = attend(*heads, None, dropout).transpose(1, 2).flatten(2)
    else:
        gaussian = (inputs["centers"], inputs["spreads"])
        weight_map = make_map(*gaussian, spread, size)
        output = modulated_attention(*tokens, weight_map, dropout=dropout)
    assert output.dtype == dtype
    largest = expected.abs().max()
    assert (output.float() - expected).abs().max() < ROUNDING[dtype] * largest


@pytest.mark.parametrize("dtype", HALF_TYPES, ids=str)
@pytest.mark.parametrize("spread", MAPS)
def test_gradients_in_half_precision_are_those_of_the_reference_but_for_rounding(spread, dtype):
    size = (25, 42)
    inputs, expected = coco_sized_case(size, spread)
    tokens = [inputs[name].to(dtype) for name in ("query", "key", "value")]
    weight_map = make_map(inputs["centers"], inputs["spreads"], spread, size)
    output = modulated_attention(*tokens, weight_map).float()
    leaf_inputs = used(inputs, spread)
    weights = random_tensor(*expected.shape, seed=4)
    gradients = [
        torch.autograd.grad((x * weights).sum(), list(leaf_inputs.values()), retain_graph=True)
        for x in (output, expected)
    ]
    for name, got, wanted in zip(leaf_inputs, *gradients, strict=True):
        # The gradients of a query's channels, sums over squared coordinates, are rounded before
        # they are added up to its center's and spread's.
        slack = 8 if name in ("centers", "spreads") else 2
        assert (got - wanted).abs().max() < slack * ROUNDING[dtype] * wanted.abs().max(), name


# ------------------------------------------------------------------------------------ no full map


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("spread", [None, *MAPS])
def test_no_full_map_is_made_or_kept_for_the_backward_pass(spread, dropout, monkeypatch):
    monkeypatch.setattr(kernels, "_MAX_CHUNK", 1 << 16)
    monkeypatch.setattr(dropout_attention, "_MAX_PIECE", 1 << 16)
    num_heads, num_queries, size = 8, 400, (20, 24)
    inputs = random_gaussians(size, spread or "fixed", num_queries, num_heads)
    attention = CoAttention(D, num_heads, dropout)
    query = random_tensor(B, num_queries, D).requires_grad_()
    memory = random_tensor(B, size[0] * size[1], D).requires_grad_()
    mask = make_mask(make_scales([16], [(320, 384), (300, 330)])[0])
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, LargestTensor() as largest:
        weight_maps = None
        if spread is not None:
            weight_maps = [make_map(*inputs.values(), spread, size)]
        output = attention(query, memory, memory, [len(memory[0])], [mask], weight_maps)
        weighted_sum([output]).backward()
    full_map = B * num_heads * num_queries * size[0] * size[1]
    assert 0 < sum(kept.values()) < 4 * full_map  # bytes
    assert largest.num_elements < full_map / 2


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spread", [None, "independent", "covariance"])
@pytest.mark.parametrize("num_chunks", [1, 2, 7])
def test_dropout_keeps_the_same_weights_forward_and_backward(
    num_chunks, spread, padded, monkeypatch
):
    size, num_queries, p = (6, 8), 20, 0.4
    monkeypatch.setattr(kernels, "_MAX_CHUNK", B * H * num_queries * 48 // num_chunks)
    monkeypatch.setattr(dropout_attention, "_MAX_PIECE", num_queries * 48 // num_chunks)
    monkeypatch.setattr(dropout_attention, "_MIN_QUERIES", 1)
    mask = make_mask(make_scales([16])[0]) if padded else None
    # With the unit matrix as values, the result is the weights, and 0 where they were dropped.
    inputs = leaves(
        {
            "query": random_tensor(B, H, num_queries, 48, seed=1),
            "key": random_tensor(B, H, 48, 48, seed=2),
            "value": torch.eye(48).expand(B, H, 48, 48).contiguous(),
        }
    )
    logits = inputs["query"] @ inputs["key"].mT / 48**0.5
    weight_map = None
    if spread is not None:
        shape = random_gaussians(size, spread, num_queries)
        weight_map = make_map(**shape, spread=spread, size=size)
        logits = logits + reference.log_weights(*size, *shape.values(), spread)
        inputs.update(shape)
    if padded:
        logits = logits + mask
    torch.manual_seed(0)
    output = attend(inputs["query"], inputs["key"], inputs["value"], mask, p, weight_map)
    weights = logits.softmax(-1)
    kept = (output != 0).float()
    assert abs(float(kept[weights > 1e-6].mean()) - (1 - p)) < 0.04
    expected = weights * kept / (1 - p) @ inputs["value"]
    assert_close(output, expected, 1e-5)
    assert_same_gradients(output, expected, inputs)


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_elements_are_dropped_everywhere_and_independently_of_one_another(p):
    # Each of the 16 patterns of four neighbors, anywhere among many elements, and of all four of
    # few, the first and the last among them.
    torch.manual_seed(0)
    for num_elements, num_draws in ((400_000, 1), (4, 4_000)):
        dropped = torch.zeros(num_draws, num_elements)
        for row in dropped:
            row[dropout_attention.draw_dropped(num_elements, p)] = 1
        dropped = dropped.view(-1, 4)
        codes = torch.bincount((dropped * torch.tensor([1, 2, 4, 8])).sum(1).int(), minlength=16)
        ones = torch.tensor([bin(code).count("1") for code in range(16)])
        expected = p ** ones.double() * (1 - p) ** (4 - ones.double()) * len(dropped)
        assert chisquare(codes, expected).pvalue > 1e-3
    # Places are sums of distances, which would end too early if too few were drawn.
    parts = dropout_attention.draw_dropped(1_000_000, p) // 10_000
    assert chisquare(torch.bincount(parts, minlength=100)).pvalue > 1e-3


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("spread", MAPS)
def test_a_map_that_is_added_to_the_logits_as_on_a_gpu_gives_the_same(spread, padded, monkeypatch):
    size, num_queries = (6, 8), 20
    mask = make_mask(make_scales([16])[0]) if padded else None
    lengths = {"q": num_queries, "k": 48, "v": 48}
    tokens = {name: random_tensor(B, H, n, 8, seed=ord(name)) for name, n in lengths.items()}
    inputs = leaves({**tokens, **random_gaussians(size, spread, num_queries)})

    def run():
        weight_map = make_map(inputs["centers"], inputs["spreads"], spread, size)
        return attend(inputs["q"], inputs["k"], inputs["v"], mask, 0.0, weight_map)

    expected = run()
    monkeypatch.setattr(kernels, "_can_add", lambda *args: True)
    monkeypatch.setattr(kernels, "fit_channels", None)
    output = run()
    assert_close(output, expected, 1e-5)
    assert_same_gradients(output, expected, used(inputs, spread))
