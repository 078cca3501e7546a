"""Multi-head attention and the spatially modulated co-attention (SMCA, section 3.2).

Co-attention adds the logarithm of a weight map to its logits: `weight_map.py` says what that is,
and `kernels.py` computes it.
"""

from typing import Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .kernels import attend
from .layers import autocast_dtype
from .weight_map import WeightMap


class MultiheadAttention(nn.Module):
    """Multi-head attention on batch-first tokens.

    Parameters have the names and shapes of ``torch.nn.MultiheadAttention`` (q, k and v stacked in
    one (3 d, d) tensor). Weights start Xavier uniform, the stacked ones drawn as one, biases at 0
    (DETR).

    Args:
        embed_dim: d. num_heads: H. dropout: of the attention weights, in training.

    Raises:
        ValueError: d is no multiple of H.
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
        dtype = autocast_dtype(query)
        # Autocast would cast each part of them by itself.
        weight, bias = self.in_proj_weight.to(dtype), self.in_proj_bias.to(dtype)
        d = weight.shape[1]
        if query is key:  # one product
            weights, biases = weight.split([2 * d, d]), bias.split([2 * d, d])
            query, key = F.linear(query, weights[0], biases[0]).chunk(2, dim=2)
        else:
            weights, biases = weight.split(d), bias.split(d)
            query, key = (
                F.linear(query, weights[0], biases[0]),
                F.linear(key, weights[1], biases[1]),
            )
        value = F.linear(value, weights[-1], biases[-1])
        query, key, value = (
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query, key, value)
        )
        return query, key, value

    def merge(self, heads: Tensor) -> Tensor:
        """(B, H, N, d_h) results of the heads, joined and projected: (B, N, d)."""
        return self.out_proj(heads.transpose(1, 2).flatten(2))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, padding_mask: Optional[Tensor] = None
    ) -> Tensor:
        """
        Args:
            query: (B, N, d). key, value: (B, S, d).
            padding_mask: of keys to leave out, as in `attend`.

        Returns:
            (B, N, d)
        """
        dropout = self.dropout if self.training else 0.0
        return self.merge(attend(*self.project(query, key, value), padding_mask, dropout))

    def within(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_cells: Sequence[int],
        padding_masks: Sequence[Optional[Tensor]],
    ) -> Tensor:
        """Self-attention within each of several parts, which are joined.

        Args:
            query, key, value: (B, S, d).
            num_cells: of each part.
            padding_masks: of each part, as in `attend`.

        Returns:
            (B, S, d)
        """
        dropout = self.dropout if self.training else 0.0
        heads = [x.split(list(num_cells), dim=2) for x in self.project(query, key, value)]
        parts = [
            attend(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
            for q, k, v, mask in zip(*heads, padding_masks)
        ]
        return self.out_proj(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))


class CoAttention(MultiheadAttention):
    """The decoder's attention to the image: softmax within each scale, results weighted and added.

    One scale without weight maps is DETR's cross-attention.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_cells: Sequence[int],
        padding_masks: Sequence[Optional[Tensor]],
        weight_maps: Optional[Sequence[WeightMap]] = None,
        scale_weights: Optional[Tensor] = None,
    ) -> Tensor:
        """
        Args:
            query: (B, Q, d). key, value: (B, S, d), the scales joined from fine to coarse.
            num_cells: S_l of each scale.
            padding_masks: of each scale, as in `attend`.
            weight_maps: of each scale; None: no modulation.
            scale_weights: (B, Q, L), how much a query reads from each scale; None: all 1.

        Returns:
            (B, Q, d)
        """
        query, key, value = self.project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        keys, values = key.split(list(num_cells), dim=2), value.split(list(num_cells), dim=2)
        factors = None
        if scale_weights is not None:
            factors = scale_weights.to(query.dtype)[:, None, :, None].unbind(-1)
        result: Optional[Tensor] = None
        for index, padding_mask in enumerate(padding_masks):
            weight_map = None if weight_maps is None else weight_maps[index]
            out = attend(query, keys[index], values[index], padding_mask, dropout, weight_map)
            if factors is not None:
                out = out * factors[index]
            result = out if result is None else result + out
        assert result is not None
        return self.merge(result)
