"""The SMCA decoder (section 3): each query says where to look, then reads from there."""

from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor, nn

from .attention import CoAttention, MultiheadAttention
from .cell_head import change_boxes
from .kernels import additive_mask
from .layers import FeedForward, autocast_dtype, mlp, xavier_uniform
from .position_encoding import encode_boxes
from .queries import Queries
from .scales import Scale
from .weight_map import Modulation, WeightMapPredictor, float32_region

_DEFAULT = Modulation()
# Predicts in layer i the change of boxes, see `change_boxes`: (i, (B, Q, d)) -> (B, Q, 4).
BoxHead = Callable[[int, Tensor], Tensor]


class Memory(NamedTuple):
    """What all decoder layers read: the encoded scales, joined as `CoAttention` takes them."""

    scales: List[Scale]
    num_cells: List[int]
    masks: List[Optional[Tensor]]
    key: Tensor  # (B, S, d) tokens with their positions
    value: Tensor  # (B, S, d) tokens


class DecoderOutput(NamedTuple):
    """What the N layers give."""

    hidden: Tensor  # (N, B, Q, d) normalized output of each
    # (N, B, Q, 2 or 4) what each layer's boxes start from: the center (x, y) that the first layer
    # predicts, before its sigmoid, or boxes cxcywh, in a decoder that refines them. None without
    # either (DETR).
    references: Optional[Tensor]


class DecoderLayer(nn.Module):
    """Query self-attention, (modulated) co-attention, FFN; post-norm.

    The arguments are those of `Decoder`, with the number of scales that are read. The first layer
    `predicts_center` for all layers. A part that the settings do not need is not built, since an
    unused parameter breaks distributed training.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float,
        num_scales: int,
        modulation: Optional[Modulation],
        scale_selection: bool,
        predicts_center: bool,
        refine: bool,
    ):
        super().__init__()
        self.self_attention = MultiheadAttention(embed_dim, num_heads, dropout)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.co_attention = CoAttention(embed_dim, num_heads, dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)

        self.modulation: Optional[WeightMapPredictor] = None
        self.center: Optional[nn.Module] = None
        if modulation is not None:
            sizes = dict(embed_dim=embed_dim, num_heads=num_heads, num_scales=num_scales)
            self.modulation = WeightMapPredictor(modulation, **sizes, in_boxes=refine)
            self.center = mlp(embed_dim, 2) if predicts_center else None
        selects = scale_selection and num_scales > 1
        self.scale_weight = nn.Linear(embed_dim, num_scales) if selects else None
        readers = [m for m in (self.center, self.modulation, self.scale_weight) if m is not None]
        has_reader = any(list(reader.parameters()) for reader in readers)
        self.input_norm = nn.LayerNorm(embed_dim) if has_reader else None

    def forward(
        self,
        queries: Tensor,
        query_position: Tensor,
        memory: Memory,
        image_sizes: Tensor,
        reference: Optional[Tensor] = None,
        num_groups: int = 0,
        group_size: int = 0,
    ) -> Tuple[Tensor, Optional[Tensor]]:
        """
        Args:
            queries: (B, Q, d).
            query_position: (Q, d) or (B, Q, d).
            memory: the encoded scales.
            image_sizes: (B, 1, 2) each image's own (width, height) in pixels.
            reference: what the boxes start from, see `DecoderOutput`; None in a first layer that
                predicts it.
            num_groups, group_size: as in `Queries`.

        Returns:
            (B, Q, d) queries, and the reference.
        """
        located = queries + query_position
        weight_maps = scale_weights = None
        layer_input = located if self.input_norm is None else self.input_norm(located)
        if self.modulation is not None:
            with float32_region(layer_input):
                if self.center is not None:
                    reference = self.center(layer_input)
                assert reference is not None
                half_sizes = None
                if reference.shape[-1] == 4:
                    center = reference[..., :2] * image_sizes
                    half_sizes = reference[..., 2:] * image_sizes / 2
                else:
                    center = reference.sigmoid() * image_sizes
            weight_maps = self.modulation(layer_input, center, memory.scales, half_sizes)
        if self.scale_weight is not None:
            with float32_region(layer_input):
                scale_weights = self.scale_weight(layer_input).softmax(dim=-1)

        attended = self._attend_to_queries(located, queries, num_groups, group_size)
        queries = self.norm1(queries + self.dropout1(attended))

        attended = self.co_attention(
            queries + query_position,
            memory.key,
            memory.value,
            memory.num_cells,
            memory.masks,
            weight_maps,
            scale_weights,
        )
        queries = self.norm2(queries + self.dropout2(attended))
        return self.ffn(queries), reference

    def _attend_to_queries(
        self, located: Tensor, queries: Tensor, num_groups: int, group_size: int
    ) -> Tensor:
        """Self-attention, in which groups do not see one another: they become images of a batch."""
        if not num_groups:
            return self.self_attention(located, located, queries)
        sizes = [queries.shape[1] - num_groups * group_size, num_groups * group_size]
        (located, groups_located), (queries, groups) = (
            x.split(sizes, 1) for x in (located, queries)
        )
        groups_located, groups = (
            x.unflatten(1, (num_groups, group_size)).flatten(0, 1) for x in (groups_located, groups)
        )
        attended = self.self_attention(groups_located, groups_located, groups)
        attended = attended.unflatten(0, (-1, num_groups)).flatten(1, 2)
        return torch.cat([self.self_attention(located, located, queries), attended], dim=1)


class Decoder(nn.Module):
    """Decoder layers, and one LayerNorm for the output of each.

    Args:
        num_layers: 6 in the paper.
        modulation: the settings of the weight maps; None: no weight maps (DETR).
        refine: queries come with boxes. Positions and weight maps follow from the boxes, in units
            of these, and each layer's boxes are what the next one starts from (without a gradient).
        scale_selection: each query weighs the scales; without it, their results are added.
        num_scales: L, how many scales the encoder gives.
        embed_dim, num_heads, ffn_dim, dropout: as in `TransformerEncoder`.
        read: indices of the scales that the layers read, fine to coarse; None: all. Attention to
            a fine scale costs most, and queries may come from scales that are not read.
    """

    def __init__(
        self,
        *,
        num_layers: int = 6,
        modulation: Optional[Modulation] = _DEFAULT,
        refine: bool = False,
        scale_selection: bool = True,
        num_scales: int = 3,
        embed_dim: int = 256,
        num_heads: int = 8,
        ffn_dim: int = 1024,
        dropout: float = 0.1,
        read: Optional[Sequence[int]] = None,
    ):
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1.")
        self.num_scales = num_scales
        self.read = list(range(num_scales) if read is None else read)
        if not self.read or not set(self.read) <= set(range(num_scales)):
            scales = f"the scales 0 to {num_scales - 1}"
            raise ValueError(f"read={self.read} must name some of {scales}.")
        self.refine = refine
        self.modulated = modulation is not None
        self.layers = nn.ModuleList(
            DecoderLayer(
                embed_dim=embed_dim,
                num_heads=num_heads,
                ffn_dim=ffn_dim,
                dropout=dropout,
                num_scales=len(self.read),
                modulation=modulation,
                scale_selection=scale_selection,
                predicts_center=index == 0 and not refine,
                refine=refine,
            )
            for index in range(num_layers)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.embed_dim = embed_dim
        self.box_position: Optional[nn.Module] = None
        if refine:
            first, last = nn.Linear(2 * embed_dim, embed_dim), nn.Linear(embed_dim, embed_dim)
            self.box_position = nn.Sequential(first, nn.ReLU(), last)
        xavier_uniform(self)
        for module in self.modules():
            if isinstance(module, WeightMapPredictor):
                module.reset_parameters()

    def forward(
        self,
        scales: List[Scale],
        queries: Queries,
        image_sizes: Tensor,
        box_head: Optional[BoxHead] = None,
    ) -> DecoderOutput:
        """
        Args:
            scales: the L encoded scales.
            queries: what the first layer starts from.
            image_sizes: (B, 2) each image's own (width, height) in pixels, before padding.
            box_head: predicts each layer's change of the boxes, in a decoder that refines them.
        """
        scales = [scales[index] for index in self.read]
        tokens = torch.cat([scale.tokens for scale in scales], dim=1)
        position = torch.cat([scale.position for scale in scales], dim=1)
        num_cells = [scale.tokens.shape[1] for scale in scales]
        dtype = autocast_dtype(tokens)
        masks = [additive_mask(scale.padding_mask, dtype) for scale in scales]
        memory = Memory(scales, num_cells, masks, tokens + position, tokens)
        content, reference = queries.content, queries.reference
        hidden: List[Tensor] = []
        references: List[Tensor] = []
        for index, layer in enumerate(self.layers):
            if self.refine and index > 0:
                assert box_head is not None and reference is not None
                with torch.no_grad():
                    reference = change_boxes(reference, box_head(index - 1, hidden[-1]))
            content, reference = layer(
                content,
                self._position(queries, reference),
                memory,
                image_sizes[:, None],
                reference,
                queries.num_groups,
                queries.group_size,
            )
            hidden.append(self.norm(content))
            if reference is not None:
                references.append(reference)
        return DecoderOutput(torch.stack(hidden), torch.stack(references) if references else None)

    def _position(self, queries: Queries, reference: Optional[Tensor]) -> Tensor:
        """(Q, d) learned, or (B, Q, d) of the boxes."""
        if self.box_position is None:
            assert queries.position is not None
            return queries.position
        assert reference is not None
        with float32_region(reference):
            encoded = encode_boxes(reference, self.embed_dim)
        return self.box_position(encoded)
