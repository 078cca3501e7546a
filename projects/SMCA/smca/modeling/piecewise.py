"""Attention that no fused kernel does: with dropout on the CPU, and with log-weights that are not
dot products.

A large map of logits is computed in pieces that stay in the processor's cache, and again in the
backward pass. Its gradients are written out here, for PyTorch would copy the map at each step.
"""

import itertools
import math
from dataclasses import replace
from typing import Any, Iterator, Optional, Sequence, Tuple

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from .dropout import draw_dropped, drop_, dropout, keep_factor
from .weight_map import WeightMap, float32_region

# A map of up to so many logits is kept for the backward pass (16 MiB).
_MAX_KEPT = 1 << 22
# A piece is of so many (4 MiB), but of some queries at least, since each adds to the gradients of
# all keys. GPUs have no cache to stay in, and each call costs them time.
_MAX_PIECE, _MAX_PIECE_GPU, _MIN_QUERIES = 1 << 20, 1 << 22, 16


# Compiled, it would be compiled anew for every number of pieces.
@torch.compiler.disable
def attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout_p: float,
    logit_factor: float,
    weight_map: Optional[WeightMap] = None,
) -> Tensor:
    """`smca.modeling.kernels.attend`, in float32, of the logits q k^T times `logit_factor`."""
    dtype, (images, heads) = query.dtype, query.shape[:2]
    query, key, value = query.float() * logit_factor, key.float(), value.float()
    with float32_region(query):
        # An exported graph takes one way for all sizes.
        if torch.compiler.is_compiling() or query.shape[:3].numel() * key.shape[2] <= _MAX_KEPT:
            result = attend_at_once(query, key, value, padding_mask, dropout_p, weight_map)
            return result.to(dtype)
        # What dropout keeps is divided by 1 - p: here the values are, which are fewer.
        inputs = [query, key, value * keep_factor(dropout_p)]
        if weight_map is not None:
            map_inputs = (weight_map.centers, weight_map.spreads)
            inputs += [x.expand(-1, heads, -1, -1) for x in map_inputs]
        inputs = [x.flatten(0, 1) for x in inputs]
        if padding_mask is not None:
            padding_mask = padding_mask.repeat_interleave(heads, dim=0)
        result = _InPieces.apply(dropout_p, padding_mask, weight_map, *inputs)
    return result.unflatten(0, (images, heads)).to(dtype)


def attend_at_once(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout_p: float,
    weight_map: Optional[WeightMap],
) -> Tensor:
    """The formula itself: dropout(softmax(q k^T + log-weights)) v."""
    logits = query @ key.mT
    if weight_map is not None:
        logits = logits + weight_map.log_weights().flatten(3)
    if padding_mask is not None:
        logits = logits.masked_fill(padding_mask[:, None, None, :], -torch.inf)
    return dropout(logits.softmax(dim=-1), dropout_p) @ value


class _InPieces(torch.autograd.Function):
    """`attend_at_once` with images and heads as R rows, and without the factor 1 / (1 - p).

    query: (R, N, d_h). key, value: (R, S, d_h). padding_mask: (R, S) or None. map_inputs: of a
    weight map the centers (R, N, 2) and spreads (R, N, n)."""

    @staticmethod
    def forward(
        ctx: Any,
        dropout_p: float,
        padding_mask: Optional[Tensor],
        weight_map: Optional[WeightMap],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *map_inputs: Tensor,
    ) -> Tensor:
        ctx.dropout_p, ctx.padding_mask, ctx.weight_map = dropout_p, padding_mask, weight_map
        ctx.rng_state, ctx.device_states = torch.get_rng_state(), get_device_states(key)
        ctx.save_for_backward(query, key, value, *map_inputs)
        result = torch.empty_like(query)
        for piece in _pieces(query, key):
            rows = piece[0]
            log_weights = _log_weights(weight_map, [x[piece] for x in map_inputs])
            weights = _weights(query[piece], key[rows], padding_mask, rows, log_weights)
            drop_(weights, draw_dropped(weights, dropout_p))
            result[piece] = weights @ value[rows]
        return result

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> Tuple[Optional[Tensor], ...]:
        query, key, value, *map_inputs = ctx.saved_tensors
        gradients = [torch.zeros_like(x) for x in (query, key, value, *map_inputs)]
        of_query, of_key, of_value, *of_map_inputs = gradients
        devices, states = ctx.device_states
        with torch.random.fork_rng(devices, device_type=key.device.type):
            torch.set_rng_state(ctx.rng_state)
            set_device_states(devices, states, device_type=key.device.type)
            for piece in _pieces(query, key):
                rows = piece[0]
                leaves = [x[piece].detach().requires_grad_() for x in map_inputs]
                with torch.enable_grad():
                    log_weights = _log_weights(ctx.weight_map, leaves)
                weights = _weights(query[piece], key[rows], ctx.padding_mask, rows, log_weights)
                dropped = draw_dropped(weights, ctx.dropout_p)
                # The softmax's gradient takes the weights before any is dropped.
                of_weights = drop_(upstream[piece] @ value[rows].mT, dropped)
                of_logits = torch.ops.aten._softmax_backward_data(
                    of_weights, weights, -1, weights.dtype
                )
                of_value[rows] += drop_(weights, dropped).mT @ upstream[piece]
                of_query[piece] = of_logits @ key[rows]
                of_key[rows] += of_logits.mT @ query[piece]
                if log_weights is not None:
                    found = torch.autograd.grad(
                        log_weights, leaves, of_logits, materialize_grads=True
                    )
                    for total, part in zip(of_map_inputs, found):
                        total[piece] = part
        return (None, None, None, *gradients)


def _weights(
    query: Tensor,
    key: Tensor,
    padding_mask: Optional[Tensor],
    rows: slice,
    log_weights: Optional[Tensor],
) -> Tensor:
    """(r, n, S) attention weights of a piece: of (r, n, d_h) and (r, S, d_h), which are these rows
    of the mask."""
    logits = query @ key.mT
    if log_weights is not None:
        logits += log_weights.detach()
    if padding_mask is not None:
        logits.masked_fill_(padding_mask[rows, None], -torch.inf)
    return logits.softmax(dim=-1)


def _log_weights(weight_map: Optional[WeightMap], inputs: Sequence[Tensor]) -> Optional[Tensor]:
    """(r, n, S) log-weights of a piece, whose centers and spreads are given."""
    if weight_map is None:
        return None
    centers, spreads = (x[None] for x in inputs)  # a map has images and heads
    return replace(weight_map, centers=centers, spreads=spreads).log_weights()[0].flatten(2)


def _pieces(query: Tensor, key: Tensor) -> Iterator[Tuple[slice, slice]]:
    """Rows and queries of each piece: several whole rows, or some queries of one."""
    (num_rows, num_queries), num_cells = query.shape[:2], key.shape[1]
    most = _MAX_PIECE if query.device.type == "cpu" else _MAX_PIECE_GPU
    rows = max(1, most // (num_queries * num_cells))
    queries = num_queries if rows > 1 else max(_MIN_QUERIES, most // num_cells)
    return itertools.product(_even_slices(num_rows, rows), _even_slices(num_queries, queries))


def _even_slices(length: int, longest: int) -> Iterator[slice]:
    step = math.ceil(length / math.ceil(length / longest))
    return (slice(start, start + step) for start in range(0, length, step))
