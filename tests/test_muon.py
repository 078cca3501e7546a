"""Muon's update of a matrix against its definition by singular values, and AdamW for the rest."""

import copy

import pytest
import torch
from torch import nn

from smca.solver import Muon

LR = 1e-2


def one_step(parameter, gradient, **kwargs):
    """The change of a parameter in one step without weight decay."""
    parameter = nn.Parameter(parameter.clone())
    parameter.grad = gradient.clone()
    before = parameter.detach().clone()
    optimizer = Muon([parameter], lr=LR, weight_decay=0.0, **kwargs)
    optimizer.step()
    assert torch.equal(parameter.grad, gradient)
    return parameter.detach() - before


def of_rank_two(rows, columns):
    """A matrix with two singular values, and the same with both equal to 1."""
    u = torch.linalg.qr(torch.randn(rows, 2)).Q
    v = torch.linalg.qr(torch.randn(columns, 2)).Q
    return u @ torch.diag(torch.tensor([3.0, 0.7])) @ v.T, u @ v.T


@pytest.mark.parametrize("rows, columns, shape", [(32, 64, (32, 64)), (32, 144, (32, 16, 3, 3))])
def test_the_update_has_the_gradients_singular_vectors_and_equal_singular_values(
    rows, columns, shape
):
    torch.manual_seed(0)
    gradient, orthogonal = of_rank_two(rows, columns)
    change = one_step(torch.randn(shape), gradient.reshape(shape)).reshape(rows, columns)
    # Five steps of the iteration bring singular values between 0.7 and 1.2.
    size = LR * 0.2 * max(rows, columns) ** 0.5
    values = torch.linalg.svdvals(change / size)
    assert ((values[:2] > 0.65) & (values[:2] < 1.25)).all() and values[2] < 1e-3
    cosine = -(change * orthogonal).sum() / change.norm() / orthogonal.norm()
    assert cosine > 0.95


def test_stacked_projections_are_three_matrices():
    torch.manual_seed(0)
    gradients = [torch.randn(16, 16) for _ in range(3)]
    stacked = one_step(torch.zeros(48, 16), torch.cat(gradients))
    single = [one_step(torch.zeros(16, 16), gradient) for gradient in gradients]
    torch.testing.assert_close(stacked, torch.cat(single))


@pytest.mark.parametrize("shape", [(32,), (3, 32), (1, 1, 32)])
def test_vectors_and_small_matrices_are_adamws(shape):
    torch.manual_seed(0)
    start, gradient = torch.randn(shape), torch.randn(shape)
    expected = nn.Parameter(start.clone())
    expected.grad = gradient
    torch.optim.AdamW([expected], lr=LR, weight_decay=0.0).step()
    torch.testing.assert_close(one_step(start, gradient), expected.detach() - start)


def test_a_saved_state_goes_on_with_the_same_steps():
    torch.manual_seed(0)
    gradients = torch.randn(4, 32, 16)
    parameters = [nn.Parameter(torch.ones(32, 16)), nn.Parameter(torch.ones(16))]
    optimizer = Muon(parameters, lr=LR)

    def train(optimizer, parameters, gradients):
        for gradient in gradients:
            parameters[0].grad, parameters[1].grad = gradient.clone(), gradient[0].clone()
            optimizer.step()

    train(optimizer, parameters, gradients[:2])
    copies = [nn.Parameter(p.detach().clone()) for p in parameters]
    resumed = Muon(copies, lr=LR)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, parameters, gradients[2:])
    train(resumed, copies, gradients[2:])
    assert all(torch.equal(a, b) for a, b in zip(parameters, copies))
