"""IoU and generalized IoU of boxes that broadcast: of all pairs for the matcher, of matched pairs
for the losses. The rest of box arithmetic is torchvision's.

torchvision's GIoU loss picks elements with a Boolean mask, for which the host has to wait for a
GPU, and its pairwise GIoU takes no batches in version 0.21.
"""

from typing import Tuple

import torch
from torch import Tensor


def iou_and_giou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU and generalized IoU (Rezatofighi et al., CVPR 2019).

    Args:
        boxes1_xyxy, boxes2_xyxy: (..., 4) corners (x0, y0, x1, y1) in any one unit, x1 >= x0 and
            y1 >= y0. The leading dimensions broadcast: (N, 1, 4) with (M, 4) gives all pairs.

    Returns:
        (...) in [0, 1] and (...) in [-1, 1]. A ratio of two areas of 0 (both boxes are empty)
        counts as 0.
    """
    x0, y0, x1, y1 = boxes1_xyxy.unbind(-1)
    u0, v0, u1, v1 = boxes2_xyxy.unbind(-1)
    width = (torch.min(x1, u1) - torch.max(x0, u0)).clamp(min=0)
    height = (torch.min(y1, v1) - torch.max(y0, v0)).clamp(min=0)
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    hull = (torch.max(x1, u1) - torch.min(x0, u0)) * (torch.max(y1, v1) - torch.min(y0, v0))
    # The smallest float that is not 0 keeps 0 / 0 from being NaN. Next to the area of a real box it
    # is lost in rounding.
    eps = torch.finfo(union.dtype).tiny
    iou = intersection / (union + eps)
    return iou, iou - (hull - union) / (hull + eps)
