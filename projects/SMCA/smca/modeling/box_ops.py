"""Box arithmetic that torchvision and fvcore lack: a GIoU that broadcasts.

Conversions come from torchvision (``box_convert``). Its GIoU is either pairwise or a loss that
indexes with a Boolean mask, which makes a GPU wait for the host; this one serves the matcher
(every query with every target) and the loss (matched pairs) alike.
"""

import torch
from torch import Tensor


def generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU (Rezatofighi et al., CVPR 2019) of boxes that broadcast.

    Args:
        boxes1_xyxy, boxes2_xyxy: (..., 4) corners (x0, y0, x1, y1) in any one unit, x1 >= x0 and
            y1 >= y0. The leading dimensions broadcast: (N, 1, 4) with (M, 4) gives all pairs.

    Returns:
        (...) in [-1, 1]; 0 / 0 (two empty boxes at one point) counts as 0.
    """
    x0, y0, x1, y1 = boxes1_xyxy.unbind(-1)
    u0, v0, u1, v1 = boxes2_xyxy.unbind(-1)
    width = (torch.min(x1, u1) - torch.max(x0, u0)).clamp(min=0)
    height = (torch.min(y1, v1) - torch.max(y0, v0)).clamp(min=0)
    intersection = width * height
    union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - intersection
    hull = (torch.max(x1, u1) - torch.min(x0, u0)) * (torch.max(y1, v1) - torch.min(y0, v0))
    # Only an empty union or hull is touched: float32's smallest normal number is added to nothing
    # larger without being rounded away.
    tiny = torch.finfo(union.dtype).tiny
    return intersection / (union + tiny) - (hull - union) / (hull + tiny)
