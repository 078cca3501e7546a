"""Intra-scale and multi-scale self-attention encoder (SMCA, section 3.4)."""

from typing import List, Optional, Sequence

import torch
from torch import Tensor, nn

from .attention import MultiheadAttention
from .kernels import additive_mask
from .layers import FeedForward, autocast_dtype, run_layer, xavier_uniform
from .scales import Scale


class EncoderLayer(nn.Module):
    """DETR's encoder layer, post-norm: self-attention with positions on queries and keys, FFN."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        num_cells: Optional[List[int]],
        masks: Sequence[Optional[Tensor]],
    ) -> Tensor:
        """(B, S, d) tokens, and positions of that shape, to (B, S, d) tokens. `num_cells` and
        `masks` are of parts that do not see one another, as in `MultiheadAttention`."""
        located = tokens + position
        attended = self.self_attention(located, located, tokens, num_cells, masks)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class TransformerEncoder(nn.Module):
    """Encoder layers that look within each scale ("I") or at all scales together ("M").

    The scales share a layer's weights. With one scale both letters mean the same and the encoder
    is DETR's.

    Args:
        pattern: a letter for each layer, in order; the paper's best is "IIMII".
        embed_dim, num_heads: d and H.
        ffn_dim: width of the feed-forward block.
        dropout: rate of dropout on attention weights and on each block's result.
        checkpointing: in training, keep only each layer's input and compute the layer again in the
            backward pass: less memory for more time.
    """

    def __init__(
        self,
        *,
        pattern: str,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        checkpointing: bool = False,
    ):
        super().__init__()
        if set(pattern) - set("IM"):
            raise ValueError(f"pattern={pattern!r} may only hold the letters I and M.")
        self.pattern = pattern
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            EncoderLayer(embed_dim, num_heads, ffn_dim, dropout) for _ in pattern
        )
        xavier_uniform(self)

    def forward(self, scales: List[Scale]) -> List[Scale]:
        """The scales, fine to coarse, with encoded tokens."""
        tokens = torch.cat([scale.tokens for scale in scales], dim=1)
        position = torch.cat([scale.position for scale in scales], dim=1)
        dtype = autocast_dtype(tokens)
        num_cells = [scale.tokens.shape[1] for scale in scales]
        masks = [scale.padding_mask for scale in scales if scale.padding_mask is not None]
        parts = {
            "I": (num_cells, [additive_mask(scale.padding_mask, dtype) for scale in scales]),
            "M": (None, [additive_mask(torch.cat(masks, dim=1) if masks else None, dtype)]),
        }
        checkpointing = self.checkpointing and self.training
        for kind, layer in zip(self.pattern, self.layers):
            tokens = run_layer(layer, checkpointing, tokens, position, *parts[kind])
        return [scale.with_tokens(t) for scale, t in zip(scales, tokens.split(num_cells, dim=1))]
