"""DETR's sine position encoding, counted over each image's own cells."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Fixed sine encoding of a cell's row and column (DETR, section A.4).

    The valid cells are counted 1, 2, ... down and across, divided by the last count and scaled to
    (0, 2 pi], so that an image's encoding does not depend on how the batch was padded.

    Args:
        embed_dim: d, a multiple of 4: half for y, half for x, each half sines and cosines.
        temperature: base of the geometric series of wave lengths.
    """

    def __init__(self, embed_dim: int, temperature: float = 10000.0):
        super().__init__()
        if embed_dim % 4:
            raise ValueError(f"embed_dim={embed_dim} must be a multiple of 4.")
        self.num_features = embed_dim // 2
        self.temperature = temperature

    def forward(self, padding_mask: Tensor) -> Tensor:
        """
        Args:
            padding_mask: (B, h, w) bool, True on padding.

        Returns:
            (B, d, h, w) float32: the features of y, then those of x.
        """
        valid = (~padding_mask).float()
        rows, columns = valid.cumsum(1), valid.cumsum(2)
        rows = rows / (rows[:, -1:, :] + 1e-6) * (2 * math.pi)
        columns = columns / (columns[:, :, -1:] + 1e-6) * (2 * math.pi)

        feature = torch.arange(self.num_features, dtype=torch.float32, device=valid.device)
        wave_length = self.temperature ** (2 * (feature // 2) / self.num_features)
        return torch.cat([self._waves(rows, wave_length), self._waves(columns, wave_length)], 1)

    @staticmethod
    def _waves(angle: Tensor, wave_length: Tensor) -> Tensor:
        """(B, h, w) and (F,) -> (B, F, h, w), sine and cosine by turns."""
        phase = angle[:, None] / wave_length[:, None, None]
        return torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1, 2)


def encode_boxes(boxes: Tensor, embed_dim: int, temperature: float = 20.0) -> Tensor:
    """Sine encoding of boxes (DAB-DETR, section 4.2).

    Args:
        boxes: (..., 4) cxcywh in [0, 1].
        embed_dim: d, a multiple of 4.
        temperature: base of the geometric series of wave lengths; lower than that of cells, since
            half a box is a large distance.

    Returns:
        (..., 2 d): d / 2 sines and cosines of each of the four numbers.
    """
    num_features = embed_dim // 2
    feature = torch.arange(num_features, dtype=torch.float32, device=boxes.device)
    wave_length = temperature ** (2 * (feature // 2) / num_features)
    phase = boxes[..., None] * (2 * math.pi) / wave_length
    waves = torch.stack([phase[..., 0::2].sin(), phase[..., 1::2].cos()], dim=-1)
    return waves.flatten(-3)
