"""Convolutional multi-scale encoder: the authors' later "new multi scale" model.

Depthwise convolutions mix the cells of a scale and of its neighbors in place of self-attention.
They do not know the padding mask: what lies under padding does reach the valid cells near it.
"""

from typing import List

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import FeedForward, run_layer, xavier_uniform
from .scales import Scale, as_tokens


def depthwise(d: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    """Convolution of each channel by itself, to ceil(h / stride) x ceil(w / stride) cells."""
    return nn.Conv2d(d, d, kernel_size, stride, padding=kernel_size // 2, groups=d)


class ConvEncoderLayer(nn.Module):
    """Convolutions within and between neighboring scales, then the FFN; post-norm. The arguments
    are those of `ConvEncoder`."""

    def __init__(
        self,
        embed_dim: int,
        num_scales: int,
        kernel_size: int,
        share_cross_scale: bool,
        pointwise: bool,
        ffn_dim: int,
        dropout: float,
    ):
        super().__init__()
        num_pairs = num_scales - 1
        num_cross = min(num_pairs, 1) if share_cross_scale else num_pairs
        self.conv_in = nn.Conv2d(embed_dim, embed_dim, 1) if pointwise else nn.Identity()
        self.intra = nn.ModuleList(depthwise(embed_dim, kernel_size) for _ in range(num_scales))
        self.down = nn.ModuleList(depthwise(embed_dim, kernel_size, 2) for _ in range(num_cross))
        self.up = nn.ModuleList(depthwise(embed_dim, kernel_size) for _ in range(num_cross))
        self.conv_out = nn.Conv2d(embed_dim, embed_dim, 1) if pointwise else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, scales: List[Scale]) -> List[Scale]:
        """The scales with this layer's tokens."""
        maps = [
            intra(self.conv_in(scale.as_map(scale.tokens + scale.position)))
            for intra, scale in zip(self.intra, scales)
        ]
        mixed = list(maps)
        for fine in range(len(maps) - 1):
            coarse = fine + 1
            pair = 0 if len(self.down) == 1 else fine
            down, up = self.down[pair], self.up[pair]
            mixed[coarse] = mixed[coarse] + down(maps[fine])
            mixed[fine] = mixed[fine] + F.interpolate(
                up(maps[coarse]), size=maps[fine].shape[-2:], mode="bilinear", align_corners=True
            )
        return [self._finish(scale, feature_map) for scale, feature_map in zip(scales, mixed)]

    def _finish(self, scale: Scale, mixed: Tensor) -> Scale:
        update = self.dropout(as_tokens(self.conv_out(mixed)))
        return scale.with_tokens(self.ffn(self.norm(scale.tokens + update)))


class ConvEncoder(nn.Module):
    """Convolutional layers over all scales; then the finest map is reduced to the next stride.

    Args:
        num_layers: 6 in the released logs, 5 in the released file.
        kernel_size: of the depthwise convolutions, odd; 7 in the logs, 5 in the file.
        share_cross_scale: one downward and one upward convolution for all pairs of scales, not
            one for each pair.
        pointwise: the two 1x1 convolutions around the depthwise ones, shared by the scales.
        num_scales: L, fine to coarse; each scale has twice the stride of the one before.
        reduce_finest: before the decoder, the finest map goes through a 3x3 stride-2 convolution
            and takes over the position, mask and stride of the second scale (strides 8, 16, 32, 64
            become 16, 16, 32, 64).
        embed_dim, ffn_dim, dropout, checkpointing: as in `TransformerEncoder`.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        kernel_size: int,
        num_scales: int,
        reduce_finest: bool,
        embed_dim: int,
        ffn_dim: int,
        dropout: float,
        share_cross_scale: bool = True,
        pointwise: bool = True,
        checkpointing: bool = False,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd.")
        if reduce_finest and num_scales < 2:
            raise ValueError("reduce_finest=True needs at least two scales.")
        self.num_scales = num_scales
        self.checkpointing = checkpointing
        self.layers = nn.ModuleList(
            ConvEncoderLayer(
                embed_dim, num_scales, kernel_size, share_cross_scale, pointwise, ffn_dim, dropout
            )
            for _ in range(num_layers)
        )
        xavier_uniform(self)
        self.reduce = nn.Conv2d(embed_dim, embed_dim, 3, 2, padding=1) if reduce_finest else None

    def forward(self, scales: List[Scale]) -> List[Scale]:
        """The L scales, fine to coarse, with encoded tokens; the finest reduced if so set."""
        for layer in self.layers:
            scales = run_layer(layer, self.checkpointing and self.training, scales)
        if self.reduce is not None:
            finest = scales[0]
            tokens = as_tokens(self.reduce(finest.as_map(finest.tokens)))
            scales = [scales[1].with_tokens(tokens), *scales[1:]]
        return scales
