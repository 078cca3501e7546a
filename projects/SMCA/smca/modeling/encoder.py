"""Intra-scale and multi-scale self-attention encoder (SMCA, section 3.4)."""

from functools import partial
from typing import List, Optional

import torch
from torch import Tensor, nn

from .attention import MultiheadAttention
from .layers import FeedForward, run_layer, xavier_uniform
from .scales import Scale, join_padding_masks


class EncoderLayer(nn.Module):
    """DETR's encoder layer, post-norm: self-attention with positions on queries and keys, FFN."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attention = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(
        self, tokens: Tensor, position: Tensor, padding_mask: Optional[Tensor] = None
    ) -> Tensor:
        """
        Args:
            tokens: (B, S, d).
            position: (B, S, d), added to queries and keys.
            padding_mask: (B, S) bool, True on padding; None where nothing is.

        Returns:
            (B, S, d)
        """
        located = tokens + position
        attended = self.self_attention(located, located, tokens, padding_mask)
        return self.ffn(self.norm(tokens + self.dropout(attended)))


class TransformerEncoder(nn.Module):
    """Encoder layers that look within each scale ("I") or at all scales together ("M").

    The scales share a layer's weights. With one scale both letters mean the same and the encoder
    is DETR's.

    Args:
        pattern: a letter for each layer, in order; the paper's best is "IIMII".
        embed_dim: d.
        num_heads: H.
        ffn_dim: width of the feed-forward block.
        dropout: of attention weights and of each block's result.
        checkpointing: in training, keep only each layer's input and compute the layer again in the
            backward pass: less memory for more time.

    Raises:
        ValueError: for another letter in `pattern`.
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
            raise ValueError(
                f"pattern={pattern!r} may only hold the letters I (intra-scale) and "
                "M (multi-scale), one for each layer, for instance 'IIMII'."
            )
        self.pattern = pattern
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            EncoderLayer(embed_dim, num_heads, ffn_dim, dropout) for _ in pattern
        )
        xavier_uniform(self)

    def forward(self, scales: List[Scale]) -> List[Scale]:
        """
        Args:
            scales: fine to coarse.

        Returns:
            The scales with encoded tokens, in the same order.
        """
        joined_position = torch.cat([scale.position for scale in scales], dim=1)
        joined_mask = join_padding_masks(scales)
        num_cells = [scale.tokens.shape[1] for scale in scales]
        tokens = [scale.tokens for scale in scales]
        for kind, layer in zip(self.pattern, self.layers):
            run = partial(run_layer, layer, self.checkpointing and self.training)
            if kind == "I":
                tokens = [
                    run(t, scale.position, scale.padding_mask) for t, scale in zip(tokens, scales)
                ]
            else:
                joined = run(torch.cat(tokens, dim=1), joined_position, joined_mask)
                tokens = list(joined.split(num_cells, dim=1))
        return [scale.with_tokens(t) for scale, t in zip(scales, tokens)]
