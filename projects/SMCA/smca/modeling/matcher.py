"""Hungarian matching of predictions and objects, for all decoder layers at once."""

from typing import List, NamedTuple, Optional, Tuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torchvision.ops import box_convert

from .box_ops import iou_and_giou


class Predictions(NamedTuple):
    """
    Attributes:
        logits: (N, B, Q, C) class logits of N decoder layers.
        boxes_cxcywh: (N, B, Q, 4) in [0, 1], relative to each image's own size.
    """

    logits: Tensor
    boxes_cxcywh: Tensor


class Targets(NamedTuple):
    """One image's objects.

    Attributes:
        labels: (T,) class indices.
        boxes_cxcywh: (T, 4) relative to the image.
    """

    labels: Tensor
    boxes_cxcywh: Tensor


class Matching(NamedTuple):
    """The M pairs of a prediction and an object, on the predictions' device.

    Attributes:
        layers, images, queries: (M,) indices of the predictions.
        targets: (M,) indices into the targets of all images, joined in order.
        weights: (M,) how much each pair counts, and the truth of its class; None: all alike.
    """

    layers: Tensor
    images: Tensor
    queries: Tensor
    targets: Tensor
    weights: Optional[Tensor] = None


class HungarianMatcher(nn.Module):
    """One-to-one assignment of least total cost (DETR, section 3.1, with focal class cost).

    The cost of a query for an object is class_weight C + box_weight L1 - giou_weight GIoU with

        C = alpha (1 - p)^gamma (-log(p + 1e-8)) - (1 - alpha) p^gamma (-log(1 - p + 1e-8)),

    p the predicted probability of the object's class. Where an image has more objects than
    queries, the objects of greatest cost stay unmatched.

    Args:
        class_weight: factor of the class cost.
        box_weight: factor of the L1 distance of the boxes.
        giou_weight: factor of the generalized IoU.
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
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.alpha, self.gamma = alpha, gamma

    @torch.no_grad()
    def forward(self, logits: Tensor, boxes_cxcywh: Tensor, targets: List[Targets]) -> Matching:
        """
        Args:
            logits: (N, B, Q, C) class logits of N decoder layers.
            boxes_cxcywh: (N, B, Q, 4) relative to the image.
            targets: the objects of the B images.

        Returns:
            For every layer the pairs of each image. Predictions that are not finite are matched
            last.
        """
        # The only transfer from the device is that of all layers and images together.
        costs = self.cost(logits, boxes_cxcywh, targets).cpu()
        # SciPy refuses NaN. An error here would leave the other processes of a training waiting for
        # this one. The losses are NaN too, and all processes see that.
        cost = costs.nan_to_num(nan=torch.finfo(costs.dtype).max).numpy()
        pairs: List[Tuple[int, int, int, int]] = []
        first_target = 0
        for image, target in enumerate(targets):
            count = len(target.labels)
            for layer in range(len(cost)):
                rows, columns = linear_sum_assignment(cost[layer, image, :, :count])
                pairs += [
                    (layer, image, query, first_target + column)
                    for query, column in zip(rows, columns)
                ]
            first_target += count
        indices = torch.tensor(pairs, dtype=torch.long).reshape(-1, 4).T.contiguous()
        return Matching(*indices.to(logits.device, non_blocking=True))

    def cost(self, logits: Tensor, boxes_cxcywh: Tensor, targets: List[Targets]) -> Tensor:
        """
        Arguments as of `forward`.

        Returns:
            (N, B, Q, T), T being the largest number of objects of an image. Columns beyond an
            image's own objects have no meaning.
        """
        labels = nn.utils.rnn.pad_sequence([t.labels for t in targets], batch_first=True)
        target_boxes = nn.utils.rnn.pad_sequence(
            [t.boxes_cxcywh for t in targets], batch_first=True
        )
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
