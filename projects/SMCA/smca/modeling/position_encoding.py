"""DETR's sine position encoding, counted over each image's own cells."""

import math

import torch
from torch import Tensor, nn


class SinePositionEncoding(nn.Module):
    """Fixed sine encoding of a cell's row and column (DETR, section A.4).

    The valid cells are counted 1, 2, ... down and across, divided by the last count and scaled to
    (0, 2 pi], so that an image's encoding does not depend on how the batch was padded.

    Args:
        num_features: features for y, and as many for x; half the model's width.
        temperature: base of the geometric series of wave lengths.
    """

    def __init__(self, num_features: int = 128, temperature: float = 10000.0):
        super().__init__()
        self.num_features = num_features
        self.temperature = temperature

    def forward(self, padding_mask: Tensor) -> Tensor:
        """
        Args:
            padding_mask: (B, h, w) bool, True on padding.

        Returns:
            (B, 2 * num_features, h, w) float32: the features of y, then those of x.
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
        phase = angle[:, None] / wave_length[:, None, None]
        return torch.stack([phase[:, 0::2].sin(), phase[:, 1::2].cos()], dim=2).flatten(1, 2)
