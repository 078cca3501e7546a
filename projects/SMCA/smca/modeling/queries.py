"""Where queries come from: learned (DETR, SMCA) or proposed by the encoder (DINO).

A source is a module that is called with the encoded scales and (B, 2) each image's own (width,
height) in pixels, and gives `Queries`. `has_boxes` says whether these come with boxes, which
decoders that refine boxes need.
"""

from typing import List, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cell_head import CellHead, Cells
from .matcher import Predictions
from .scales import Scale

# Less than any logit of use.
_BELOW_ALL = -100.0


class Queries(NamedTuple):
    """What a decoder starts from.

    Attributes:
        content: (B, Q, d) the first layer's input.
        position: (Q, d) added to queries and keys of attention; None where it follows from the
            reference.
        reference: (B, Q, 4) boxes cxcywh, without a gradient; None where the decoder predicts a
            center itself.
        proposals: in training, the predictions that the queries were chosen by, (1, B, Q, ...).
        num_groups, group_size: the last num_groups * group_size queries are groups that neither see
            one another nor are seen by the queries before them.
    """

    content: Tensor
    position: Optional[Tensor] = None
    reference: Optional[Tensor] = None
    proposals: Optional[Predictions] = None
    num_groups: int = 0
    group_size: int = 0


class LearnedQueries(nn.Module):
    """The same queries for every image: a learned position, and zeros as content (DETR).

    Args:
        num_queries, embed_dim: Q and d.
    """

    has_boxes = False

    def __init__(self, num_queries: int, embed_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_queries, embed_dim))
        nn.init.normal_(self.weight)

    def forward(self, scales: List[Scale], image_sizes: Tensor) -> Queries:
        content = torch.zeros_like(self.weight).expand(image_sizes.shape[0], -1, -1)
        return Queries(content, position=self.weight)


class ProposedQueries(nn.Module):
    """The encoder's best cells: their boxes are the queries' references, the content is learned
    ("mixed query selection" in DINO).

    Only a cell that scores highest among its neighbors counts (as in CenterNet), so that an object
    is proposed once and the decoder need not learn to tell copies apart (DDQ). If there are fewer
    such cells than queries, the cells with the lowest scores follow.

    Args:
        num_queries, embed_dim, num_classes: Q, d and C.
        project: as in `CellHead`.
    """

    has_boxes = True

    def __init__(self, num_queries: int, embed_dim: int, num_classes: int, project: bool = True):
        super().__init__()
        if num_queries < 1:
            raise ValueError(f"num_queries={num_queries} must be at least 1.")
        self.weight = nn.Parameter(torch.empty(num_queries, embed_dim))
        nn.init.normal_(self.weight)
        self.cells = CellHead(embed_dim, num_classes, project)

    def forward(self, scales: List[Scale], image_sizes: Tensor) -> Queries:
        cells = self.cells(scales, image_sizes)
        num_queries = len(self.weight)
        scores = _scores_of_peaks(cells, scales)
        # Padded, since images may have fewer than Q cells. The last cell then counts repeatedly.
        scores = F.pad(scores, (0, num_queries), value=-torch.inf)
        best = scores.topk(num_queries, dim=1).indices.clamp(max=cells.valid.shape[1] - 1)
        hidden, logits, initial = (
            x.gather(1, best[..., None].expand(-1, -1, x.shape[-1])) for x in cells[:3]
        )
        boxes = self.cells.predict_boxes(hidden, initial)
        content = self.weight.expand(image_sizes.shape[0], -1, -1)
        proposals = Predictions(logits[None], boxes[None]) if self.training else None
        return Queries(content, reference=boxes.detach(), proposals=proposals)


def _scores_of_peaks(cells: Cells, scales: List[Scale]) -> Tensor:
    """(B, S) by which cells are chosen: peaks by their scores, then all others in reverse, and
    cells outside the image last."""
    scores = cells.logits.detach().amax(dim=-1)
    highest = []
    for scale, part in zip(scales, scores.split([s.tokens.shape[1] for s in scales], dim=1)):
        score_map = part.unflatten(1, scale.size)
        highest.append(F.max_pool2d(score_map, 3, stride=1, padding=1).flatten(1))
    is_peak = scores == torch.cat(highest, dim=1)
    scores = torch.where(is_peak, scores, _BELOW_ALL - scores)
    return torch.where(cells.valid, scores, 2 * _BELOW_ALL)
