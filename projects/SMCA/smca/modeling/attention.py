"""Multi-head attention and the spatially modulated co-attention (SMCA, section 3.2).

Co-attention adds the logarithm of a weight map to its logits: `weight_map.py` says what that is,
and `kernels.py` computes it.
"""

from typing import List, Optional, Sequence, Tuple

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
        embed_dim: d, a multiple of H. num_heads: H. dropout: of the attention weights, in training.
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

    def project(self, query: Tensor, key: Tensor, value: Tensor) -> Tuple[Tensor, ...]:
        """(B, N, d), (B, S, d), (B, S, d) projected and cut into heads: (B, H, N or S, d_h)."""
        dtype = autocast_dtype(query)
        # Autocast would cast each part of them by itself.
        weight, bias = self.in_proj_weight.to(dtype), self.in_proj_bias.to(dtype)
        d = weight.shape[1]
        if query is key:  # one product
            (both, last), (bias, last_bias) = weight.split([2 * d, d]), bias.split([2 * d, d])
            query, key = F.linear(query, both, bias).chunk(2, dim=2)
            value = F.linear(value, last, last_bias)
        else:
            query, key, value = (
                F.linear(*x) for x in zip((query, key, value), weight.split(d), bias.split(d))
            )
        return tuple(
            tokens.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for tokens in (query, key, value)
        )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_cells: Optional[List[int]] = None,
        masks: Sequence[Optional[Tensor]] = (None,),
    ) -> Tensor:
        """(B, N, d) queries, (B, S, d) keys and values to (B, N, d).

        Args:
            num_cells: lengths of the parts of all three that do not see one another; None: there is
                one part.
            masks: of each part, as in `attend`.
        """
        heads = self.project(query, key, value)
        parts = [heads] if num_cells is None else zip(*[x.split(num_cells, dim=2) for x in heads])
        dropout = self.dropout if self.training else 0.0
        results = [
            attend(q, k, v, mask, dropout).transpose(1, 2).flatten(2)
            for (q, k, v), mask in zip(parts, masks)
        ]
        return self.out_proj(results[0] if len(results) == 1 else torch.cat(results, dim=1))


class CoAttention(MultiheadAttention):
    """The decoder's attention to the image: softmax within each scale, results weighted and added.

    One scale without weight maps is DETR's cross-attention.
    """

    def forward(  # type: ignore[override]
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_cells: List[int],
        masks: Sequence[Optional[Tensor]],
        weight_maps: Optional[Sequence[WeightMap]] = None,
        scale_weights: Optional[Tensor] = None,
    ) -> Tensor:
        """(B, Q, d) queries, (B, S, d) keys and values of the joined scales to (B, Q, d).

        Args:
            num_cells, masks: S_l of each scale, and its mask as in `attend`.
            weight_maps: of each scale; None: no modulation.
            scale_weights: (B, Q, L), how much a query reads from each scale; None: all 1.
        """
        query, key, value = self.project(query, key, value)
        dropout = self.dropout if self.training else 0.0
        factors = None
        if scale_weights is not None:
            factors = scale_weights.to(query.dtype)[:, None, :, None].unbind(-1)
        scales = zip(key.split(num_cells, dim=2), value.split(num_cells, dim=2), masks)
        result: Optional[Tensor] = None
        for index, (keys, values, mask) in enumerate(scales):
            weight_map = None if weight_maps is None else weight_maps[index]
            out = attend(query, keys, values, mask, dropout, weight_map)
            if factors is not None:
                out = out * factors[index]
            result = out if result is None else result + out
        assert result is not None
        return self.out_proj(result.transpose(1, 2).flatten(2))
