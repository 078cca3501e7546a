"""The training objective: class, L1 and GIoU loss of matched predictions and objects."""

from typing import Dict, List, Optional, Tuple

import detectron2.utils.comm as comm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from .box_ops import iou_and_giou
from .class_loss import FocalLoss
from .matcher import HungarianMatcher, Matching, Predictions, Targets

# A matched query's class has at least this truth, where the truth is the IoU.
_LEAST_TRUTH = 0.01


class SetCriterion(nn.Module):
    """Losses of matched pairs, each summed and divided by the number of objects.

    That number is averaged over the processes and at least 1, so that the gradient that data
    parallelism averages is the gradient of the whole batch. If any prediction of a layer is not
    finite, matched or not, the losses of that layer are not finite either.

    Args:
        class_weight, box_weight, giou_weight: factors of the class, L1 and GIoU losses, and of the
            costs in matching.
        alpha, gamma: as in `FocalLoss`, for the loss and the cost.
        class_loss: a loss from `class_loss.py` or one of your own; None: `FocalLoss`.
        matcher: replaces the Hungarian matcher with these same weights.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        class_loss: Optional[nn.Module] = None,
        matcher: Optional[nn.Module] = None,
    ):
        super().__init__()
        weights = dict(class_weight=class_weight, box_weight=box_weight, giou_weight=giou_weight)
        self.matcher = matcher or HungarianMatcher(**weights, alpha=alpha, gamma=gamma)
        self.class_loss = class_loss or FocalLoss(alpha, gamma)
        self.class_weight, self.box_weight, self.giou_weight = class_weight, box_weight, giou_weight

    def forward(
        self, predictions: Predictions, targets: List[Targets], matching: Optional[Matching] = None
    ) -> Dict[str, Tensor]:
        """Weighted scalar losses, whose sum is the objective: ``loss_ce``, ``loss_bbox`` and
        ``loss_giou`` of the last layer, ``loss_ce_0`` and so on of the layers before it. The
        matching says which prediction belongs to which object; None: what the matcher finds."""
        losses = self.by_layer(predictions, targets, matching)
        last = len(predictions.logits) - 1
        return {
            name if layer == last else f"{name}_{layer}": loss
            for layer, of_layer in enumerate(zip(*(x.unbind() for x in losses.values())))
            for name, loss in zip(losses, of_layer)
        }

    def by_layer(
        self,
        predictions: Predictions,
        targets: List[Targets],
        matching: Optional[Matching] = None,
        groups: int = 1,
    ) -> Dict[str, Tensor]:
        """The losses as (N,) tensors ``loss_ce``, ``loss_bbox`` and ``loss_giou``. The matching has
        each object in as many `groups` in a layer."""
        logits, boxes = (x.float() for x in predictions)
        if matching is None:
            matching = self.matcher(logits, boxes, targets)
        count = self._count(targets, matching, logits.device) * groups
        l1, giou, iou = self._compare_boxes(boxes, matching, targets)
        truth = self._truth(logits, matching, targets, iou.detach())
        # 0, or NaN in a layer that has a box that is not finite, whether it is matched or not.
        zeros = 0 * boxes.sum(dim=(1, 2, 3))
        sums = {
            "loss_ce": self.class_weight * self.class_loss(logits, truth).sum(dim=(1, 2, 3)),
            "loss_bbox": self.box_weight * zeros.index_add(0, matching.layers, l1),
            "loss_giou": self.giou_weight * zeros.index_add(0, matching.layers, 1 - giou),
        }
        return {name: loss / count for name, loss in sums.items()}

    @staticmethod
    def _count(targets: List[Targets], matching: Matching, device: torch.device) -> Tensor:
        """The number of objects, or the sum of the pairs' weights: the processes' mean."""
        if matching.weights is None:
            # A tensor made on the GPU itself would make the host wait for the GPU.
            count = torch.tensor(float(sum(len(t.labels) for t in targets)))
            count = count.to(device, non_blocking=True)
        else:
            count = matching.weights.sum()
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
        return (count / comm.get_world_size()).clamp(min=1)

    @staticmethod
    def _compare_boxes(
        boxes: Tensor, matching: Matching, targets: List[Targets]
    ) -> Tuple[Tensor, Tensor, Tensor]:
        """(M,) L1 distance, generalized IoU and IoU of each pair. Weights of pairs are factors of
        the distance and of 1 - GIoU."""
        truth = torch.cat([t.boxes_cxcywh for t in targets])[matching.targets]
        matched = boxes[matching.layers, matching.images, matching.queries]
        l1 = F.l1_loss(matched, truth, reduction="none").sum(dim=-1)
        iou, giou = iou_and_giou(
            box_convert(matched, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        if matching.weights is not None:
            l1, giou = l1 * matching.weights, 1 - (1 - giou) * matching.weights
        return l1, giou, iou

    def _truth(
        self, logits: Tensor, matching: Matching, targets: List[Targets], iou: Tensor
    ) -> Tensor:
        """(N, B, Q, C): 0, and at a matched query's class 1, its IoU or the pair's weight."""
        labels = torch.cat([t.labels for t in targets])[matching.targets]
        where = (matching.layers, matching.images, matching.queries, labels)
        truth = torch.zeros_like(logits)
        if matching.weights is not None:
            # Of all pairs of a prediction and a class at most one has a weight.
            truth.index_put_(where, matching.weights, accumulate=True)
            truth.clamp_(max=1)
            return truth if self.class_loss.uses_iou else (truth > 0).to(truth)
        truth[where] = iou.clamp(min=_LEAST_TRUTH) if self.class_loss.uses_iou else 1.0
        return truth
