"""Dynamic spatial weight maps (SMCA, sections 3.2 and 3.3): where each query's heads look.

A head's log-weight of the cell at distance (dx, dy), in cells, from the head's centre is

    -(p_x dx^2 + p_y dy^2 + p_xy dx^2 dy^2),      p = a^2 * factor / beta,

with the spread a predicted by the query (it multiplies the distance: the inverse of the paper's s)
and a factor of stride / 32 where the model has several scales.
"""

from dataclasses import dataclass
from functools import partial
from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from .attention import HALF_TYPES, Modulation, float32_region, kernel_scale
from .scales import Scale

MODULATIONS = ("multi_head", "head_shared", "none")
# Spread values that a head has on each scale.
SPREADS = {"fixed": 0, "single": 1, "independent": 2, "covariance": 3}
REFERENCE_STRIDE = 32


@dataclass
class Gaussians:
    """The weight maps of all queries, H' heads (1 if they share it) and scales.

    Attributes:
        centres: (B, Q, L, H', 2) heads' centres (x, y), in cells of each scale.
        precisions: (B, Q, L, H', 2 or 3): p_x, p_y and, with covariance, p_xy (per cell^2, cell^4).
    """

    centres: Tensor
    precisions: Tensor

    def log_weights(self, scale_index: int, size: Tuple[int, int]) -> Tensor:
        """The whole map of one scale of (h, w) cells: (B, Q, H', h, w). For pictures and checks;
        the model itself never makes it."""
        centres, precisions = self.centres[:, :, scale_index], self.precisions[:, :, scale_index]
        x, y = (torch.arange(n, dtype=centres.dtype, device=centres.device) for n in size[::-1])
        dx2 = (x - centres[..., 0:1]).square()[..., None, :]
        dy2 = (y - centres[..., 1:2]).square()[..., :, None]
        p = precisions[..., None, None]
        log_weights = -(p[:, :, :, 0] * dx2 + p[:, :, :, 1] * dy2)
        if p.shape[3] == 3:
            log_weights = log_weights - p[:, :, :, 2] * dx2 * dy2
        return log_weights


class SpatialModulation(nn.Module):
    """Predicts a decoder layer's Gaussians from its queries.

    Args:
        embed_dim: d. num_heads: H. num_scales: L.
        modulation: "multi_head": each head has an offset from the shared centre and a spread of
            its own; "head_shared": all heads look around the centre with one spread.
        spread: "fixed" (a = 1), "single" (one a for x and y), "independent" or "covariance".
        beta: divides the squared distance; a larger one makes wider maps.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_scales: int,
        modulation: str = "multi_head",
        spread: str = "independent",
        beta: float = 8.0,
    ):
        super().__init__()
        self.num_heads = num_heads if modulation == "multi_head" else 1
        self.num_scales = num_scales
        self.num_spreads = SPREADS[spread]
        self.beta = beta
        self.offset: Optional[nn.Linear] = None
        self.spread: Optional[nn.Linear] = None
        if modulation == "multi_head":
            self.offset = nn.Linear(embed_dim, num_scales * num_heads * 2)
        if self.num_spreads:
            self.spread = nn.Linear(embed_dim, num_scales * self.num_heads * self.num_spreads)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The spread starts at 1 for every query; the offsets keep their random start, so that
        heads differ."""
        if self.spread is not None:
            nn.init.zeros_(self.spread.weight)
            nn.init.ones_(self.spread.bias)

    def forward(self, queries: Tensor, centre: Tensor, scales: List[Scale]) -> Gaussians:
        """
        Args:
            queries: (B, Q, d), the layer's normalised input.
            centre: (B, Q, 2), (x, y) in pixels.
            scales: the L scales that the decoder reads.
        """
        # Filled on the device, for a copy from the host would wait for it.
        strides = [torch.full((1,), float(s.stride), device=queries.device) for s in scales]
        strides = torch.cat(strides)
        factors = strides / REFERENCE_STRIDE if len(scales) > 1 else torch.ones_like(strides)
        with float32_region(queries):
            centres = centre[:, :, None, None, :] / strides[:, None, None]
            if self.offset is not None:
                centres = centres + self._by_scale_and_head(self.offset(queries), 2)
            precisions = (factors / self.beta)[:, None, None]
            if self.spread is not None:
                spread = self._by_scale_and_head(self.spread(queries), self.num_spreads)
                precisions = precisions * spread.square()
            if self.num_spreads < 2:  # one value for x and y
                precisions = precisions.expand_as(centres)
        return Gaussians(centres, precisions)

    def _by_scale_and_head(self, values: Tensor, count: int) -> Tensor:
        """(B, Q, L * H' * count) -> (B, Q, L, H', count)."""
        return values.unflatten(2, (self.num_scales, self.num_heads, count))


def modulations(
    gaussians: Gaussians, scales: List[Scale], cells: List[Tensor], head_dim: int
) -> List[Modulation]:
    """The log-weights of each scale in the form that suits `CoAttention`.

    Args:
        cells: of each scale its `cell_channels`. head_dim: d_h.
    """
    if gaussians.precisions.shape[-1] == 2:
        return [
            (query_channels(gaussians, i, scale.size, head_dim, cells[i].dtype), cells[i])
            for i, scale in enumerate(scales)
        ]

    # With covariance the products grow with the fourth power of the distance, and channels would
    # lose the small log-weights near the centre among them.
    return [
        (
            partial(_log_weights, scale.size),
            [g[:, :, i].transpose(1, 2) for g in (gaussians.centres, gaussians.precisions)],
        )
        for i, scale in enumerate(scales)
    ]


def _log_weights(size: Tuple[int, int], centres: Tensor, precisions: Tensor) -> Tensor:
    """Of (B, H', q, 2) centres and (B, H', q, 3) precisions on (h, w) cells: (B, H', q, h * w)."""
    one_scale = Gaussians(centres[:, :, None], precisions[:, :, None])
    return one_scale.log_weights(0, size).flatten(3)


# Channels of queries and cells whose dot product, times `kernel_scale` like that of queries and
# keys, is a scale's log-weight (without covariance). It takes 5 of them, but products far from the
# map's middle are large and cancel, so types take more:
# - float32 cuts the query's factors in two where products exceed `_MAX_PRODUCT`, see
#   `_round_to_units`: 10 channels.
# - In bfloat16 and float16 each factor is cut into pieces that the type holds: each of the query's
#   three pieces meets each of the cell's two; only a square (up to 13 bits) has a second piece, a
#   coordinate (at most 8 bits) fits in one. That makes 21 channels.
_SQUARES = [0, 2]
# Up to this, float32 rounds log-weights and their gradients by less than 1e-4.
_MAX_PRODUCT = 4096.0


def query_channels(
    gaussians: Gaussians,
    scale_index: int,
    size: Tuple[int, int],
    head_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """(B, H', Q, k) channels of the queries for a scale of (h, w) cells, of `dtype`.

    The fifth, a term that all cells share, cancels in the softmax, but it keeps the logits small,
    and with them the rounding of the gradients."""
    middle_x, middle_y = size[1] // 2, size[0] // 2
    centres = gaussians.centres[:, :, scale_index].transpose(1, 2)
    c_x, c_y = centres[..., 0] - middle_x, centres[..., 1] - middle_y
    p_x, p_y = gaussians.precisions[:, :, scale_index].transpose(1, 2).unbind(-1)
    # float16 would not hold the last one, which grows past 65504 on large maps, in one.
    shared = (p_x * c_x**2 + p_y * c_y**2) / 16
    query = torch.stack([-p_x, 2 * p_x * c_x, -p_y, 2 * p_y * c_y, -shared], -1)
    query = query / kernel_scale(head_dim, dtype)
    if dtype in HALF_TYPES:
        pieces = _pieces(query, dtype, 3)
        return torch.cat(pieces + [piece[..., _SQUARES] for piece in pieces], dim=-1)
    with torch.no_grad():
        largest = p_x * (c_x.abs() + middle_x) ** 2 + p_y * (c_y.abs() + middle_y) ** 2
    # Asking a GPU would wait for it, and a compiled graph takes one way for all inputs.
    can_ask = query.device.type == "cpu" and not torch.compiler.is_compiling()
    if can_ask and bool(largest.amax() <= _MAX_PRODUCT):
        return query
    return _round_to_units(query, largest[..., None])


def cell_channels(size: Tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """(h * w, k) channels of a scale's (h, w) cells, of `dtype`. Of queries with fewer channels,
    they meet the first."""
    # Counted from the middle cell, coordinates and their squares are small integers.
    rows = torch.arange(size[0], dtype=torch.float32, device=device) - size[0] // 2
    columns = torch.arange(size[1], dtype=torch.float32, device=device) - size[1] // 2
    y, x = (c.flatten() for c in torch.meshgrid(rows, columns, indexing="ij"))
    cell = torch.stack([x * x, x, y * y, y, torch.full_like(x, 16)], dim=-1)
    if dtype not in HALF_TYPES:
        return torch.cat([cell, cell], dim=-1)
    high, low = _pieces(cell, dtype, 2)
    return torch.cat([high] * 3 + [low[..., _SQUARES]] * 3, dim=-1)


def _round_to_units(query: Tensor, largest: Tensor) -> Tensor:
    """(..., k) channels cut in two, (..., 2 k): first rounded to multiples of a unit so large that
    float32 holds their products with integers exactly, and any sum of these up to `largest`
    (..., 1), so that the large products cancel without an error; then the small rests."""
    unit = torch.exp2(largest.clamp(min=1e-12).log2().ceil() - 23)
    high = query + ((query / unit).round() * unit - query).detach()
    return torch.cat([high, (query - high).detach()], dim=-1)


def _pieces(value: Tensor, dtype: torch.dtype, count: int) -> List[Tensor]:
    """`count` tensors of `dtype` that add up to `value`, each the rounded rest of those before.

    Rounding passes gradients through, so the rests are constant and the first piece, which meets
    the same cells, carries the whole gradient."""
    pieces = [value.to(dtype)]
    rest = value.detach()
    for _ in range(count - 1):
        rest = rest - pieces[-1].detach().float()
        pieces.append(rest.to(dtype))
    return pieces
