"""From backbone features to the model's scales: projection to d channels, and coarser scales."""

from typing import Dict, List, Mapping, Sequence

from detectron2.layers import ShapeSpec
from torch import Tensor, nn


class ScaleProjection(nn.Module):
    """1x1 convolutions on the backbone's features; 3x3 stride-2 convolutions make coarser scales.

    Args:
        input_shape: of the backbone's features, ``backbone.output_shape()``.
        in_features: their names, from fine to coarse.
        num_extra_scales: how many coarser scales to add: the first from the last feature, each
            further one from the one before.
        embed_dim: d.
    """

    def __init__(
        self,
        input_shape: Mapping[str, ShapeSpec],
        in_features: Sequence[str],
        num_extra_scales: int,
        embed_dim: int,
    ):
        super().__init__()
        missing = [name for name in in_features if name not in input_shape]
        if missing:
            raise ValueError(
                f"in_features names {missing}, but the backbone gives {list(input_shape)}: add "
                "them to the backbone's out_features."
            )
        if not in_features:
            raise ValueError("in_features is empty: name the backbone's features to use.")
        if num_extra_scales < 0:
            raise ValueError(f"num_extra_scales={num_extra_scales} must not be negative.")
        self.in_features = list(in_features)
        shapes = [input_shape[name] for name in in_features]
        self.strides = [shape.stride for shape in shapes]
        self.projections = nn.ModuleDict(
            {name: nn.Conv2d(s.channels, embed_dim, 1) for name, s in zip(in_features, shapes)}
        )
        self.extra = nn.ModuleList()
        for index in range(num_extra_scales):
            channels = embed_dim if index else shapes[-1].channels
            self.extra.append(nn.Conv2d(channels, embed_dim, 3, stride=2, padding=1))
            self.strides.append(2 * self.strides[-1])

    def forward(self, features: Dict[str, Tensor]) -> List[Tensor]:
        """The backbone's output, (B, c, h, w) by name, to (B, d, h, w) maps from fine to coarse, of
        ``self.strides`` pixels a cell."""
        inputs = [features[name] for name in self.in_features]
        maps = [self.projections[name](x) for name, x in zip(self.in_features, inputs)]
        coarsest = inputs[-1]
        for convolution in self.extra:
            coarsest = convolution(coarsest)
            maps.append(coarsest)
        return maps
