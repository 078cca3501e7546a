"""Convolutional multi-scale encoder: the authors' later "new multi scale" model.

Depthwise convolutions mix the cells of a scale and of its neighbours in place of self-attention.
They do not know the padding mask: what lies under padding does reach the valid cells near it.
"""

from dataclasses import replace
from typing import List

import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import Dropout
from .layers import FeedForward, run_layer, xavier_uniform
from .scales import Scale, as_tokens


def depthwise(embed_dim: int, kernel_size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        embed_dim, embed_dim, kernel_size, stride, padding=kernel_size // 2, groups=embed_dim
    )


def pointwise(convolution: nn.Module, tokens: Tensor) -> Tensor:
    """A 1x1 convolution (or an identity) on (B, S, d) tokens: a matrix product, whatever the memory
    format."""
    if isinstance(convolution, nn.Identity):
        return tokens
    return F.linear(tokens, convolution.weight.flatten(1), convolution.bias)


class ConvEncoderLayer(nn.Module):
    """Convolutions within and between neighbouring scales, then the FFN; post-norm.

    Args:
        num_scales: L. kernel_size: k of all depthwise convolutions, odd.
        share_cross_scale: one downward and one upward convolution for all pairs of scales, not
            one for each pair.
        pointwise: the two 1x1 convolutions around the depthwise ones, shared by the scales.
    """

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
        num_cross = 1 if share_cross_scale else num_scales - 1
        if num_scales == 1:
            num_cross = 0
        self.conv_in = nn.Conv2d(embed_dim, embed_dim, 1) if pointwise else nn.Identity()
        self.intra = nn.ModuleList(depthwise(embed_dim, kernel_size) for _ in range(num_scales))
        self.down = nn.ModuleList(depthwise(embed_dim, kernel_size, 2) for _ in range(num_cross))
        self.up = nn.ModuleList(depthwise(embed_dim, kernel_size) for _ in range(num_cross))
        self.conv_out = nn.Conv2d(embed_dim, embed_dim, 1) if pointwise else nn.Identity()
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

    def forward(self, scales: List[Scale]) -> List[Scale]:
        maps = [
            intra(scale.as_map(pointwise(self.conv_in, scale.tokens + scale.position)))
            for intra, scale in zip(self.intra, scales)
        ]
        mixed = list(maps)
        for fine in range(len(maps) - 1):
            coarse = fine + 1
            # A shared convolution is the last one for every pair.
            index = min(fine, len(self.down) - 1)
            down, up = self.down[index], self.up[index]
            mixed[coarse] = mixed[coarse] + down(maps[fine])
            mixed[fine] = mixed[fine] + F.interpolate(
                up(maps[coarse]), size=maps[fine].shape[-2:], mode="bilinear", align_corners=True
            )
        return [self._finish(scale, m) for scale, m in zip(scales, mixed)]

    def _finish(self, scale: Scale, mixed: Tensor) -> Scale:
        update = self.dropout(pointwise(self.conv_out, as_tokens(mixed)))
        return replace(scale, tokens=self.ffn(self.norm(scale.tokens + update)))


class ConvEncoder(nn.Module):
    """Convolutional layers over all scales; then the finest map is reduced to the next stride.

    Args:
        num_layers: 6 in the released logs, 5 in the released file.
        kernel_size: 7 in the logs, 5 in the file. share_cross_scale, pointwise: see the layer.
        num_scales: L, fine to coarse; each scale has twice the stride of the one before.
        reduce_finest: before the decoder, the finest map goes through a 3x3 stride-2 convolution
            and takes over the position, mask and stride of the second scale (strides 8, 16, 32, 64
            become 16, 16, 32, 64).
        checkpointing: as in `TransformerEncoder`.
    """

    def __init__(
        self,
        num_layers: int = 6,
        kernel_size: int = 7,
        share_cross_scale: bool = True,
        pointwise: bool = True,
        num_scales: int = 4,
        reduce_finest: bool = True,
        embed_dim: int = 256,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        checkpointing: bool = False,
    ):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"model.encoder.kernel_size={kernel_size} must be odd.")
        if reduce_finest and num_scales < 2:
            raise ValueError("model.encoder.reduce_finest needs at least two scales.")
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
        """The scales with encoded tokens, the finest reduced if so set."""
        for layer in self.layers:
            scales = run_layer(layer, self.checkpointing and self.training, scales)
        if self.reduce is not None:
            finest = scales[0]
            tokens = as_tokens(self.reduce(finest.as_map(finest.tokens)))
            scales = [replace(scales[1], tokens=tokens), *scales[1:]]
        return scales
