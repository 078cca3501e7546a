"""Class losses: modules of (..., C) logits and truth that give the loss of each element. `uses_iou`
says what the truth of a matched query's class is: 1, or the IoU of its box."""

import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn


class FocalLoss(nn.Module):
    """Sigmoid focal loss (Lin et al., ICCV 2017).

    Args:
        alpha: weight of positives; negatives have 1 - alpha.
        gamma: exponent that lowers the loss of what is classified well.
    """

    uses_iou = False

    def __init__(self, alpha: float = 0.25, gamma: float = 2.0):
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Truth is 0 or 1."""
        return sigmoid_focal_loss(logits, truth, alpha=self.alpha, gamma=self.gamma)


class VarifocalLoss(nn.Module):
    """Varifocal loss (Zhang et al., CVPR 2021): a score is to be the IoU of its box. Positives
    weigh as much as that, negatives alpha p^gamma."""

    uses_iou = True

    def __init__(self, alpha: float = 0.75, gamma: float = 2.0):
        super().__init__()
        self.alpha, self.gamma = alpha, gamma

    def forward(self, logits: Tensor, truth: Tensor) -> Tensor:
        """Truth is 0 or an IoU."""
        negative = self.alpha * logits.detach().sigmoid() ** self.gamma * (truth == 0)
        return F.binary_cross_entropy_with_logits(
            logits, truth, weight=negative + truth, reduction="none"
        )
