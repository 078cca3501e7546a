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
from torch.utils.checkpoint import checkpoint

from .dropout import dropout as drop

# Where PyTorch's fused kernels can't be used (see `attend`), how many attention logits are held at
# a time: 16 MiB of them, but some rows, since each piece has a gradient of all keys.
_MAX_LOGITS, _MIN_ROWS = 1 << 22, 16
# A scale's log-weights: channels whose dot product they are, (B, H or 1, Q, k) of the queries and
# (S, k) of the cells (see `modulation.query_channels`), or a function that makes them for some
# queries (see `attend_in_pieces`).
Modulation = Union[Tuple[Tensor, Tensor], Callable[[slice], Tensor]]

# Size of a logit up to which the CPU's fused kernel gives right gradients.
_MAX_LOGIT = 1e5


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
    scale: Optional[float] = None,
) -> Tensor:
    """Softmax attention that never holds a whole (B, H, N, S) map.

    It calls PyTorch's fused kernels, but for two things that the CPU's can't do: dropout, and
    logits in the millions.

    Args:
        query: (B, H, N, c). key: (B, H, S, c). value: (B, H, S, c).
        padding_mask: (B, S) bool, True on cells to leave out, or None.
        dropout: probability with which an attention weight is dropped.
        scale: factor of the logits, 1 / sqrt(c) by default.

    Returns:
        (B, H, N, c)
    """
    mask = None if padding_mask is None else ~padding_mask[:, None, None, :]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    # A compiled graph takes one way for all inputs, whatever they hold.
    fused = query.device.type != "cpu" or torch.compiler.is_compiling()
    if fused or not (dropout or _would_overflow(query, key, scale)):
        return F.scaled_dot_product_attention(query, key, value, mask, dropout, scale=scale)
    return attend_in_pieces(query, key, value, padding_mask, dropout, scale)


# Compiled, it would be compiled anew for every number of pieces.
@torch.compiler.disable
def attend_in_pieces(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    padding_mask: Optional[Tensor],
    dropout: float,
    scale: float,
    log_weights: Optional[Callable[[slice], Tensor]] = None,
) -> Tensor:
    """`attend` in float32 without a fused kernel, some queries at a time. Of several pieces, the
    backward pass computes the attention weights again.

    Args:
        log_weights: gives, for a slice of the queries, what to add to their logits
            (B, H or 1, queries, S).
    """
    rows = max(_MIN_ROWS, _MAX_LOGITS // (key.shape[0] * key.shape[1] * key.shape[2]))

    def attend_piece(piece: slice) -> Tensor:
        with float32_region(query):
            logits = (query[:, :, piece].float() * scale) @ key.float().transpose(-2, -1)
            if log_weights is not None:
                logits = logits + log_weights(piece)
            if padding_mask is not None:
                logits = logits.masked_fill(padding_mask[:, None, None, :], -torch.inf)
            return drop(logits.softmax(dim=-1), dropout) @ value.float()

    if rows >= query.shape[2]:
        return attend_piece(slice(None)).to(query.dtype)
    pieces = [slice(start, start + rows) for start in range(0, query.shape[2], rows)]
    results = [checkpoint(attend_piece, piece, use_reentrant=False) for piece in pieces]
    return torch.cat(results, dim=2).to(query.dtype)


def _would_overflow(query: Tensor, key: Tensor, scale: float) -> bool:
    """Whether the CPU's fused kernel cannot be trusted with the gradient.

    Its backward pass computes logits anew, rounds them differently and takes their exponential
    without looking for a new maximum. That is harmless until logits reach the millions, as they do
    in a badly initialised network; then infinite gradients come out."""
    if not (query.requires_grad or key.requires_grad):
        return False
    longest = [
        torch.linalg.vector_norm(tokens.detach(), dim=-1, dtype=torch.float32).amax()
        for tokens in (query, key)
    ]
    return bool(longest[0] * longest[1] * scale > _MAX_LOGIT)


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
            elif callable(modulations[index]):
                scale = query.shape[-1] ** -0.5
                out = attend_in_pieces(*tokens, padding_mask, dropout, scale, modulations[index])
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
        query_channels: (B, H or 1, Q, k). cell_channels: (S, k), of the dtype to compute in.
        padding_mask, dropout: as in `attend`.

    Returns:
        (B, H, Q, d_h)
    """
    head_dim = query.shape[-1]
    dtype = query_channels.dtype
    query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    # Fused kernels want queries, keys and values of one width, a multiple of 8.
    rest = query.new_zeros(-(head_dim + query_channels.shape[-1]) % 8)
    query, key = (
        torch.cat([tokens] + [x.expand(*tokens.shape[:3], -1) for x in (channels, rest)], dim=-1)
        for tokens, channels in ((query, query_channels), (key, cell_channels.to(dtype)))
    )
    value = F.pad(value, (0, query.shape[-1] - head_dim))
    with float32_region(query):
        out = attend(query, key, value, padding_mask, dropout, scale=head_dim**-0.5)
    return out[..., :head_dim]
