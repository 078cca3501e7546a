"""Attention with dropout on a CPU, for which PyTorch has no fused kernel.

Maps of logits are computed in pieces that stay in the processor's cache, and again in the backward
pass. The gradients are written out, since autograd would go through each piece several times more.
"""

import math
from typing import Any, Iterator, Optional, Tuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# A piece has so many logits (4 MiB), but those of some queries at least, since each piece adds to
# the gradients of all keys.
_MAX_PIECE, _MIN_QUERIES = 1 << 20, 16


class DropoutAttention(torch.autograd.Function):
    """dropout(softmax(q k^T + mask)) v times 1 - p: what is kept is not divided by 1 - p.

    query: (B, H, N, d_h). key, value: (B, H, S, d_h). mask: (B, 1, 1, S) or None. p: in (0, 1).
    All are float32.
    """

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Optional[Tensor], p: float
    ) -> Tensor:
        ctx.p, ctx.rng_state = p, torch.get_rng_state()
        ctx.save_for_backward(query, key, value, mask)
        result = torch.empty_like(query)
        for head, rows in _pieces(query, key):
            weights = _attention_weights(query[head][rows], key[head], mask, head)
            _drop_(weights, draw_dropped(weights.numel(), p))
            result[head][rows] = weights @ value[head]
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, mask = ctx.saved_tensors
        of_query, of_key, of_value = (torch.zeros_like(x) for x in (query, key, value))
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.rng_state)
            for head, rows in _pieces(query, key):
                of_output = upstream[head][rows]
                weights = _attention_weights(query[head][rows], key[head], mask, head)
                dropped = draw_dropped(weights.numel(), ctx.p)
                of_weights = _drop_(of_output @ value[head].T, dropped)
                # The softmax's gradient takes the weights before any is dropped.
                of_logits = torch.ops.aten._softmax_backward_data(
                    of_weights, weights, -1, weights.dtype
                )
                of_query[head][rows] = of_logits @ key[head]
                of_key[head].addmm_(of_logits.T, query[head][rows])
                of_value[head].addmm_(_drop_(weights, dropped).T, of_output)
        return of_query, of_key, of_value, None, None


def draw_dropped(num_elements: int, p: float) -> Tensor:
    """Ascending places among so many elements, each drawn with probability p in (0, 1).

    PyTorch's dropout draws a number for each element, which takes longer than the products; this
    draws the distances from one place to the next. They have the geometric distribution, that of
    1 + floor(log u / log(1 - p)) with u uniform in (0, 1]."""
    # Six standard deviations more than will be needed: too few once in 10^9 times.
    count = int(num_elements * p + 6 * (num_elements * p * (1 - p)) ** 0.5) + 8
    # 64 random bits, which take as long to draw as 32, give two u of 31 bits.
    bits = torch.empty(math.ceil(count / 2), dtype=torch.int64).random_(-(2**63), None)
    u = bits.view(torch.int32).float().abs_().add_(0.5).mul_(2.0**-31)
    distances = u.log_().mul_(1 / math.log1p(-p)).floor_().add_(1)
    places = distances.long().cumsum(0).sub_(1)
    return places[: torch.searchsorted(places, num_elements)]


def _attention_weights(
    query: Tensor, key: Tensor, mask: Optional[Tensor], head: Tuple[int, int]
) -> Tensor:
    logits = query @ key.T
    if mask is not None:
        logits += mask[head[0], 0]
    return logits.softmax(dim=-1)


def _drop_(weights: Tensor, places: Tensor) -> Tensor:
    """Set `places` of the flattened weights to 0 in place."""
    weights.view(-1).index_fill_(0, places, 0)
    return weights


def _pieces(query: Tensor, key: Tensor) -> Iterator[Tuple[Tuple[int, int], slice]]:
    """(image, head) and queries of each piece."""
    images, heads, num_queries = query.shape[:3]
    length = max(_MAX_PIECE // key.shape[2], _MIN_QUERIES)
    for image in range(images):
        for head in range(heads):
            for start in range(0, num_queries, length):
                yield (image, head), slice(start, start + length)
