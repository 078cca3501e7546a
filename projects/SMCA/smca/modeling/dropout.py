"""Dropout that costs little: fast random numbers on the CPU, and one kept tensor behind a ReLU.

PyTorch's CPU generator makes the numbers of a dropout one after another, on any number of cores. To
draw one for each element took a quarter of a training step; here four elements share one.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float) -> Tensor:
    """Elements are 0 with probability p, to within 2^-17, the others divided by 1 - p."""
    if p == 0 or not _draws_itself(x):
        return F.dropout(x, p)
    return _Dropout.apply(x, p)


def relu_dropout(x: Tensor, p: float) -> Tensor:
    """``dropout(relu(x))`` that keeps its result, which the next layer keeps anyway, and nothing
    else for the backward pass."""
    if torch.compiler.is_compiling():  # which finds out by itself what to keep
        return F.dropout(F.relu(x), p)
    return _ReluDropout.apply(x, p)


class Dropout(nn.Dropout):
    """`dropout` as a module, off in evaluation."""

    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


def _draws_itself(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _keep_mask(x: Tensor, p: float) -> Tensor:
    """Bool of x's shape, True with probability 1 - p: four 16-bit numbers from each of 64 bits."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    numbers = bits.view(torch.int16)[: x.numel()].view(x.shape)
    return numbers >= round(p * 2**16) - 2**15


def _scale(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        mask = _keep_mask(x, p)
        ctx.save_for_backward(mask)
        ctx.p = p
        return x.mul(mask).mul_(_scale(p))

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient.mul(mask).mul_(_scale(ctx.p)), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        result = F.relu(x)
        if p > 0 and _draws_itself(x):
            result.mul_(_keep_mask(x, p)).mul_(_scale(p))
        elif p > 0:
            result = F.dropout(result, p)
        ctx.save_for_backward(result)
        ctx.p = p
        return result

    @staticmethod
    def backward(ctx, gradient):
        # An element is greater than 0 where it was so before and was not dropped.
        (result,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        return (gradient.mul_(_scale(ctx.p)) if ctx.p > 0 else gradient), None
