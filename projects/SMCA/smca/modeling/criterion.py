"""The training objective: focal, L1 and GIoU loss of every decoder layer."""

from typing import Dict, List, Optional

import detectron2.utils.comm as comm
import torch
import torch.nn.functional as F
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.ops import box_convert

from .box_ops import generalized_iou
from .matcher import HungarianMatcher, Matching, Targets


class SetCriterion(nn.Module):
    """Losses on matched pairs, each summed and divided by the number of objects.

    That number is averaged over the processes and at least 1, so that the gradient averaged by
    data parallelism is the one of the whole batch. Predictions that are not finite, matched or not,
    make the losses of their layer so too.

    Args:
        class_weight: of the focal loss and of the class cost of matching.
        box_weight: of the L1 loss and the L1 cost.
        giou_weight: of the GIoU loss and the GIoU cost.
        alpha: of the sigmoid focal loss.
        gamma: of the sigmoid focal loss.
        matcher: in place of the Hungarian matcher with these same weights.
    """

    def __init__(
        self,
        *,
        class_weight: float = 2.0,
        box_weight: float = 5.0,
        giou_weight: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
        matcher: Optional[nn.Module] = None,
    ):
        super().__init__()
        if matcher is None:
            matcher = HungarianMatcher(
                class_weight=class_weight,
                box_weight=box_weight,
                giou_weight=giou_weight,
                alpha=alpha,
                gamma=gamma,
            )
        if not isinstance(matcher, nn.Module):
            raise ValueError(
                "matcher must be a module: the weights of matching are those of the losses, "
                "class_weight, box_weight, giou_weight, alpha and gamma."
            )
        self.matcher = matcher
        self.class_weight = class_weight
        self.box_weight = box_weight
        self.giou_weight = giou_weight
        self.alpha = alpha
        self.gamma = gamma

    def forward(
        self, logits: Tensor, boxes_cxcywh: Tensor, targets: List[Targets]
    ) -> Dict[str, Tensor]:
        """
        Args:
            logits: (N, B, Q, C) of N decoder layers.
            boxes_cxcywh: (N, B, Q, 4) relative to the image.
            targets: of the B images.

        Returns:
            Weighted scalar losses, their sum is the objective: ``loss_ce``, ``loss_bbox`` and
            ``loss_giou`` of the last layer, ``loss_ce_0`` and so on of the layers before it.
        """
        logits, boxes_cxcywh = logits.float(), boxes_cxcywh.float()
        matching = self.matcher(logits, boxes_cxcywh, targets)
        num_objects = self._num_objects(targets, logits.device)
        losses = {
            "loss_ce": self.class_weight * self._class_loss(logits, matching, targets),
            **self._box_losses(boxes_cxcywh, matching, targets),
        }
        last = len(logits) - 1
        return {
            name if layer == last else f"{name}_{layer}": loss[layer] / num_objects
            for layer in range(len(logits))
            for name, loss in losses.items()
        }

    @staticmethod
    def _num_objects(targets: List[Targets], device: torch.device) -> Tensor:
        # Made on the device, it would wait for all that a GPU still has to do.
        count = torch.tensor(float(sum(len(t.labels) for t in targets)))
        count = count.to(device, non_blocking=True)
        if comm.get_world_size() > 1:
            torch.distributed.all_reduce(count)
        return (count / comm.get_world_size()).clamp(min=1)

    def _class_loss(self, logits: Tensor, matching: Matching, targets: List[Targets]) -> Tensor:
        """(N,) sum of each layer."""
        labels = torch.cat([t.labels for t in targets])
        truth = torch.zeros_like(logits)
        where = (matching.layers, matching.images, matching.queries, labels[matching.targets])
        truth[where] = 1.0
        loss = sigmoid_focal_loss(logits, truth, alpha=self.alpha, gamma=self.gamma)
        return loss.sum(dim=(1, 2, 3))

    def _box_losses(
        self, boxes: Tensor, matching: Matching, targets: List[Targets]
    ) -> Dict[str, Tensor]:
        """(N,) sums of each layer."""
        truth = torch.cat([t.boxes_cxcywh for t in targets])[matching.targets]
        matched = boxes[matching.layers, matching.images, matching.queries]
        l1 = F.l1_loss(matched, truth, reduction="none").sum(dim=-1)
        giou = generalized_iou(
            box_convert(matched, "cxcywh", "xyxy"), box_convert(truth, "cxcywh", "xyxy")
        )
        # 0, but NaN where a box is not finite, which no pair need contain.
        zeros = 0 * boxes.sum(dim=(1, 2, 3))
        return {
            "loss_bbox": self.box_weight * zeros.index_add(0, matching.layers, l1),
            "loss_giou": self.giou_weight * zeros.index_add(0, matching.layers, 1 - giou),
        }
