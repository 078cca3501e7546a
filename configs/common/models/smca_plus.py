"""SMCA that learns faster and from less data. Its queries are the encoder's best cells, each
decoder layer refines the boxes, and in training there are noisy objects and a dense head.

Another config adds the same parts with ``model.update(plus)`` and ``model.decoder.refine = True``.
"""

from detectron2.config import LazyCall as L

from smca.modeling import (
    Denoising,
    DenseHead,
    HungarianMatcher,
    ProposedQueries,
    SetCriterion,
    VarifocalLoss,
)

from .smca import model

plus = dict(
    queries=L(ProposedQueries)(
        num_queries="${..num_queries}",
        embed_dim="${..embed_dim}",
        num_classes="${..num_classes}",
    ),
    denoising=L(Denoising)(
        embed_dim="${..embed_dim}", num_classes="${..num_classes}", groups=3, weight=1.0
    ),
    dense_head=L(DenseHead)(
        embed_dim="${..embed_dim}", num_classes="${..num_classes}", num_cells=10, weight=1.0
    ),
    share_heads=False,
    criterion=L(SetCriterion)(
        class_weight=1.0, class_loss=L(VarifocalLoss)(), matcher=L(HungarianMatcher)()
    ),
)
model.update(plus)
model.decoder.refine = True
