"""Dynamic spatial weight maps (SMCA, sections 3.2 and 3.3): where each query's heads look.

A query predicts for each of its heads a center and a spread; the head's map says how much each cell
of the image weighs. Attention adds the map's logarithm to its logits. The paper's log-weight of the
cell at distance (dx, dy), in cells, from the head's center is

    -(a_x^2 dx^2 + a_y^2 dy^2) * factor,      factor = stride / 32 / beta,

with the spread (a_x, a_y) multiplying the distance (the inverse of the paper's s); a model of one
scale has the factor 1 / beta. Other shapes are further classes below, or one of your own.

Where queries have boxes, distances are in units of the box: a head's center is the box's center
plus an offset times half its sides, and the map falls to 1 / e at half a side / spread.

This file needs PyTorch alone and can be copied into another project, see docs/plug_in.md.
Shorthand: B images, Q queries, d channels, H heads, H' heads with a map of their own (H, or 1 if
they share it), L scales.
"""

import contextlib
import math
import pydoc
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Dict, List, NamedTuple, Optional, Sequence, Tuple, Type, Union

import torch
from torch import Tensor, nn

REFERENCE_STRIDE = 32
PUBLISHED_BETA = 8.0
# A cell's own center, in cells from its corner. The paper takes cells for points; boxes do not.
HALF_CELL = 0.5


def float32_region(tensor: Tensor) -> contextlib.AbstractContextManager:
    """A context without autocast, for coordinates: half precision would round them to several
    pixels."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.autocast(tensor.device.type, enabled=False)
    return contextlib.nullcontext()


class Channels(NamedTuple):
    """Log-weights written as dot products of queries and cells. Any attention kernel adds them to
    its logits when the channels are appended to queries and keys."""

    query: Tensor  # (B, H', Q, k) float32
    cells: Tensor  # (h * w, k) float32, all whole numbers
    # The channels whose whole numbers take more than 8 bits on large maps. A slice: a GPU would
    # have to wait for a list.
    long: slice


@dataclass
class WeightMap(ABC):
    """The maps of all queries and heads on one scale.

    A shape defines `log_weights_at`. If its log-weights are dot products, it defines `channels` as
    well, with which it runs in the fast kernels.

    Attributes:
        centers: (B, H', Q, 2) heads' centers (x, y) in cells.
        spreads: (B, H', Q, n), as many values as `initial_spreads` has, as the query predicts them.
        factor: multiplies squared distances.
        size: (h, w) in cells.
        unit: (B, 1, Q, 2) the unit of distances along x and y, in cells; None: a cell.
    """

    centers: Tensor
    spreads: Tensor
    factor: float
    size: Tuple[int, int]
    unit: Optional[Tensor] = None

    initial_spreads: ClassVar[Tuple[float, ...]]

    @abstractmethod
    def log_weights_at(self, dx: Tensor, dy: Tensor) -> Tensor:
        """(B, H', Q, h, w) log-weights, at most 0, at distances from the heads' centers, dx
        (B, H', Q, 1, w) and dy (B, H', Q, h, 1), in units."""

    def log_weights(self, x: Optional[Tensor] = None, y: Optional[Tensor] = None) -> Tensor:
        """(B, H', Q, h, w) log-weights of all cells, or of the positions x (w,) and y (h,), which
        are in cells."""
        centers = self.centers
        height, width = self.size
        if x is None:
            x = torch.arange(width, dtype=centers.dtype, device=centers.device)
        if y is None:
            y = torch.arange(height, dtype=centers.dtype, device=centers.device)
        center_x, center_y = centers.split(1, dim=-1)
        dx, dy = x - center_x, y - center_y
        if self.unit is not None:
            dx, dy = dx / self.unit[..., 0:1], dy / self.unit[..., 1:2]
        return self.log_weights_at(dx[..., None, :], dy[..., :, None])

    def of_queries(self, queries: Any) -> "WeightMap":
        """The maps of some queries, given as an index (a slice, or indices) into Q."""
        centers, spreads = self.centers[:, :, queries], self.spreads[:, :, queries]
        unit = None if self.unit is None else self.unit[:, :, queries]
        return replace(self, centers=centers, spreads=spreads, unit=unit)

    def channels(self) -> Optional[Channels]:
        """The log-weights as dot products, or None."""
        return None

    def _spreads_of_cells(self) -> Tuple[Tensor, ...]:
        """The n spread values, (B, H', Q, 1, 1) each."""
        return self.spreads[..., None, None, :].unbind(-1)


class Gaussian(WeightMap):
    """-(a_x^2 dx^2 + a_y^2 dy^2): the paper's map, with a spread for each axis."""

    initial_spreads: ClassVar[Tuple[float, ...]] = (1.0, 1.0)

    @property
    def precisions(self) -> Tensor:
        """(B, H', Q, 2) factors of dx^2 and dy^2, in units."""
        return (self.factor * self.spreads.square()).expand_as(self.centers)

    def log_weights_at(self, dx: Tensor, dy: Tensor) -> Tensor:
        p_x, p_y = self.precisions[..., None, None, :].unbind(-1)
        return -(p_x * dx.square()) - p_y * dy.square()

    def channels(self) -> Channels:
        # -p (x - c)^2 = -p x^2 + 2 p c x - p c^2 for each axis. The last term is the same for all
        # cells, but it keeps the logits small, and with them the rounding of the gradients.
        # Counted from the middle cell, coordinates and their products are small whole numbers.
        height, width = self.size
        c_x, c_y = self.centers[..., 0] - width // 2, self.centers[..., 1] - height // 2
        precisions = self.precisions
        if self.unit is not None:
            precisions = precisions / self.unit.square()
        p_x, p_y = precisions.unbind(-1)
        shared = (p_x * c_x.square() + p_y * c_y.square()) / 64  # float16 ends at 65504
        query = [-p_x, 2 * p_x * c_x, -p_y, 2 * p_y * c_y, -shared]
        device = self.centers.device
        x = torch.arange(width, dtype=torch.float32, device=device) - width // 2
        y = torch.arange(height, dtype=torch.float32, device=device) - height // 2
        x, y = x.expand(height, width).flatten(), y[:, None].expand(height, width).flatten()
        cells = [x * x, x, y * y, y, torch.full_like(x, 64)]
        return Channels(torch.stack(query, -1), torch.stack(cells, -1), long=slice(0, 3, 2))


class SingleGaussian(Gaussian):
    """-a^2 (dx^2 + dy^2): one spread for both axes."""

    initial_spreads = (1.0,)


class FixedGaussian(Gaussian):
    """-(dx^2 + dy^2): no spread is predicted."""

    initial_spreads = ()

    @property
    def precisions(self) -> Tensor:
        return torch.full_like(self.centers, self.factor)


class CovarianceGaussian(WeightMap):
    """-(a_x^2 dx^2 + a_y^2 dy^2 + a_xy^2 dx^2 dy^2), the official code's "type4".

    It has no channels, since products would grow with the fourth power of the distance."""

    initial_spreads = (1.0, 1.0, 1.0)

    def log_weights_at(self, dx: Tensor, dy: Tensor) -> Tensor:
        p_x, p_y, p_xy = (self.factor * a.square() for a in self._spreads_of_cells())
        dx2, dy2 = dx.square(), dy.square()
        return -(p_x * dx2 + p_y * dy2) - p_xy * dx2 * dy2


# Short names, for `Modulation(map=...)`.
MAPS: Dict[str, Type[WeightMap]] = {
    "fixed": FixedGaussian,
    "single": SingleGaussian,
    "independent": Gaussian,
    "covariance": CovarianceGaussian,
}


@dataclass
class Modulation:
    """The settings of a decoder's weight maps.

    Attributes:
        map: the shape: a `WeightMap` class, its dotted path ("my_package.MyMap"), or one of the
            short names in `MAPS`.
        per_head: each head has an offset from the query's center and a spread of its own. False:
            all heads look around the center with one spread.
        beta: divides squared distances; a larger one makes wider maps. Not used for boxes.
        offset_gain: gain of the offsets' initial weights. With 1 and beta = 8 (the paper) heads
            start about 1.4 cells from the center, which is 0.7 radii of their maps. None keeps that
            proportion for any beta: sqrt(beta / 8). Not used for boxes.

    Raises:
        ValueError: there is no such map, or a number is not positive.
    """

    map: Union[str, Type[WeightMap]] = Gaussian
    per_head: bool = True
    beta: float = PUBLISHED_BETA
    offset_gain: Optional[float] = None

    def __post_init__(self) -> None:
        found = self.map
        if isinstance(found, str):
            found = MAPS.get(found) or pydoc.locate(found)  # type: ignore[assignment]
        if not (isinstance(found, type) and issubclass(found, WeightMap)):
            names = ", ".join(MAPS)
            raise ValueError(f"map={self.map!r} must be a WeightMap, its path, or one of {names}.")
        self.map = found
        gain = 1.0 if self.offset_gain is None else self.offset_gain
        for name, factor in (("beta", self.beta), ("offset_gain", gain)):
            if not (isinstance(factor, (int, float)) and factor > 0):
                raise ValueError(f"{name}={factor!r} must be a positive number.")


class WeightMapPredictor(nn.Module):
    """Predicts a decoder layer's weight maps from its queries.

    A layer of parameters that the settings do not need is not built, since an unused parameter
    breaks distributed training.

    Args:
        modulation: the settings.
        embed_dim, num_heads, num_scales: d, H and L.
        in_boxes: queries have boxes, and distances are in units of these.
    """

    def __init__(
        self,
        modulation: Optional[Modulation] = None,
        *,
        embed_dim: int,
        num_heads: int,
        num_scales: int = 1,
        in_boxes: bool = False,
    ):
        super().__init__()
        self.settings = settings = modulation or Modulation()
        self.num_heads = num_heads if settings.per_head else 1
        self.num_scales = num_scales
        self.in_boxes = in_boxes
        self.shape: Type[WeightMap] = settings.map  # type: ignore[assignment]
        num_maps = num_scales * self.num_heads
        self.offset = nn.Linear(embed_dim, num_maps * 2) if settings.per_head else None
        num_spreads = len(self.shape.initial_spreads)
        self.spread = nn.Linear(embed_dim, num_maps * num_spreads) if num_spreads else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Spreads start the same for every query. Offsets start at random, so that heads differ;
        in a box, heads also start in different directions, halfway between center and sides."""
        if self.offset is not None:
            gain = self.settings.offset_gain
            if self.in_boxes:
                gain = 0.3
            elif gain is None:
                gain = (self.settings.beta / PUBLISHED_BETA) ** 0.5
            nn.init.xavier_uniform_(self.offset.weight, gain)
            if self.in_boxes:
                angles = torch.arange(self.num_heads) * (2 * math.pi / self.num_heads)
                directions = torch.stack([angles.cos(), angles.sin()], dim=-1)
                with torch.no_grad():
                    self.offset.bias.copy_((0.5 * directions).flatten().repeat(self.num_scales))
        if self.spread is not None:
            initial = torch.tensor(self.shape.initial_spreads)
            nn.init.zeros_(self.spread.weight)
            with torch.no_grad():
                self.spread.bias.copy_(initial.repeat(self.num_scales * self.num_heads))

    def forward(
        self,
        queries: Tensor,
        center: Tensor,
        scales: Sequence[Any],
        half_sizes: Optional[Tensor] = None,
    ) -> List[WeightMap]:
        """
        Args:
            queries: (B, Q, d), the layer's normalized input.
            center: (B, Q, 2), (x, y) in pixels.
            scales: the L scales, each with its `size` (h, w) in cells and `stride` in pixels.
            half_sizes: (B, Q, 2) half of the boxes' width and height in pixels; None unless
                `in_boxes`.

        Returns:
            A map for each scale.
        """
        offsets, spreads = (self._predict(x, queries) for x in (self.offset, self.spread))
        maps = []
        for index, scale in enumerate(scales):
            centers = (center / scale.stride)[:, None]
            offset = None if offsets is None else offsets[index]
            factor = scale.stride / REFERENCE_STRIDE if self.num_scales > 1 else 1.0
            factor, unit = factor / self.settings.beta, None
            if half_sizes is not None:
                half = (half_sizes / scale.stride)[:, None]
                offset = None if offset is None else offset * half
                # A map narrower than a cell would read nothing where it lies between two.
                factor, unit = 1.0, half.clamp(min=0.5)
                centers = centers - HALF_CELL
            if offset is not None:
                centers = centers + offset
            values = centers[..., :0] if spreads is None else spreads[index]
            maps.append(self.shape(centers, values, factor, scale.size, unit))
        return maps

    def _predict(self, linear: Optional[nn.Module], queries: Tensor) -> Optional[Sequence[Tensor]]:
        """(B, H', Q, n) for each scale."""
        if linear is None:
            return None
        with float32_region(queries):
            values = linear(queries).unflatten(2, (self.num_scales, self.num_heads, -1))
        return values.permute(2, 0, 3, 1, 4).unbind()
