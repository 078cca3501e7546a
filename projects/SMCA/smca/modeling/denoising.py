"""Denoising queries (DN-DETR, DINO): groups of noisy objects that the decoder has to correct.

They need no matching, since each knows its object, and exist in training only.
"""

from typing import List, Tuple

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from .matcher import Matching, Targets, pad_targets
from .queries import Queries


class Denoising(nn.Module):
    """Adds noisy objects to queries. A positive query's box is moved by less than `box_noise` of
    its half sides, a negative one's by more, up to twice as much: it has to find that nothing is
    there.

    Args:
        embed_dim, num_classes: d and C.
        groups: G, how many noisy copies of all objects.
        box_noise: how far each side of a box is moved, relative to half the box.
        label_noise: probability with which a class is replaced by a random one.
        weight: factor of these queries' losses.
    """

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        groups: int = 3,
        box_noise: float = 0.4,
        label_noise: float = 0.25,
        weight: float = 1.0,
    ):
        super().__init__()
        self.label_embed = nn.Embedding(num_classes, embed_dim)
        self.groups = groups
        self.box_noise, self.label_noise = box_noise, label_noise
        self.weight = weight

    def forward(self, queries: Queries, targets: List[Targets]) -> Tuple[Queries, Tensor]:
        """
        Args:
            queries: with boxes.
            targets: the objects of the B images.

        Returns:
            The queries with G groups behind them: each has a positive query for each of T places
            for objects, then a negative one for each; T is the largest number of objects of an
            image, at least 1. And (B, G * 2 T) bool, True for places without an object.
        """
        labels, boxes = pad_targets(targets)
        # At least one place, so that every parameter always has a gradient.
        missing = max(0, 1 - labels.shape[1])
        labels = nn.functional.pad(labels, (0, missing))
        boxes = nn.functional.pad(boxes, (0, 0, 0, missing))
        counts = torch.tensor([len(t.labels) for t in targets])
        place = torch.arange(labels.shape[1])
        padding = (place >= counts[:, None]).to(labels.device, non_blocking=True)
        # Places without an object repeat the image's objects, for the others to see nothing odd.
        repeated = (place % counts.clamp(min=1)[:, None]).to(labels.device, non_blocking=True)
        labels = labels.gather(1, repeated)
        boxes = boxes.gather(1, repeated[..., None].expand(-1, -1, 4))

        shape = (len(targets), self.groups, 2, labels.shape[1])
        labels, boxes = labels[:, None, None].expand(shape), boxes[:, None, None].expand(*shape, 4)
        with torch.no_grad():
            reference = self._move(boxes.float())
        replaced = torch.rand(shape, device=labels.device) < self.label_noise
        random_labels = torch.randint_like(labels, self.label_embed.num_embeddings)
        content = self.label_embed(torch.where(replaced, random_labels, labels))
        assert queries.reference is not None
        joined = queries._replace(
            content=torch.cat([queries.content, content.flatten(1, 3)], dim=1),
            reference=torch.cat([queries.reference, reference.flatten(1, 3)], dim=1),
            num_groups=self.groups,
            group_size=2 * labels.shape[-1],
        )
        return joined, padding[:, None, None].expand(shape).flatten(1)

    def _move(self, boxes: Tensor) -> Tensor:
        """(B, G, 2, T, 4) boxes cxcywh with each side moved, the positives' less than the
        negatives'."""
        corners = box_convert(boxes, "cxcywh", "xyxy")
        distance = torch.rand_like(boxes)
        distance[:, :, 1] += 1
        sign = torch.randint_like(boxes, 2) * 2 - 1
        half_sides = (boxes[..., 2:] / 2).repeat(1, 1, 1, 1, 2)
        corners = (corners + sign * distance * half_sides * self.box_noise).clamp(0, 1)
        low = torch.minimum(corners[..., :2], corners[..., 2:])
        high = torch.maximum(corners[..., :2], corners[..., 2:])
        return box_convert(torch.cat([low, high], dim=-1), "xyxy", "cxcywh").clamp(1e-3, 1)

    def matching(self, targets: List[Targets], num_layers: int) -> Matching:
        """The positive query of each object of `targets`, in each group and decoder layer."""
        counts = [len(t.labels) for t in targets]
        num_places = max(1, *counts)
        layer, group = torch.arange(num_layers)[:, None, None], torch.arange(self.groups)[:, None]
        image = torch.cat([torch.full((n,), index) for index, n in enumerate(counts)])
        place = torch.cat([torch.arange(n) for n in counts])
        query = group * 2 * num_places + place
        fields = torch.broadcast_tensors(layer, image, query, torch.arange(len(image)))
        indices = torch.stack(fields).flatten(1)
        return Matching(*indices.to(targets[0].labels.device, non_blocking=True))
