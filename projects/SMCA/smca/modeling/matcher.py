"""Hungarian matching of predictions and objects, for all decoder layers at once."""

from typing import List, NamedTuple, Optional, Tuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

from .box_ops import iou_and_giou


class Predictions(NamedTuple):
    """Those of N decoder layers."""

    logits: Tensor  # (N, B, Q, C) of the classes
    boxes_cxcywh: Tensor  # (N, B, Q, 4) in [0, 1], relative to each image's own size


class Targets(NamedTuple):
    """One image's objects."""

    labels: Tensor  # (T,) class indices
    boxes_cxcywh: Tensor  # (T, 4) relative to the image


def pad_targets(targets: List[Targets]) -> Tuple[Tensor, Tensor]:
    """(B, T) labels and (B, T, 4) boxes, T being the largest number of objects of an image; zeros
    where an image has fewer."""
    labels, boxes = map(list, zip(*targets))
    pad_sequence = nn.utils.rnn.pad_sequence
    return pad_sequence(labels, batch_first=True), pad_sequence(boxes, batch_first=True)


class Matching(NamedTuple):
    """The M pairs of a prediction and an object, on the predictions' device."""

    layers: Tensor  # (M,) this and the next two: indices of the predictions
    images: Tensor
    queries: Tensor
    targets: Tensor  # (M,) indices into the targets of all images, joined in order
    # (M,) how much each pair counts, and the truth of its class; None: all alike
    weights: Optional[Tensor] = None


class HungarianMatcher(nn.Module):
    """One-to-one assignment of least total cost (DETR, section 3.1, with focal class cost).

    The cost of a query for an object is class_weight C + box_weight L1 - giou_weight GIoU with

        C = alpha (1 - p)^gamma (-log(p + 1e-8)) - (1 - alpha) p^gamma (-log(1 - p + 1e-8)),

    p the predicted probability of the object's class. Where an image has more objects than
    queries, the objects of greatest cost stay unmatched.

    Args:
        class_weight, box_weight, giou_weight: factors of the class cost, of the L1 distance of the
            boxes, and of the generalized IoU.
        alpha, gamma: as in `FocalLoss`, whose change by a match is the class cost.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ):
        super().__init__()
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes_cxcywh: Tensor, targets: List[Targets]) -> Matching:
        """For every layer of `Predictions` the pairs of each image. Predictions that are not finite
        are matched last."""
        # The only transfer from the device is that of all layers and images together.
        costs = self.cost(logits, boxes_cxcywh, targets).cpu()
        # SciPy refuses NaN. An error here would leave the other processes of a training waiting for
        # this one. The losses are NaN too, and all processes see that.
        cost = costs.nan_to_num(nan=torch.finfo(costs.dtype).max).numpy()
        pairs: List[Tuple[int, int, int, int]] = []
        first = 0
        for image, target in enumerate(targets):
            count = len(target.labels)
            for layer in range(len(cost)):
                rows, columns = linear_sum_assignment(cost[layer, image, :, :count])
                pairs += [(layer, image, row, first + column) for row, column in zip(rows, columns)]
            first += count
        indices = torch.tensor(pairs, dtype=torch.long).reshape(-1, 4).T.contiguous()
        return Matching(*indices.to(logits.device, non_blocking=True))

    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: List[Targets]) -> Tensor:
        """(N, B, Q, T). Columns beyond an image's own objects have no meaning."""
        labels, target_boxes = pad_targets(targets)
        num_layers, _, num_queries = logits.shape[:3]
        labels = labels[None, :, None].expand(num_layers, -1, num_queries, -1)
        p = logits.float().sigmoid().gather(3, labels)
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()

        boxes = boxes_cxcywh.float()
        distance = torch.cdist(boxes, target_boxes.expand(num_layers, -1, -1, -1), p=1)
        _, giou = iou_and_giou(
            box_convert(boxes, "cxcywh", "xyxy")[:, :, :, None],
            box_convert(target_boxes, "cxcywh", "xyxy")[:, None],
        )
        return (
            self.class_weight * (positive - negative)
            + self.box_weight * distance
            - self.giou_weight * giou
        )
