"""A class and a box for every cell of the encoder, as in a dense detector."""

import math
from typing import List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from .layers import class_head, mlp
from .scales import Scale
from .weight_map import float32_region

# A cell's box starts with sides of so many cells.
_CELLS_OF_A_SIDE = 4.0
# The logarithm of how much a box may grow at once, as in Detectron2.
_LARGEST_GROWTH = math.log(1000 / 16)
# Class logit of cells that do not count: a probability of 2e-9, whose loss and gradient are 0.
IMPOSSIBLE = -20.0


class Cells(NamedTuple):
    """The cells of all scales, before their boxes are predicted."""

    hidden: Tensor  # (B, S, d) normalized features
    logits: Tensor  # (B, S, C) class logits, `IMPOSSIBLE` where a cell is not valid
    boxes: Tensor  # (B, S, 4) initial boxes cxcywh, relative to each image's own size
    valid: Tensor  # (B, S) bool, True for cells whose center is inside the image


class CellHead(nn.Module):
    """A linear layer and a LayerNorm, then a linear class head and an MLP for the change of the
    cell's initial box.

    Args:
        embed_dim, num_classes: d and C.
        project: with the first linear layer and the LayerNorm; without them it costs less.
        linear_boxes: the box head is linear, too, for heads that predict the boxes of all cells.
    """

    def __init__(
        self, embed_dim: int, num_classes: int, project: bool = True, linear_boxes: bool = False
    ):
        super().__init__()
        self.projection = nn.Linear(embed_dim, embed_dim) if project else nn.Identity()
        self.norm = nn.LayerNorm(embed_dim) if project else nn.Identity()
        self.class_embed = class_head(embed_dim, num_classes)
        self.box_embed = nn.Linear(embed_dim, 4) if linear_boxes else mlp(embed_dim, 4)
        start_without_change(self.box_embed)

    def forward(self, scales: List[Scale], image_sizes: Tensor) -> Cells:
        """The cells of the encoded scales. `image_sizes` (B, 2) is each image's own (width, height)
        in pixels."""
        tokens = torch.cat([scale.tokens for scale in scales], dim=1)
        cells = zip(*(cell_boxes(scale, image_sizes) for scale in scales))
        boxes, valid = (torch.cat(parts, dim=1) for parts in cells)
        hidden = self.norm(self.projection(tokens))
        with float32_region(hidden):
            logits = self.class_embed(hidden.float()).masked_fill(~valid[..., None], IMPOSSIBLE)
        return Cells(hidden, logits, boxes, valid)

    def predict_boxes(self, hidden: Tensor, initial: Tensor) -> Tensor:
        """(B, K, d) features and (B, K, 4) initial boxes of some cells to predicted boxes."""
        with float32_region(hidden):
            return change_boxes(initial, self.box_embed(hidden.float()))


def cell_boxes(scale: Scale, image_sizes: Tensor) -> Tuple[Tensor, Tensor]:
    """`boxes` and `valid` of the `Cells` of a scale. `image_sizes` as in `CellHead`."""
    height, width = scale.size
    x, y = (torch.arange(n, device=image_sizes.device) + 0.5 for n in (width, height))
    x, y = x.expand(height, width).flatten(), y[:, None].expand(height, width).flatten()
    cell = (scale.stride / image_sizes)[:, None]  # (B, 1, 2)
    centers = torch.stack([x, y], dim=-1) * cell
    sides = (_CELLS_OF_A_SIDE * cell).expand_as(centers)
    return torch.cat([centers, sides], dim=-1), (centers < 1).all(dim=-1)


def change_boxes(boxes: Tensor, change: Tensor) -> Tensor:
    """Boxes changed in units of their own sides (Faster R-CNN, section 3.1.2).

    Args:
        boxes: (..., 4) cxcywh.
        change: (..., 4) how many sides the center moves, and the logarithm of the sides' growth.
    """
    center, sides = boxes.split(2, dim=-1)
    distance, growth = change.split(2, dim=-1)
    grown = sides * growth.clamp(max=_LARGEST_GROWTH).exp()
    return torch.cat([center + distance * sides, grown], dim=-1)


def start_without_change(box_embed: nn.Module) -> None:
    """Let a box head start with a change of 0: boxes are then those that it starts from."""
    last = [module for module in box_embed.modules() if isinstance(module, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
