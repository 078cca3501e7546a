"""Dropout against its definition: rate, scale, gradients, what is kept, and PyTorch's generator."""

import pytest
import torch
import torch.nn.functional as F
from scipy.stats import binomtest, chisquare

from smca.modeling.dropout import Dropout, dropout, relu_dropout

FUNCTIONS = {"dropout": (dropout, lambda x: x), "relu_dropout": (relu_dropout, F.relu)}


def positive(*shape):
    return torch.rand(*shape) + 0.5


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_elements_are_dropped_with_the_given_probability(name, p):
    torch.manual_seed(0)
    x = positive(300, 301)
    result = FUNCTIONS[name][0](x, p)
    dropped = result == 0
    assert binomtest(int(dropped.sum()), x.numel(), p).pvalue > 1e-3
    torch.testing.assert_close(result[~dropped], x[~dropped] / (1 - p))


@pytest.mark.parametrize("p", [0.1, 0.3, 0.9])
def test_elements_are_dropped_independently_of_one_another(p):
    # Each of the 16 patterns of four neighbors, anywhere in a large tensor, and of all four
    # elements of small ones, the first and the last among them.
    torch.manual_seed(0)
    large = (dropout(positive(400_000), p) == 0).view(-1, 4)
    small = torch.stack([dropout(torch.ones(4), p) == 0 for _ in range(4_000)])
    for dropped in (large, small):
        codes = torch.bincount((dropped * torch.tensor([1, 2, 4, 8])).sum(1), minlength=16)
        ones = torch.tensor([bin(code).count("1") for code in range(16)])
        expected = p ** ones.double() * (1 - p) ** (4 - ones.double()) * len(dropped)
        assert chisquare(codes, expected).pvalue > 1e-3


def test_dropped_elements_are_everywhere():
    # Places are sums of distances, which end too early where too few are drawn.
    torch.manual_seed(0)
    parts = (dropout(positive(1_000_000), 0.1) == 0).view(100, -1).sum(1)
    assert chisquare(parts).pvalue > 1e-3


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_pass_where_elements_were_kept(name, p, dtype):
    function, before = FUNCTIONS[name]
    torch.manual_seed(0)
    x = torch.randn(7, 13, dtype=dtype).requires_grad_()
    result = function(x, p)
    kept = result != 0
    expected = before(x) * kept * (1 / (1 - p) if p < 1 else 0)
    upstream = torch.randn_like(x)
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (result, expected)]
    assert result.dtype == dtype
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(*gradients)
    assert (p == 1) != bool(kept.any())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("turned", ["x", "gradient"])
def test_the_order_in_memory_does_not_matter(name, turned):
    function, before = FUNCTIONS[name]
    tensors = {"x": torch.randn(2, 5, 7), "gradient": torch.randn(2, 5, 7)}
    tensors[turned] = tensors[turned].mT.contiguous().mT
    x = tensors["x"].requires_grad_()
    result = function(x, 0.5)
    expected = before(x) * (result != 0) * 2
    torch.testing.assert_close(result, expected)
    ours, right = (torch.autograd.grad(y, x, tensors["gradient"])[0] for y in (result, expected))
    torch.testing.assert_close(ours, right)


def test_relu_dropout_keeps_only_its_result():
    x = torch.randn(50, 40, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = relu_dropout(x * 1.0, 0.1)
    assert {t.data_ptr() for t in kept if t.numel() > 1} == {result.data_ptr()}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_generators_state_decides(name):
    function, _ = FUNCTIONS[name]
    x = positive(101)
    torch.manual_seed(5)
    first, second = function(x, 0.5), function(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(function(x, 0.5), first)
    assert not torch.equal(first, second)


def test_the_module_is_off_in_evaluation():
    x, module = positive(100), Dropout(0.5)
    assert (module(x) == 0).any()
    assert torch.equal(module.eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_is_dropped_from_nothing(name):
    assert FUNCTIONS[name][0](torch.empty(0, 5), 0.1).shape == (0, 5)
