"""DETR's sine position encoding, counted over each image's own cells, and that of boxes."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Fixed sine encoding of a cell's row and column (DETR, section A.4).

    The valid cells are counted 1, 2, ... down and across, divided by the last count and scaled to
    (0, 2 pi], so that an image's encoding does not depend on how the batch was padded. Of the d
    channels, a multiple of 4, half are of y and half of x, each half of them sines, half cosines.
    """

    def __init__(self, embed_dim: int):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of 4.")
        self.num_features = embed_dim // 2

    def forward(self, padding_mask: Tensor) -> Tensor:
        """(B, h, w) bool, True on padding, to (B, d, h, w) float32: the features of y, then those
        of x."""
        valid = (~padding_mask).float()
        rows, columns = valid.cumsum(1), valid.cumsum(2)
        rows = rows / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
        columns = columns / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)
        waves = [_waves(angle, self.num_features, 10000.0) for angle in (rows, columns)]
        return torch.cat(waves, dim=-1).permute(0, 3, 1, 2)


def encode_boxes(boxes: Tensor, embed_dim: int) -> Tensor:
    """Sine encoding of boxes (DAB-DETR, section 4.2), (..., 4) cxcywh in [0, 1] to (..., 2 d):
    d / 2 sines and cosines of each of the four numbers."""
    # The base is lower than that of cells, since half a box is a large distance.
    return _waves(boxes * (2 * math.pi), embed_dim // 2, 20.0).flatten(-2)


def _waves(angle: Tensor, num_features: int, temperature: float) -> Tensor:
    """(...) angles to (..., F), sine and cosine by turns. Wave lengths are a geometric series whose
    base is the temperature."""
    feature = torch.arange(0, num_features, 2, dtype=torch.float32, device=angle.device)
    phase = angle[..., None] / temperature ** (feature / num_features)
    return torch.stack([phase.sin(), phase.cos()], dim=-1).flatten(-2)
