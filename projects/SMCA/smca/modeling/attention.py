"""Multi-head attention and the spatially modulated co-attention (SMCA, section 3.2).

The modulation adds a Gaussian's logarithm to the attention logits. Written out,

    -p_x (x - c_x)^2 = -p_x x^2 + 2 p_x c_x x - p_x c_x^2,

it is a dot product of a vector that depends on the query, (-p_x, 2 p_x c_x, -p_x c_x^2, ...), and
one that depends on the cell, (x^2, x, 1, ...). So the modulation is a few more channels of the
queries and keys, and any fused attention kernel computes it without a (B, H, Q, S) map.
`modulation.py` makes these channels.
"""

import contextlib
from typing import Callable, Optional, Sequence, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from .dropout import dropout as drop

# Where PyTorch's fused kernels can't be used (see `_can_fuse`), how many attention logits are held
# at a time: 16 MiB of them, but some rows, since each piece has a gradient of all keys.
_MAX_LOGITS, _MIN_ROWS = 1 << 22, 16
# A scale's log-weights: channels whose dot product they are, (B, H or 1, Q, k) of the queries and
# (S, k or more) of the cells (see `modulation.query_channels`), or a function that makes them for
# some queries and what it needs of each query (see `attend_in_pieces`).
Modulation = Union[Tuple[Tensor, Tensor], Tuple[Callable[..., Tensor], Sequence[Tensor]]]

# Size of a logit up to which the CPU's fused kernel gives right gradients.
_MAX_LOGIT = 1e5

HALF_TYPES = (torch.bfloat16, torch.float16)


def float32_region(tensor: Tensor):
    """Context in which autocast is off: for coordinates, which half precision would round to
    several pixels."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(q k^T / sqrt(d_h)) v, without ever holding a whole (B, H, N, S) map.

    Args:
        query: (B, H, N, d_h). key, value: (B, H, S, d_h).
        padding_mask: (B, S) bool, True on cells to leave out, or None.
        dropout: probability with which an attention weight is dropped.

    Returns:
        (B, H, N, d_h)
    """
    query, scale = _scale_queries(query)
    fused = _can_fuse(query, key, scale, dropout)
    return _attend(query, key, value, padding_mask, dropout, scale, fused)


def kernel_scale(head_dim: int, dtype: torch.dtype) -> float:
    """What is left of 1 / sqrt(d_h) for the attention kernels to multiply logits with.

    In float32 the queries are multiplied instead, since the CPU's kernel, given the factor, rounds
    logits differently in its backward pass: gradients of large ones, as modulation has them, would
    be off. The half types would lose a digit by it."""
    return head_dim**-0.5 if dtype in HALF_TYPES else 1.0


def _scale_queries(query: Tensor) -> Tuple[Tensor, float]:
    """The queries times their part of 1 / sqrt(d_h), and the kernel's part."""
    scale = kernel_scale(query.shape[-1], query.dtype)
    return (query * query.shape[-1] ** -0.5 if scale == 1 else query), scale


def _can_fuse(query: Tensor, key: Tensor, scale: float, dropout: float) -> bool:
    """Whether PyTorch's fused kernels do it right. The CPU's can't do two things: dropout, and
    gradients of logits in the millions, as a badly initialised network has them. Where a weight is
    1, that gradient is 0 but for a rounding, which large keys multiply."""
    # A compiled graph takes one way for all inputs, whatever they hold.
    if query.device.type != "cpu" or torch.compiler.is_compiling():
        return True
    if dropout or not (query.requires_grad or key.requires_grad):
        return not dropout
    longest = [
        torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32).amax()
        for tokens in (query, key)
    ]
    return bool(longest[0] * longest[1] * scale <= _MAX_LOGIT)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout: float,
    scale: float,
    fused: bool,
) -> Tensor:
    if not fused:
        return attend_in_pieces(query, key, value, padding_mask, dropout, scale)
    mask = None if padding_mask is None else ~padding_mask[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)


# Compiled, it would be compiled anew for every number of pieces.
@torch.compiler.disable
def attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout: float,
    scale: float,
    log_weights: Optional[Callable[..., Tensor]] = None,
    parameters: Sequence[Tensor] = (),
) -> Tensor:
    """`attend` in float32 without a fused kernel, some queries at a time. Of several pieces, the
    backward pass computes the attention weights again.

    Args:
        parameters: (B, H or 1, N, ...) each, of the queries' Gaussians.
        log_weights: given the parameters of some queries, gives what to add to their logits,
            (B, H or 1, queries, S).
    """

    def attend_piece(key: Tensor, value: Tensor, query: Tensor, *parameters: Tensor) -> Tensor:
        with float32_region(query):
            logits = (query.float() * scale) @ key.float().transpose(-2, -1)
            if log_weights is not None:
                logits = logits + log_weights(*parameters)
            if padding_mask is not None:
                logits = logits.masked_fill(padding_mask[:, None, None, :], -torch.inf)
            return drop(logits.softmax(dim=-1), dropout) @ value.float()

    num_rows = max(_MIN_ROWS, _MAX_LOGITS // (key.shape[0] * key.shape[1] * key.shape[2]))
    if num_rows >= query.shape[2]:
        return attend_piece(key, value, query, *parameters).to(query.dtype)
    return _InPieces.apply(attend_piece, num_rows, key, value, query, *parameters).to(query.dtype)


class _InPieces(torch.autograd.Function):
    """Calls a function with key, value and the tensors of some queries at a time, and again in the
    backward pass. (``torch.utils.checkpoint`` for each piece would make a gradient of all queries
    for each, and leave the heap in fragments, a tensor of 16 MiB being freed among small ones.)"""

    @staticmethod
    def forward(ctx, function, num_rows, key, value, *by_query):
        ctx.function, ctx.num_rows = function, num_rows
        ctx.rng_state, ctx.device_states = torch.get_rng_state(), get_device_states(key)
        ctx.save_for_backward(key, value, *by_query)
        result = value.new_empty((*by_query[0].shape[:3], value.shape[3]), dtype=torch.float32)
        for part, *inputs in zip(*(x.split(num_rows, dim=2) for x in (result, *by_query))):
            part.copy_(function(key, value, *inputs))
        return result

    @staticmethod
    def backward(ctx, gradient):
        key, value, *by_query = (x.detach().requires_grad_() for x in ctx.saved_tensors)
        gradients = [torch.zeros_like(x, requires_grad=False) for x in (key, value, *by_query)]
        pieces = (x.split(ctx.num_rows, dim=2) for x in (gradient, *by_query, *gradients[2:]))
        devices, states = ctx.device_states
        with torch.random.fork_rng(devices, device_type=key.device.type):
            torch.set_rng_state(ctx.rng_state)
            set_device_states(devices, states, device_type=key.device.type)
            for piece_gradient, *piece in zip(*pieces):
                inputs = [x.detach().requires_grad_() for x in piece[: len(by_query)]]
                with torch.enable_grad():
                    result = ctx.function(key, value, *inputs)
                found = torch.autograd.grad(result, [key, value, *inputs], piece_gradient)
                for total, part in zip([*gradients[:2], *piece[len(by_query) :]], found):
                    total.add_(part)
        return (None, None, *gradients)


class MultiheadAttention(nn.Module):
    """Multi-head attention on batch-first tokens.

    Parameters have the names, shapes and initial values of ``torch.nn.MultiheadAttention`` (q, k
    and v stacked in one (3 d, d) tensor), which this is but for `attend`.

    Args:
        embed_dim: d. num_heads: H. dropout: of the attention weights, in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of num_heads={num_heads}.")
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """(B, N, d), (B, S, d), (B, S, d) projected and cut into heads: (B, H, N or S, d_h)."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        return tuple(
            F.linear(tokens, weight, bias).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens, weight, bias in zip((query, key, value), weights, biases)
        )

    def merge(self, heads: Tensor) -> Tensor:
        """(B, H, N, d_h) results of the heads, joined and projected: (B, N, d)."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding_mask: Optional[Tensor] = None
    ) -> Tensor:
        """
        Args:
            query: (B, N, d). key, value: (B, S, d).
            padding_mask: (B, S) bool, True on keys to leave out, or None.

        Returns:
            (B, N, d)
        """
        dropout = self.dropout if self.training else 0.0
        return self.merge(attend(*self.project(query, key, value), padding_mask, dropout))


class CoAttention(MultiheadAttention):
    """The decoder's attention to the image: softmax within each scale, results weighted and added.

    One scale without modulation is DETR's cross-attention.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_cells: Sequence[int],
        padding_masks: Sequence[Optional[Tensor]],
        modulations: Optional[Sequence[Modulation]] = None,
        scale_weights: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            query: (B, Q, d). key, value: (B, S, d), the scales joined from fine to coarse.
            num_cells: S_l of each scale.
            padding_masks: for each scale (B, S_l) bool, True on padding, or None.
            modulations: for each scale its log-weights, see `Modulation`; None: no modulation.
            scale_weights: (B, Q, L), how much a query reads from each scale; None: all 1.

        Returns:
            (B, Q, d)
        """
        query, key, value = self.project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        keys, values = key.split(num_cells, dim=2), value.split(num_cells, dim=2)
        result = 0
        for index, padding_mask in enumerate(padding_masks):
            tokens = query, keys[index], values[index]
            if modulations is None:
                out = attend(*tokens, padding_mask, dropout)
            elif callable(modulations[index][0]):
                scale = query.shape[-1] ** -0.5
                out = attend_in_pieces(*tokens, padding_mask, dropout, scale, *modulations[index])
            else:
                out = attend_modulated(*tokens, *modulations[index], padding_mask, dropout)
            if scale_weights is not None:
                out = out * scale_weights[:, None, :, index, None].to(out.dtype)
            result = result + out
        return self.merge(result)


def attend_modulated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_channels: Tensor,
    cell_channels: Tensor,
    padding_mask: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax((q k^T + query_channels cell_channels^T) / sqrt(d_h)) v, with fused kernels.

    Args:
        query: (B, H, Q, d_h). key, value: (B, H, S, d_h).
        query_channels: (B, H or 1, Q, k), of the dtype to compute in.
        cell_channels: (S, k or more), of which the first k count.
        padding_mask, dropout: as in `attend`.

    Returns:
        (B, H, Q, d_h)
    """
    head_dim, num_channels = query.shape[-1], query_channels.shape[-1]
    dtype = query_channels.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query, scale = _scale_queries(query)
    fused = _can_fuse(query, key, scale, dropout)  # the Gaussians' products need no asking
    # Fused kernels want queries, keys and values of one width, a multiple of 8.
    rest = query.new_zeros(-(head_dim + num_channels) % 8)
    cell_channels = cell_channels[:, :num_channels].to(dtype)
    # The channels come first, so that their large products cancel before others are added.
    query, key = (
        torch.cat([channels.expand(*shape, -1), tokens, rest.expand(*shape, -1)], dim=-1)
        for tokens, channels in ((query, query_channels), (key, cell_channels))
        for shape in [tokens.shape[:3]]
    )
    value = F.pad(value, (0, query.shape[-1] - head_dim))
    with float32_region(query):
        out = _attend(query, key, value, padding_mask, dropout, scale, fused)
    return out[..., :head_dim]
