"""The model's data between its parts: one `Scale` for each feature map, fine to coarse.

Shorthand used in every file: B images, Q queries, d channels, H heads of d_h = d / H channels,
L scales, S_l = h_l * w_l cells of scale l, S their sum. Tokens are batch first. A padding mask is
True on padding.
"""

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor


@dataclass
class Scale:
    """One scale of a batch, its cells as tokens in row-major order.

    Attributes:
        tokens: (B, S, d) features.
        position: (B, S, d) position encoding, scale embedding included.
        padding_mask: (B, S) bool, True on padding; None where no image of the batch is padded,
            which lets attention use the faster kernels.
        size: (h, w) in cells.
        stride: pixels a cell.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Optional[Tensor]
    size: Tuple[int, int]
    stride: int

    def as_map(self, tokens: Tensor) -> Tensor:
        """(B, S, d) tokens as a (B, d, h, w) map: a view, channels last in memory."""
        return tokens.transpose(1, 2).unflatten(2, self.size)


def as_tokens(feature_map: Tensor) -> Tensor:
    """(B, d, h, w) map as (B, S, d) tokens."""
    return feature_map.flatten(2).transpose(1, 2)


def join_padding_masks(scales: Sequence[Scale]) -> Optional[Tensor]:
    """The padding masks of all scales as one (B, S), or None if nothing is padded."""
    if all(scale.padding_mask is None for scale in scales):
        return None
    masks = []
    for scale in scales:
        mask = scale.padding_mask
        if mask is None:
            mask = torch.zeros(scale.tokens.shape[:2], dtype=torch.bool, device=scale.tokens.device)
        masks.append(mask)
    return torch.cat(masks, dim=1)


def padding_mask(
    image_sizes: List[Tuple[int, int]],
    padded_size: Tuple[int, int],
    size: Tuple[int, int],
    device: torch.device,
) -> Optional[Tensor]:
    """A scale's padding mask: the pixel mask resized with nearest neighbour.

    Cell i of h is padding if pixel floor(i * H / h) is, so a partly padded cell counts as valid.

    Args:
        image_sizes: (height, width) of each image in pixels, before the batch was padded.
        padded_size: (H, W) of the batch in pixels.
        size: (h, w) of the scale in cells.

    Returns:
        (B, h, w) bool, True on padding; None if no cell is padding.
    """
    (pixel_rows, pixel_columns), (rows, columns) = padded_size, size
    # floor(i H / h) < n is i < n h / H: the valid cells are the first ceil(n h / H) of each axis.
    valid = [
        (math.ceil(height * rows / pixel_rows), math.ceil(width * columns / pixel_columns))
        for height, width in image_sizes
    ]
    if all(v == size for v in valid):
        return None
    valid_rows, valid_columns = torch.tensor(valid, device=device).unbind(1)
    row_is_padding = torch.arange(rows, device=device) >= valid_rows[:, None]
    column_is_padding = torch.arange(columns, device=device) >= valid_columns[:, None]
    return row_is_padding[:, :, None] | column_is_padding[:, None, :]
