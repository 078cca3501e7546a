"""An encoder for training from scratch: attention where cells are few, convolutions between the
scales (the hybrid encoder of RT-DETR, section 4.2; the two ways are PANet's)."""

from typing import List

import torch.nn.functional as F
from torch import Tensor, nn

from .encoder import EncoderLayer
from .kernels import additive_mask
from .layers import autocast_dtype, xavier_uniform
from .scales import Scale, as_tokens

# Group norm, since batch norm needs large batches.
_NUM_GROUPS = 16


class ConvBlock(nn.Module):
    """A residual block of convolutions 1x1, 3x3, 1x1, as in a ResNet."""

    def __init__(self, embed_dim: int, hidden_dim: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(embed_dim, hidden_dim, 1, bias=False),
            nn.GroupNorm(_NUM_GROUPS, hidden_dim),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, hidden_dim, 3, padding=1, bias=False),
            nn.GroupNorm(_NUM_GROUPS, hidden_dim),
            nn.ReLU(),
            nn.Conv2d(hidden_dim, embed_dim, 1, bias=False),
            nn.GroupNorm(_NUM_GROUPS, embed_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, d, h, w) -> (B, d, h, w)"""
        return F.relu(x + self.layers(x))


class PyramidEncoder(nn.Module):
    """Self-attention within the coarsest scale, then a way of convolutions from coarse to fine and
    one back.

    Args:
        num_scales: L, fine to coarse; each scale has twice the stride of the one before.
        embed_dim: d, a multiple of 16, as is `hidden_dim`.
        num_heads, ffn_dim, dropout: of the attention, as in `TransformerEncoder`.
        hidden_dim: channels of the 3x3 convolutions.
    """

    def __init__(
        self,
        *,
        num_scales: int,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        hidden_dim: int,
        dropout: float = 0.0,
    ):
        super().__init__()
        if embed_dim % _NUM_GROUPS or hidden_dim % _NUM_GROUPS:
            raise ValueError(
                f"embed_dim={embed_dim} and hidden_dim={hidden_dim} must be multiples of "
                f"{_NUM_GROUPS}."
            )
        self.num_scales = num_scales
        self.input_norms = nn.ModuleList(
            nn.GroupNorm(_NUM_GROUPS, embed_dim) for _ in range(num_scales)
        )
        self.attention = EncoderLayer(embed_dim, num_heads, ffn_dim, dropout)
        xavier_uniform(self.attention)
        pairs = range(num_scales - 1)
        self.to_fine = nn.ModuleList(ConvBlock(embed_dim, hidden_dim) for _ in pairs)
        self.down = nn.ModuleList(
            nn.Conv2d(embed_dim, embed_dim, 3, stride=2, padding=1, groups=embed_dim) for _ in pairs
        )
        self.to_coarse = nn.ModuleList(ConvBlock(embed_dim, hidden_dim) for _ in pairs)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, scales: List[Scale]) -> List[Scale]:
        """The L scales, fine to coarse, with encoded tokens."""
        maps = [norm(scale.as_map(scale.tokens)) for norm, scale in zip(self.input_norms, scales)]
        last, tokens = scales[-1], as_tokens(maps[-1])
        mask = additive_mask(last.padding_mask, autocast_dtype(tokens))
        maps[-1] = last.as_map(self.attention(tokens, last.position, None, [mask]))
        for fine in reversed(range(len(maps) - 1)):
            coarse = F.interpolate(maps[fine + 1], size=maps[fine].shape[-2:], mode="nearest")
            maps[fine] = self.to_fine[fine](maps[fine] + coarse)
        for fine in range(len(maps) - 1):
            maps[fine + 1] = self.to_coarse[fine](maps[fine + 1] + self.down[fine](maps[fine]))
        return [scale.with_tokens(self.norm(as_tokens(x))) for scale, x in zip(scales, maps)]
