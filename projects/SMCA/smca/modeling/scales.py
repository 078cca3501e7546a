"""The model's data between its parts: one `Scale` for each feature map, fine to coarse.

Shorthand used in every file: B images, Q queries, d channels, H heads of d_h = d / H channels,
L scales, S_l = h_l * w_l cells of scale l, S their sum. Tokens are batch first. A padding mask is
True on padding.
"""

import math
from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

Size = Tuple[int, int]  # (height, width)


class Scale(NamedTuple):
    """One scale of a batch, its cells as tokens in row-major order.

    A tuple, so that torch finds the tensors in it wherever it looks through a function's arguments
    (activation checkpointing does, for the devices whose random numbers it has to restore).

    Attributes:
        tokens: (B, S, d) features.
        position: (B, S, d) position encoding, scale embedding included.
        padding_mask: (B, S) bool, True on padding; None, on all scales, where no image of the
            batch is padded, which lets attention use the faster kernels.
        size: (h, w) in cells.
        stride: pixels a cell.
    """

    tokens: Tensor
    position: Tensor
    padding_mask: Optional[Tensor]
    size: Size
    stride: int

    def as_map(self, tokens: Tensor) -> Tensor:
        """(B, S, d) tokens as a (B, d, h, w) map: a view, channels last in memory."""
        return tokens.transpose(1, 2).unflatten(2, self.size)


def as_tokens(feature_map: Tensor) -> Tensor:
    """(B, d, h, w) map as (B, S, d) tokens."""
    return feature_map.flatten(2).transpose(1, 2)


def join_padding_masks(scales: Sequence[Scale]) -> Optional[Tensor]:
    """The padding masks of all scales as one (B, S), or None if nothing is padded."""
    masks = [scale.padding_mask for scale in scales if scale.padding_mask is not None]
    return torch.cat(masks, dim=1) if masks else None


def padding_masks(
    image_sizes: Sequence[Size], padded_size: Size, sizes: Sequence[Size], device: torch.device
) -> List[Optional[Tensor]]:
    """Each scale's padding mask: the pixel mask resized with nearest neighbour.

    Cell i of h is padding if pixel floor(i * H / h) is, so a partly padded cell counts as valid.

    Args:
        image_sizes: (height, width) of each image in pixels, before the batch was padded.
        padded_size: (H, W) of the batch in pixels.
        sizes: (h, w) of each scale in cells.
        device: of the result.

    Returns:
        (B, h, w) bool for each scale, True on padding; None for all if no cell of any is padding.
    """
    H, W = padded_size
    # floor(i H / h) < n is i < n h / H: the valid cells are the first ceil(n h / H) of each axis.
    valid = [
        [(math.ceil(n * h / H), math.ceil(m * w / W)) for n, m in image_sizes] for h, w in sizes
    ]
    if all(set(cells) == {tuple(size)} for cells, size in zip(valid, sizes)):
        return [None] * len(sizes)
    masks = []
    for (rows, columns), cells in zip(sizes, torch.tensor(valid).to(device, non_blocking=True)):
        row_is_padding = torch.arange(rows, device=device) >= cells[:, :1]
        column_is_padding = torch.arange(columns, device=device) >= cells[:, 1:]
        masks.append(row_is_padding[:, :, None] | column_is_padding[:, None, :])
    return masks
