"""Attention and dropout as PyTorch has them, done another way where its kernels are slow, inexact
or missing. Nothing here is specific to the model.

On the CPU PyTorch's fused attention has no dropout, and its gradients of very large logits are
wrong; and its random numbers are made one after another, on any number of cores.
"""

import math
from dataclasses import replace
from typing import Any, Callable, List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .weight_map import Channels, WeightMap, float32_region

HALF_TYPES = (torch.bfloat16, torch.float16)

# ---- Attention

# Without a fused kernel: so many logits are held at a time (16 MiB), but of some queries at least,
# since each piece has a gradient of all keys.
_MAX_LOGITS, _MIN_QUERIES = 1 << 22, 16
# Size of a logit up to which the CPU's fused kernel gives right gradients.
_MAX_LOGIT = 1e5
# Size of the channels' products up to which float32 rounds their sum, a log-weight, and its
# gradients by less than 1e-4.
_MAX_PRODUCT = 4096.0
# Largest channel of a query in the half types.
_MAX_CHANNEL = torch.finfo(torch.float16).max


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    weight_map: Optional[WeightMap] = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d_h) + log-weights) v, without ever holding a whole (B, H, N, S) map:
    ``F.scaled_dot_product_attention`` with a bias.

    An image's result depends on the other images of its batch by no more than the rounding of a
    sum: these can decide which of two ways, both exact to 1e-4 in a log-weight, float32 takes.

    Args:
        query: (B, H, N, d_h). key, value: (B, H, S, d_h).
        padding_mask: (B, S) bool, True on cells to leave out, or None.
        dropout_p: probability with which an attention weight is dropped.
        weight_map: of S cells, with H heads or one; None: no log-weights.

    Returns:
        (B, H, N, d_h)
    """
    head_dim = query.shape[-1]
    # In float32 the queries take the factor 1 / sqrt(d_h), for the CPU's kernel, given it, rounds
    # logits differently in its backward pass: gradients of large ones, as maps have them, would be
    # off. The half types would lose a digit by it, so there the kernel takes it.
    logit_factor = head_dim**-0.5
    if query.dtype not in HALF_TYPES:
        query, logit_factor = query * logit_factor, 1.0
    fused = _can_fuse(query, key, logit_factor, dropout_p)
    if weight_map is not None:
        channels = weight_map.channels()
        if channels is None:
            return _attend_in_pieces(
                query, key, value, padding_mask, dropout_p, logit_factor, weight_map
            )
        query, key, value = append_channels(query, key, value, channels, logit_factor)
    with float32_region(query):
        if fused:
            mask = None if padding_mask is None else ~padding_mask[:, None, None, :]
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, scale=logit_factor
            )
        else:
            out = _attend_in_pieces(query, key, value, padding_mask, dropout_p, logit_factor)
    return out[..., :head_dim]


def _can_fuse(query: Tensor, key: Tensor, logit_factor: float, dropout_p: float) -> bool:
    """Whether PyTorch's fused kernel does it right. The CPU's has no dropout, and its gradients of
    logits in the millions, as a badly initialised network has them, are wrong: where a weight is 1,
    a logit's gradient is 0 but for a rounding, which large keys multiply. (A weight map's products
    are large too, but they cancel, and the whole numbers they meet are small.)"""
    # A compiled graph takes one way for all inputs, whatever they hold.
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    if dropout_p or not (query.requires_grad or key.requires_grad):
        return not dropout_p
    longest = [
        torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32).amax()
        for tokens in (query, key)
    ]
    return bool(longest[0] * longest[1] * logit_factor <= _MAX_LOGIT)


# Compiled, it would be compiled anew for every number of pieces.
@torch.compiler.disable
def _attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout_p: float,
    logit_factor: float,
    weight_map: Optional[WeightMap] = None,
) -> Tensor:
    """`attend` in float32 without a fused kernel, some queries at a time. Of several pieces, the
    backward pass computes the attention weights again."""

    def attend_piece(key: Tensor, value: Tensor, query: Tensor, *map_tensors: Tensor) -> Tensor:
        with float32_region(query):
            logits = (query.float() * logit_factor) @ key.float().transpose(-2, -1)
            if weight_map is not None:
                centres, spreads = map_tensors
                part = replace(weight_map, centres=centres, spreads=spreads)
                logits = logits + part.log_weights().flatten(3)
            if padding_mask is not None:
                logits = logits.masked_fill(padding_mask[:, None, None, :], -torch.inf)
            return dropout(logits.softmax(dim=-1), dropout_p) @ value.float()

    by_query = [query] if weight_map is None else [query, weight_map.centres, weight_map.spreads]
    num_queries = max(_MIN_QUERIES, _MAX_LOGITS // (key.shape[0] * key.shape[1] * key.shape[2]))
    # An exported graph takes one way for all sizes.
    if torch.compiler.is_compiling() or num_queries >= query.shape[2]:
        return attend_piece(key, value, *by_query).to(query.dtype)
    return _InPieces.apply(attend_piece, num_queries, key, value, *by_query).to(query.dtype)


class _InPieces(torch.autograd.Function):
    """Calls a function with key, value and the tensors of some queries at a time, and again in the
    backward pass. (``torch.utils.checkpoint`` for each piece would leave the heap in fragments, a
    tensor of 16 MiB being freed among small ones: five times the peak memory of a training step
    with dropout on 6,000 cells.)"""

    @staticmethod
    def forward(
        ctx: Any,
        function: Callable[..., Tensor],
        num_queries: int,
        key: Tensor,
        value: Tensor,
        *by_query: Tensor,
    ) -> Tensor:
        ctx.function, ctx.num_queries = function, num_queries
        ctx.rng_state, ctx.device_states = torch.get_rng_state(), get_device_states(key)
        ctx.save_for_backward(key, value, *by_query)
        result = value.new_empty((*by_query[0].shape[:3], value.shape[3]), dtype=torch.float32)
        for part, *inputs in zip(*(x.split(num_queries, dim=2) for x in (result, *by_query))):
            part.copy_(function(key, value, *inputs))
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Optional[Tensor], ...]:
        key, value, *by_query = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        gradients = [torch.zeros_like(x, requires_grad=False) for x in (key, value, *by_query)]
        pieces = (x.split(ctx.num_queries, dim=2) for x in (gradient, *by_query, *gradients[2:]))
        devices, states = ctx.device_states
        with torch.random.fork_rng(devices, device_type=key.device.type):
            torch.set_rng_state(ctx.rng_state)
            set_device_states(devices, states, device_type=key.device.type)
            for piece_gradient, *piece in zip(*pieces):
                inputs = [x.detach().requires_grad_() for x in piece[: len(by_query)]]
                with torch.enable_grad():
                    result = ctx.function(key, value, *inputs)
                found = torch.autograd.grad(
                    result, [key, value, *inputs], piece_gradient, materialize_grads=True
                )
                for total, part in zip([*gradients[:2], *piece[len(by_query) :]], found):
                    total.add_(part)
        return (None, None, *gradients)


def append_channels(
    query: Tensor, key: Tensor, value: Tensor, channels: Channels, logit_factor: float
) -> Tuple[Tensor, Tensor, Tensor]:
    """Queries and keys with the channels in front, values with zeros at the end, of one width."""
    query_channels, cell_channels = fit_channels(channels, query.dtype, logit_factor)
    # Fused kernels want a multiple of 8.
    rest = query.new_zeros(-(query.shape[-1] + query_channels.shape[-1]) % 8)

    def append(channels: Tensor, tokens: Tensor) -> Tensor:
        shape = tokens.shape[:3]
        # The channels come first, so that their large products cancel before others are added.
        return torch.cat([channels.expand(*shape, -1), tokens, rest.expand(*shape, -1)], dim=-1)

    width = query.shape[-1] + query_channels.shape[-1] + rest.shape[-1]
    value = F.pad(value, (0, width - value.shape[-1]))
    return append(query_channels, query), append(cell_channels, key), value


def fit_channels(
    channels: Channels, dtype: torch.dtype, logit_factor: float
) -> Tuple[Tensor, Tensor]:
    """Channels of queries (B, H', Q, k') and cells (S, k') in a type that rounds their factors:
    products far from the map's middle are large and cancel, so there are more of them, k' >= k.

    Their dot product times `logit_factor` is the log-weight. Rounding passes gradients through."""
    query, cells, long = channels
    query = query / logit_factor
    if dtype in HALF_TYPES:
        # A map too narrow for float16 to hold becomes wider, around the same centre; there it is
        # still less than a cell. In bfloat16 too: of larger logits the CPU's kernel, which computes
        # them twice, has gradients that are nan where the two differ much.
        largest = query.detach().abs().amax(dim=-1, keepdim=True)
        query = query * (_MAX_CHANNEL / largest).clamp(max=1)
        # Each of the query's three pieces meets each of the cell's two; only the long numbers have
        # a second piece.
        pieces, (high, low) = _pieces(query, dtype, 3), _pieces(cells, dtype, 2)
        columns = list(long)
        query = torch.cat(pieces + [piece[..., columns] for piece in pieces], dim=-1)
        return query, torch.cat([high] * 3 + [low[..., columns]] * 3, dim=-1)
    with torch.no_grad():
        largest = (query.abs() * cells.abs().amax(dim=0)).sum(dim=-1, keepdim=True)
    # Asking a GPU would wait for it, and a compiled graph takes one way for all inputs.
    can_ask = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_ask and bool(largest.amax() <= _MAX_PRODUCT):
        return query.to(dtype), cells.to(dtype)
    query = _round_to_units(query, largest)
    return query.to(dtype), torch.cat([cells, cells], dim=-1).to(dtype)


def _round_to_units(query: Tensor, largest: Tensor) -> Tensor:
    """(..., k) channels cut in two, (..., 2 k): first rounded to multiples of a unit so large that
    float32 holds their products with whole numbers exactly, and any sum of these up to `largest`
    (..., 1), so that the large products cancel without an error; then the small rests."""
    unit = torch.exp2(largest.clamp(min=1e-12).log2().ceil() - 23)
    high = query + ((query / unit).round() * unit - query).detach()
    return torch.cat([high, (query - high).detach()], dim=-1)


def _pieces(x: Tensor, dtype: torch.dtype, count: int) -> List[Tensor]:
    """`count` tensors of `dtype` that add up to x, each the rounded rest of those before.

    The rests are constant: the first piece, which meets the same cells, carries the gradient."""
    pieces = [x.to(dtype)]
    rest = x.detach()
    for _ in range(count - 1):
        rest = rest - pieces[-1].detach().float()
        pieces.append(rest.to(dtype))
    return pieces


# ---- Dropout


def dropout(x: Tensor, p: float) -> Tensor:
    """``F.dropout``: elements are 0 with probability p, the others divided by 1 - p. On the CPU
    random numbers are drawn for the dropped elements alone."""
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


def _drop(x: Tensor, places: Tensor, p: float) -> Tensor:
    """x over 1 - p, but 0 in these places."""
    result = x.mul(_keep_factor(p)).contiguous()
    result.view(-1).index_fill_(0, places, 0)
    return result


def _keep_factor(p: float) -> float:
    return 1 / (1 - p) if p < 1 else 0.0


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        places = _draw_places(x.numel(), p)
        ctx.save_for_backward(places)
        ctx.p = p
        return _drop(x, places, p)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return _drop(gradient, places, ctx.p), None


class _ReluDropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        result = F.relu(x)
        if 0 < p < 1 and _draws_itself(x):
            result = result.contiguous().mul_(_keep_factor(p))
            result.view(-1).index_fill_(0, _draw_places(x.numel(), p), 0)
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
        return (gradient.mul_(_keep_factor(ctx.p)) if ctx.p > 0 else gradient), None
