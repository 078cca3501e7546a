"""Attention through PyTorch's fused kernels.

Log-weights are channels of queries and keys, so that no (B, H, N, S) map is made. On a GPU, maps
that are not large are added to the logits instead: to start the operations that make channels takes
longer than to compute the map. `attend_explicitly` serves the cases that the fused kernels do not:
log-weights that are not dot products, and on the CPU dropout (`dropout_attention.py`) and very
large logits.
"""

import math
from typing import List, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .dropout_attention import DropoutAttention
from .weight_map import Channels, WeightMap, float32_region

HALF_TYPES = (torch.bfloat16, torch.float16)

# cuDNN's attention takes most of a second to plan for each new shape, keeps all plans, and has
# gradients that are nan with some masks (PyTorch's issue 196678).
torch.backends.cuda.enable_cudnn_sdp(False)

# Size of a logit up to which the CPU's fused kernel gives right gradients.
_MAX_LOGIT = 1e5
# Size of the channels' products up to which float32 rounds their sum, a log-weight, and its
# gradients by less than 1e-4.
_MAX_PRODUCT = 4096.0
# `attend_explicitly` computes so many logits at once (16 MiB).
_MAX_CHUNK = 1 << 22
# Size of a map that is added to the logits on a GPU: 64 MiB in the half types.
_MAX_ADDED = 1 << 25
# Largest channel of a query in the half types.
_MAX_CHANNEL = torch.finfo(torch.float16).max


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor] = None,
    dropout_p: float = 0.0,
    weight_map: Optional[WeightMap] = None,
) -> Tensor:
    """softmax(q k^T / sqrt(d_h) + log-weights + mask) v, without holding a large (B, H, N, S) map.

    In float32 the largest log-weight of a batch decides which of two ways, both exact to 1e-4,
    computes them, so that other images of a batch can change an image's result by that rounding.

    Args:
        query: (B, H, N, d_h). key, value: (B, H, S, d_h).
        mask: (B, 1, 1, S), see `additive_mask`; None: no cell is padding.
        dropout_p: probability with which an attention weight is dropped.
        weight_map: of S cells, with H heads or one; None: no log-weights.

    Returns:
        (B, H, N, d_h)
    """
    head_dim = query.shape[-1]
    # In float32 the queries take the factor, since the CPU's kernel, given it, rounds logits
    # differently in its backward pass, which puts gradients of large ones off. The half types would
    # lose a digit by it.
    logit_factor = head_dim**-0.5
    if query.dtype not in HALF_TYPES:
        query, logit_factor = query * logit_factor, 1.0
    fused = _can_fuse(query, key, logit_factor, dropout_p)
    if weight_map is not None and _can_add(query, key):
        log_weights = weight_map.log_weights().flatten(3)
        if query.dtype == torch.float16:  # of infinities alone there is no softmax
            log_weights = log_weights.clamp(min=-_MAX_CHANNEL)
        log_weights = log_weights.to(query.dtype)
        mask = log_weights if mask is None else log_weights + mask
    elif weight_map is not None:
        channels = weight_map.channels()
        if channels is None:
            return attend_explicitly(query, key, value, mask, dropout_p, logit_factor, weight_map)
        query, key, value = append_channels(query, key, value, channels, logit_factor)
    with float32_region(query):
        if fused:
            out = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, scale=logit_factor
            )
        else:
            out = attend_explicitly(query, key, value, mask, dropout_p, logit_factor)
    return out[..., :head_dim]


def additive_mask(padding_mask: Optional[Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """(B, 1, 1, S) of a (B, S) padding mask: 0, and minus infinity on padding."""
    if padding_mask is None:
        return None
    num_cells = padding_mask.shape[1]
    if not torch.compiler.is_compiling():  # kernels copy rows that do not begin at a multiple of 8
        padding_mask = F.pad(padding_mask, (0, -num_cells % 8))
    mask = torch.zeros_like(padding_mask, dtype=dtype).masked_fill(padding_mask, -torch.inf)
    return mask[:, None, None, :num_cells]


def attend_explicitly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    dropout_p: float,
    logit_factor: float,
    weight_map: Optional[WeightMap] = None,
) -> Tensor:
    """The formula itself, in float32: dropout(softmax(q k^T logit_factor + log-weights + mask)) v,
    with the arguments of `attend`.

    A large map is computed in chunks of queries, which are computed again in the backward pass.
    """
    dtype, num_queries = query.dtype, query.shape[2]
    query, key, value = query.float() * logit_factor, key.float(), value.float()
    num_chunks = 1
    if not torch.compiler.is_compiling():  # a graph takes one way for all sizes
        num_chunks = math.ceil(query.shape[:3].numel() * key.shape[2] / _MAX_CHUNK)
    with float32_region(query):
        if weight_map is None and 0 < dropout_p < 1:  # on a CPU; others fuse it
            value = value / (1 - dropout_p)
            return DropoutAttention.apply(query, key, value, mask, dropout_p).to(dtype)
        if num_chunks <= 1:
            return _formula(query, key, value, mask, dropout_p, weight_map).to(dtype)
        length = math.ceil(num_queries / num_chunks)
        chunks = []
        for start in range(0, num_queries, length):
            rows = slice(start, start + length)
            part = None if weight_map is None else weight_map.of_queries(rows)
            inputs = (query[:, :, rows], key, value, mask, dropout_p, part)
            chunks.append(checkpoint(_formula, *inputs, use_reentrant=False))
        return torch.cat(chunks, dim=2).to(dtype)


def _formula(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Optional[Tensor],
    dropout_p: float,
    weight_map: Optional[WeightMap],
) -> Tensor:
    logits = query @ key.mT
    if weight_map is not None:
        logits = logits + weight_map.log_weights().flatten(3)
    if mask is not None:
        logits = logits + mask
    return F.dropout(logits.softmax(dim=-1), dropout_p) @ value


def _can_fuse(query: Tensor, key: Tensor, logit_factor: float, dropout_p: float) -> bool:
    """Whether PyTorch's fused kernel does it right. The CPU's has no dropout, and its gradients of
    logits in the millions, as a badly initialized network has them, are wrong: where a weight is 1,
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


def _can_add(query: Tensor, key: Tensor) -> bool:
    """Whether a weight map is added to the logits. A compiled graph fuses what makes channels."""
    if query.device.type == "cpu" or torch.compiler.is_compiling():
        return False
    return query.shape[:3].numel() * key.shape[2] <= _MAX_ADDED


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
        # A map too narrow for float16 to hold becomes wider, around the same center; there it is
        # still less than a cell. In bfloat16 too: of larger logits the CPU's kernel, which computes
        # them twice, has gradients that are nan where the two differ much.
        largest = query.detach().abs().amax(dim=-1, keepdim=True)
        query = query * (_MAX_CHANNEL / largest).clamp(max=1)
        # Each of the query's three pieces meets each of the cell's two; only the long numbers have
        # a second piece.
        pieces, (high, low) = _pieces(query, dtype, 3), _pieces(cells, dtype, 2)
        query = torch.cat(pieces + [piece[..., long] for piece in pieces], dim=-1)
        return query, torch.cat([high] * 3 + [low[..., long]] * 3, dim=-1)
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
