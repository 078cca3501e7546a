"""Dropout that on the CPU draws random numbers for the dropped elements alone: PyTorch's generator
makes one for each element, one after another on any number of cores."""

import math
from typing import Any, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout``: elements are 0 with probability p, the others divided by 1 - p."""
    if 0 < p < 1 and _draws_itself(x):
        return _Dropout.apply(x, p)
    return F.dropout(x, p)


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


def keep_factor(p: float) -> float:
    """What the elements that are kept are multiplied with."""
    return 1 / (1 - p) if p < 1 else 0.0


def draw_dropped(x: Tensor, p: float) -> Optional[Tensor]:
    """Draw which elements to drop, each with probability p.

    Returns:
        For `drop_`: their places, on the CPU; a bool mask of x's shape elsewhere; None where there
        is nothing to draw, p being 0 or 1.
    """
    if not 0 < p < 1:
        return None
    return _draw_places(x.numel(), p) if x.device.type == "cpu" else torch.rand_like(x) < p


def drop_(x: Tensor, dropped: Optional[Tensor]) -> Tensor:
    """Set what `draw_dropped` drew to 0 in place; x is contiguous."""
    if dropped is None:
        return x
    if dropped.dtype == torch.bool:
        return x.masked_fill_(dropped, 0)
    x.view(-1).index_fill_(0, dropped, 0)
    return x


def _draws_itself(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _draw_places(num_elements: int, p: float) -> Tensor:
    """Ascending places among so many elements of those to drop, each with probability p.

    The number of elements from one to the next has the geometric distribution, that of
    1 + floor(log u / log(1 - p)) with u uniform in (0, 1]; u has 31 of 64 random bits."""
    # Six standard deviations more than will be needed: short of some once in 10^9 times.
    count = int(num_elements * p + 6 * (num_elements * p * (1 - p)) ** 0.5) + 8
    bits = torch.empty(-(-count // 2), dtype=torch.int64).random_(-(2**63), None)
    u = bits.view(torch.int32).float().abs_().add_(0.5).mul_(2.0**-31)
    distances = u.log_().mul_(1 / math.log1p(-p)).floor_().add_(1)
    places = distances.long().cumsum(0).sub_(1)
    return places[: torch.searchsorted(places, num_elements)]


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        dropped = draw_dropped(x, p)
        ctx.save_for_backward(dropped)
        ctx.p = p
        return drop_(x.mul(keep_factor(p)).contiguous(), dropped)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        (dropped,) = ctx.saved_tensors
        return drop_(gradient.mul(keep_factor(ctx.p)).contiguous(), dropped), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        result = F.relu(x)
        if 0 < p < 1 and _draws_itself(x):
            result = drop_(result.contiguous().mul_(keep_factor(p)), draw_dropped(x, p))
        elif p > 0:
            result = F.dropout(result, p)
        ctx.save_for_backward(result)
        ctx.p = p
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        # An element is greater than 0 where it was so before and was not dropped.
        (result,) = ctx.saved_tensors
        gradient = torch.ops.aten.threshold_backward(gradient, result, 0)
        return (gradient.mul_(keep_factor(ctx.p)) if ctx.p > 0 else gradient), None
