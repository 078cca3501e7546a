"""Generalized IoU of boxes that broadcast; the rest of box arithmetic is torchvision's.

torchvision's GIoU loss picks elements with a Boolean mask, for which the host has to wait for a
GPU, and its pairwise GIoU takes no batches in version 0.21. This one serves the matcher (every
query with every object) and the loss (matched pairs) alike.
"""

import torch
from torch import Tensor


def generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalized IoU (Rezatofighi et al., CVPR 2019).

    Args:
        boxes1_xyxy: (..., 4) corners (x0, y0, x1, y1) in any one unit, x1 >= x0 and y1 >= y0.
        boxes2_xyxy: (..., 4) likewise. The leading dimensions broadcast: (N, 1, 4) with (M, 4)
            gives all pairs.

    Returns:
        (...) in [-1, 1]; a ratio of two areas of 0 (both boxes empty) counts as 0.
    """
    x0, y0, x1, y1 = boxes1_xyxy.unbind(-1)
    u0, v0, u1, v1 = boxes2_xyxy.unbind(-1)
    width = (torch.min(x1, u1) - torch.max(x0, u0)).clamp(min=0)
    height = (torch.min(y1, v1) - torch.max(y0, v0)).clamp(min=0)
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    hull = (torch.max(x1, u1) - torch.min(x0, u0)) * (torch.max(y1, v1) - torch.min(y0, v0))
    # The smallest float that is not 0: it keeps 0 / 0 from being NaN and, next to any area of a
    # real box, is lost in rounding.
    eps = torch.finfo(union.dtype).tiny
    return intersection / (union + eps) - (hull - union) / (hull + eps)
