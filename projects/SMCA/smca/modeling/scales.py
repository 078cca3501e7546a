"""The model's data between its parts: one `Scale` for each feature map, fine to coarse.

Shorthand used in every file: B images, Q queries, d channels, H heads of d_h = d / H channels,
L scales, S_l = h_l * w_l cells of scale l, S their sum. Tokens are batch first. A padding mask is
True on padding.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from torch import Tensor

Size = Tuple[int, int]  # (height, width)


def count_scales(in_features: Sequence[str], num_extra_scales: int) -> int:
    """The number of a model's scales, for configs."""
    return len(in_features) + num_extra_scales


class Scale(NamedTuple):
    """One scale of a batch, its cells as tokens in row-major order.

    A tuple, so that activation checkpointing finds the tensors, whose devices' random numbers it
    has to restore.
    """

    tokens: Tensor  # (B, S, d) features
    position: Tensor  # (B, S, d) position encoding, scale embedding included
    # (B, S) bool, True on padding; None, on all scales, where no image of the batch is padded,
    # which lets attention use the faster kernels
    padding_mask: Optional[Tensor]
    size: Size  # (h, w) in cells
    stride: int  # pixels a cell

    def with_tokens(self, tokens: Tensor) -> "Scale":
        """The same scale with other features."""
        # Not _replace, which torch.compile and torch.export of PyTorch 2.6 do not see through.
        return Scale(tokens, self.position, self.padding_mask, self.size, self.stride)

    def as_map(self, tokens: Tensor) -> Tensor:
        """(B, S, d) tokens as a (B, d, h, w) map: a view, channels last in memory."""
        return tokens.transpose(1, 2).unflatten(2, self.size)


def as_tokens(feature_map: Tensor) -> Tensor:
    """(B, d, h, w) map as (B, S, d) tokens."""
    return feature_map.flatten(2).transpose(1, 2)


def padding_masks(
    image_sizes: Union[Sequence[Size], Tensor],
    padded_size: Size,
    sizes: Sequence[Size],
    device: torch.device,
) -> List[Optional[Tensor]]:
    """Each scale's padding mask: the pixel mask resized with nearest neighbor.

    Args:
        image_sizes: (height, width) of each image in pixels, before the batch was padded.
        padded_size: (H, W) of the batch in pixels.
        sizes: (h, w) of each scale in cells.
        device: of the result.

    Returns:
        (B, h, w) bool for each scale. None for all if no cell of any is padding, but not for a
        tensor of sizes, so that a graph holds for all values.
    """
    if not isinstance(image_sizes, Tensor):
        last_cells = [(n, m, h, w) for n, m in image_sizes for h, w in sizes]
        H, W = padded_size
        if all((h - 1) * H < n * h and (w - 1) * W < m * w for n, m, h, w in last_cells):
            return [None] * len(sizes)
        image_sizes = torch.tensor(image_sizes).to(device, non_blocking=True)
    return [padding_mask(image_sizes, padded_size, size) for size in sizes]


def padding_mask(image_sizes: Tensor, padded_size: Size, size: Size) -> Tensor:
    """One scale's padding mask, see `padding_masks`. Cell i of h is padding if pixel floor(i H / h)
    is, so a partly padded cell counts as valid."""
    row_is_padding, column_is_padding = (
        # floor(i H / h) < n, for a whole number n, is i H < n h.
        torch.arange(cells, device=image_sizes.device) * pixels
        >= image_sizes[:, axis, None] * cells
        for axis, (pixels, cells) in enumerate(zip(padded_size, size))
    )
    return row_is_padding[:, :, None] | column_is_padding[:, None, :]
