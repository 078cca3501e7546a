"""The SMCA decoder (section 3): each query says where to look, then reads from there."""

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import Tensor, nn

from .attention import CoAttention, MultiheadAttention
from .layers import FeedForward, mlp, xavier_uniform
from .scales import Scale
from .weight_map import PUBLISHED_BETA, WeightMapPredictor, check_settings, float32_region


class Memory(NamedTuple):
    """What all decoder layers read: the encoded scales, joined."""

    scales: List[Scale]
    num_cells: List[int]  # of each scale
    key: Tensor  # (B, S, d) tokens with their positions
    value: Tensor  # (B, S, d) tokens


class DecoderOutput(NamedTuple):
    """
    Attributes:
        hidden: (N, B, Q, d) normalized output of each of the N layers.
        reference: (B, Q, 2) predicted center (x, y) before its sigmoid; None without modulation.
    """

    hidden: Tensor
    reference: Optional[Tensor]


class DecoderLayer(nn.Module):
    """Query self-attention, (modulated) co-attention, FFN; post-norm.

    Args:
        modulation: "multi_head", "head_shared" or "none" (DETR's layer).
        predicts_center: the first layer of a modulated decoder predicts the center for all.
        The others as in `Decoder`.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        num_scales: int,
        modulation: str,
        spread: str,
        beta: float,
        offset_gain: Optional[float],
        scale_selection: bool,
        predicts_center: bool,
    ):
        super().__init__()
        self.self_attention = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.co_attention = CoAttention(embed_dim, num_heads, dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

        # What a setting does not use does not exist.
        self.input_norm: Optional[nn.LayerNorm] = None
        self.center: Optional[nn.Module] = None
        self.modulation: Optional[WeightMapPredictor] = None
        self.scale_weight: Optional[nn.Linear] = None
        if modulation != "none":
            self.modulation = WeightMapPredictor(
                embed_dim=embed_dim,
                num_heads=num_heads,
                num_scales=num_scales,
                modulation=modulation,
                spread=spread,
                beta=beta,
                offset_gain=offset_gain,
            )
            self.center = mlp(embed_dim, 2) if predicts_center else None
        if scale_selection and num_scales > 1:
            self.scale_weight = nn.Linear(embed_dim, num_scales)
        readers = [m for m in (self.center, self.modulation, self.scale_weight) if m is not None]
        if any(list(reader.parameters()) for reader in readers):
            self.input_norm = nn.LayerNorm(embed_dim)

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        memory: Memory,
        image_sizes: Tensor,
        reference: Optional[Tensor] = None,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """
        Args:
            queries: (B, Q, d). query_position: (Q, d).
            image_sizes: (B, 1, 2) each image's own (width, height) in pixels.
            reference: (B, Q, 2) from the first layer; None in the first layer.

        Returns:
            (B, Q, d) queries and (B, Q, 2) reference (None without modulation).
        """
        located = queries + query_position
        weight_maps = scale_weights = None
        layer_input = located if self.input_norm is None else self.input_norm(located)
        if self.modulation is not None:
            with float32_region(layer_input):
                if self.center is not None:
                    reference = self.center(layer_input)
                assert reference is not None  # the first layer predicts it
                center = reference.sigmoid() * image_sizes
            weight_maps = self.modulation(layer_input, center, memory.scales)
        if self.scale_weight is not None:
            with float32_region(layer_input):
                scale_weights = self.scale_weight(layer_input).softmax(dim=-1)

        attended = self.self_attention(located, located, queries)
        queries = self.norm1(queries + self.dropout1(attended))

        attended = self.co_attention(
            queries + query_position,
            memory.key,
            memory.value,
            memory.num_cells,
            [scale.padding_mask for scale in memory.scales],
            weight_maps,
            scale_weights,
        )
        queries = self.norm2(queries + self.dropout2(attended))
        return self.ffn(queries), reference


class Decoder(nn.Module):
    """Decoder layers, and one LayerNorm for the output of each.

    Args:
        num_layers: 6 in the paper. embed_dim: d. num_heads: H. ffn_dim: width of the feed-forward
            block. dropout: of attention weights and of each block's result.
        num_scales: L, how many scales the encoder gives.
        modulation: "multi_head" (SMCA), "head_shared" (the paper's first step) or "none" (DETR).
        spread: the maps' shape, one of `weight_map.SPREADS`.
        beta: divides the squared distances.
        offset_gain: of the initial weights that predict the heads' offsets; None: sqrt(beta / 8),
            for heads to start as many radii of a map from the center as published.
        scale_selection: each query weighs the scales; without, their results are simply added.
    """

    def __init__(
        self,
        *,
        num_layers: int = 6,
        modulation: str = "multi_head",
        spread: str = "independent",
        beta: float = PUBLISHED_BETA,
        offset_gain: Optional[float] = None,
        scale_selection: bool = True,
        num_scales: int = 3,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
    ):
        super().__init__()
        check_settings(modulation, spread, beta, offset_gain)
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1.")
        self.num_scales = num_scales
        self.modulated = modulation != "none"
        self.layers = nn.ModuleList(
            DecoderLayer(
                embed_dim=embed_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                num_scales=num_scales,
                modulation=modulation,
                spread=spread,
                beta=beta,
                offset_gain=offset_gain,
                scale_selection=scale_selection,
                predicts_center=index == 0,
            )
            for index in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        xavier_uniform(self)
        for module in self.modules():
            if isinstance(module, WeightMapPredictor):
                module.reset_parameters()

    def forward(
        self, scales: List[Scale], query_position: Tensor, image_sizes: Tensor
    ) -> DecoderOutput:
        """
        Args:
            scales: the L encoded scales.
            query_position: (Q, d), learned.
            image_sizes: (B, 2) each image's own (width, height) in pixels, before padding.
        """
        tokens = torch.cat([scale.tokens for scale in scales], dim=1)
        position = torch.cat([scale.position for scale in scales], dim=1)
        num_cells = [scale.tokens.shape[1] for scale in scales]
        memory = Memory(scales, num_cells, tokens + position, tokens)
        queries = torch.zeros_like(query_position).expand(tokens.shape[0], -1, -1)
        reference, hidden = None, []
        for layer in self.layers:
            queries, reference = layer(
                queries, query_position, memory, image_sizes[:, None], reference
            )
            hidden.append(self.norm(queries))
        return DecoderOutput(torch.stack(hidden), reference)
