"""A dense one-to-many head on the encoder's cells, in training only.

One-to-one matching gives the encoder few positive examples (Co-DETR). Here each object has
several cells, chosen as in TOOD: those that predict its class and its box best.
"""

from typing import List, Tuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .box_ops import iou_and_giou
from .cell_head import CellHead, Cells
from .matcher import Matching, Predictions, Targets, pad_targets
from .scales import Scale

_FAR = 1e3


class DenseHead(nn.Module):
    """Predicts a class and a box in every cell, and assigns cells to objects.

    A cell's alignment with an object is p^alpha IoU^beta, p its probability of the object's class.
    An object takes the `num_cells` best aligned of the cells whose centers are in its box (and of
    the nearest one, for boxes that hold none). A cell that several objects take goes to the one
    with the highest IoU.

    Args:
        embed_dim, num_classes: d and C.
        num_cells: cells of an object.
        alpha, beta: exponents of the probability and of the IoU.
        weight: factor of this head's losses.
        deep: with the projection and the MLP of `CellHead`; else linear heads alone.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        num_cells: int = 10,
        alpha: float = 1.0,
        beta: float = 6.0,
        weight: float = 1.0,
        deep: bool = True,
    ):
        super().__init__()
        self.cells = CellHead(embed_dim, num_classes, project=deep, linear_boxes=not deep)
        self.num_cells = num_cells
        self.alpha, self.beta = alpha, beta
        self.weight = weight

    def forward(
        self, scales: List[Scale], image_sizes: Tensor, targets: List[Targets]
    ) -> Tuple[Predictions, Matching]:
        """(1, B, S, ...) predictions of the encoded scales, and the cells of each object with their
        weights. `image_sizes` (B, 2) is each image's own (width, height) in pixels."""
        cells = self.cells(scales, image_sizes)
        boxes = self.cells.predict_boxes(cells.hidden, cells.boxes)
        predictions = Predictions(cells.logits[None], boxes[None])
        return predictions, self.assign(cells, boxes, targets)

    @torch.no_grad()
    def assign(self, cells: Cells, predicted: Tensor, targets: List[Targets]) -> Matching:
        """The task-aligned assignment (TOOD, section 3.2) of cells with `predicted` (B, S, 4) boxes
        cxcywh.

        Returns:
            For each image T times `num_cells` pairs, T being the largest number of objects of an
            image, so that no shape depends on the data. Pairs that are none have the weight 0. The
            weights of an object's cells are their alignments, scaled so that the largest is the
            object's largest IoU.
        """
        if not sum(len(t.labels) for t in targets):
            empty = torch.zeros(0, dtype=torch.long, device=cells.logits.device)
            return Matching(empty, empty, empty, empty, empty.float())
        labels, boxes = pad_targets(targets)
        counts = torch.tensor([len(t.labels) for t in targets])
        exists = torch.arange(labels.shape[1])[None] < counts[:, None]  # (B, T)
        first_target = (counts.cumsum(0) - counts)[:, None]
        indices = (first_target + torch.arange(labels.shape[1])) * exists
        exists, indices = (x.to(labels.device, non_blocking=True) for x in (exists, indices))

        corners = box_convert(boxes, "cxcywh", "xyxy")
        predicted = box_convert(predicted, "cxcywh", "xyxy")
        iou, _ = iou_and_giou(predicted[:, None], corners[:, :, None])  # (B, T, S)
        num_cells = iou.shape[-1]
        probability = cells.logits.float().sigmoid().mT
        probability = probability.gather(1, labels[..., None].expand(-1, -1, num_cells))
        candidate, distance = self._candidates(cells, boxes, corners)
        alignment = probability**self.alpha * iou.clamp(min=1e-6) ** self.beta
        # Among cells that predict nothing yet, the nearest are the best.
        alignment = (alignment + 1e-12 / (1e-6 + distance)) * (candidate & exists[..., None])

        top = alignment.topk(min(self.num_cells, num_cells), dim=2)
        taken = torch.zeros_like(alignment).scatter_(2, top.indices, 1.0) * (alignment > 0)
        # (B, S) the object whose IoU is highest among those that take the cell.
        owner = (iou + 1).mul(taken).amax(dim=1, keepdim=True)
        taken = taken * ((iou + 1) * taken == owner)
        alignment, iou = alignment * taken, iou * taken
        scale = iou.amax(dim=2, keepdim=True) / alignment.amax(dim=2, keepdim=True).clamp(min=1e-12)
        weights = (alignment * scale).clamp(min=0.01) * taken

        images = torch.arange(len(targets), device=iou.device)[:, None, None]
        fields = (
            torch.zeros_like(top.indices),
            images.expand_as(top.indices),
            top.indices,
            indices[..., None].expand_as(top.indices),
            weights.gather(2, top.indices),
        )
        return Matching(*(x.flatten() for x in fields))

    @staticmethod
    def _candidates(cells: Cells, boxes: Tensor, corners: Tensor) -> Tuple[Tensor, Tensor]:
        """(B, T, S): whether an object may take a cell, and the squared distance of centers."""
        centers = cells.boxes[:, None, :, :2]
        inside = (centers > corners[:, :, None, :2]) & (centers < corners[:, :, None, 2:])
        candidate = inside.all(dim=-1) & cells.valid[:, None]
        distance = (centers - boxes[:, :, None, :2]).square().sum(dim=-1)
        distance = distance.masked_fill(~cells.valid[:, None], _FAR)
        nearest = distance.argmin(dim=2, keepdim=True)
        return candidate.scatter(2, nearest, torch.ones_like(nearest, dtype=torch.bool)), distance
