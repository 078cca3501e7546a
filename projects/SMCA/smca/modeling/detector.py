"""The meta-architecture: ResNet features -> scales -> encoder -> decoder -> classes and boxes."""

from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple, Union

import torch
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..errors import UserError
from .cell_head import IMPOSSIBLE, change_boxes, start_without_change
from .decoder import DecoderOutput
from .layers import class_head, mlp
from .matcher import Predictions, Targets
from .neck import ScaleProjection
from .position_encoding import SinePositionEncoding
from .queries import LearnedQueries
from .scales import Scale, Size, as_tokens, padding_masks
from .weight_map import float32_region


class SMCA(nn.Module):
    """DETR with spatially modulated co-attention (SMCA, ICCV 2021), single- or multi-scale.

    Without modulation and with one scale it is DETR (with focal loss). With queries that the
    encoder proposes and a decoder that refines boxes it learns faster, and from less data.

    Args:
        backbone: a Detectron2 backbone.
        in_features, num_extra_scales: the scales, see `ScaleProjection`.
        encoder: a `TransformerEncoder`, `ConvEncoder` or `PyramidEncoder`.
        decoder: a `Decoder`.
        queries: where queries come from, see `queries.py`; None: `LearnedQueries`.
        denoising: adds noisy objects to the queries in training, see `Denoising`; or None.
        dense_head: has losses of its own on the encoder's cells in training, see `DenseHead`; or
            None.
        share_heads: all decoder layers have the same class head and the same box head.
        criterion: computes the losses in training; None for inference only.
        num_classes, num_queries: C and Q.
        embed_dim: d, the same in all parts.
        dropout: the rate that encoder and decoder were built with (their configs refer to it).
        max_detections: number of an image's detections; None: as many as queries (DETR).
        pixel_mean, pixel_std: of the input image's channels (RGB, 0 to 255).

    Raises:
        ValueError: a number is too small, or a part does not fit the others.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        num_extra_scales: int,
        encoder: nn.Module,
        decoder: nn.Module,
        queries: Optional[nn.Module] = None,
        denoising: Optional[nn.Module] = None,
        dense_head: Optional[nn.Module] = None,
        share_heads: bool = True,
        criterion: Optional[nn.Module] = None,
        num_classes: int,
        num_queries: int,
        embed_dim: int,
        dropout: float,
        max_detections: Optional[int] = None,
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ):
        super().__init__()
        num_scales = len(in_features) + num_extra_scales
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            expected = getattr(part, "num_scales", num_scales)
            if expected != num_scales:
                raise ValueError(
                    f"in_features and num_extra_scales give {num_scales} scales, but the {name} "
                    f"is made for {expected}: build it with num_scales={num_scales}."
                )
        names = ("num_classes", "num_queries", "max_detections")
        for name, value in zip(names, (num_classes, num_queries, max_detections)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.refine = getattr(decoder, "refine", False)
        if self.refine != getattr(queries, "has_boxes", False):
            raise ValueError("decoder.refine=True and queries with boxes need one another.")
        if denoising is not None and not self.refine:
            raise ValueError("denoising needs decoder.refine=True and queries with boxes.")
        self.backbone = backbone
        shapes = backbone.output_shape()
        self.neck = ScaleProjection(shapes, in_features, num_extra_scales, embed_dim)
        self.encoder = encoder
        self.decoder = decoder
        self.criterion: Any = criterion
        self.num_classes = num_classes
        self.dropout = dropout
        self.max_detections = num_queries if max_detections is None else max_detections

        self.position_encoding = SinePositionEncoding(embed_dim)
        self.scale_embed = nn.Embedding(num_scales, embed_dim) if num_scales > 1 else None
        self.query_embed = LearnedQueries(num_queries, embed_dim) if queries is None else queries
        self.denoising: Any = denoising
        self.dense_head: Any = dense_head
        num_heads = None if share_heads else len(decoder.layers)  # type: ignore[arg-type]
        self.class_embed = _repeat(num_heads, lambda: class_head(embed_dim, num_classes))
        self.box_embed = _repeat(num_heads, lambda: mlp(embed_dim, 4))
        if self.refine:
            for head in [self.box_embed] if share_heads else self.box_embed.children():
                start_without_change(head)

        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), False)
        # Convolutions are faster in this format, and their results are tokens without a copy.
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def compile_parts(self, **kwargs: Any) -> None:
        """Compile backbone, encoder and decoder in place, for images of any size, with arguments of
        ``torch.compile``. (`compile` takes the work on lists of images and on the host as well, and
        is slower.)"""
        from torch._inductor import config  # which takes a while to import

        # Graphs that DistributedDataParallel cuts at its buckets fail where sizes change.
        torch._dynamo.config.optimize_ddp = False
        # PyTorch 2.14 fails to order the strides of views that a backward pass needs.
        if hasattr(config, "strict_output_strides"):
            config.strict_output_strides = True
        for part in (self.backbone, self.encoder, self.decoder):
            part.compile(**{"dynamic": True, **kwargs})

    def forward(
        self, batched_inputs: List[Dict[str, Any]]
    ) -> Union[Dict[str, Tensor], List[Dict[str, Instances]]]:
        """
        Args:
            batched_inputs: one dict an image: ``image``, (3, height, width) RGB, 0 to 255; in
                training ``instances`` with ``gt_boxes`` (corners, in pixels of ``image``) and
                ``gt_classes``; optionally ``height`` and ``width`` that detections are scaled to.

        Returns:
            In training a dict of weighted losses, whose sum is the objective. Else a list of
            ``{"instances": Instances}`` with ``pred_boxes`` (in pixels of height and width),
            ``scores``, ``pred_classes`` and ``query_indices``, best first.

        Raises:
            UserError: there is no criterion, or an object is of a class that the model lacks.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            predictions = self.forward_head(self.forward_features(images))
            return self.postprocess(predictions, batched_inputs, images.image_sizes)
        if self.criterion is None:
            raise UserError("A model with criterion=None cannot be trained: add a SetCriterion.")
        return self._losses(images, [self._targets(x) for x in batched_inputs])

    def preprocess(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Images normalized, then padded at the right and bottom with zeros: (B, 3, H, W)."""
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        # Detectron2's Swin, which pads by itself, has no size_divisibility in spite of its base.
        divisibility = getattr(self.backbone, "size_divisibility", 0)
        constraints = self.backbone.padding_constraints
        return ImageList.from_tensors(images, divisibility, padding_constraints=constraints)

    def scales(self, images: ImageList) -> List[Scale]:
        """The encoder's input: features, positions and padding masks, from fine to coarse."""
        maps = self.neck(self.backbone(images.tensor))
        padded_size = tuple(images.tensor.shape[-2:])
        sizes: List[Size] = [tuple(feature_map.shape[-2:]) for feature_map in maps]
        masks = padding_masks(images.image_sizes, padded_size, sizes, self.device)
        scales = []
        for index, (size, mask) in enumerate(zip(sizes, masks)):
            everything = torch.zeros((1, *size), dtype=torch.bool, device=self.device)
            position = as_tokens(self.position_encoding(everything if mask is None else mask))
            if self.scale_embed is not None:
                position = position + self.scale_embed.weight[index]
            tokens = as_tokens(maps[index])
            position = position.expand_as(tokens)
            mask = None if mask is None else mask.flatten(1)
            scales.append(Scale(tokens, position, mask, size, self.neck.strides[index]))
        return scales

    def forward_features(self, images: ImageList) -> DecoderOutput:
        """The decoder's output, of images as `preprocess` returns them."""
        scales, image_sizes = self._encode(images)
        queries = self.query_embed(scales, image_sizes)
        return self.decoder(scales, queries, image_sizes, self._change_boxes)

    def forward_head(self, output: DecoderOutput) -> Predictions:
        """Class logits and boxes of all decoder layers, in evaluation of the last layer only."""
        hidden, references = output
        if not self.training:
            hidden = hidden[-1:]
            references = None if references is None else references[-1:]
        first = len(output.hidden) - len(hidden)
        with float32_region(hidden):
            logits = _apply(self.class_embed, hidden, first)
            boxes = _apply(self.box_embed, hidden, first)
            if references is not None:
                if references.shape[-1] == 4:
                    return Predictions(logits, change_boxes(references, boxes))
                center, size = boxes.split(2, dim=-1)
                boxes = torch.cat([center + references, size], dim=-1)
            return Predictions(logits, boxes.sigmoid())

    def top_detections(self, predictions: Predictions) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        """The K best of all Q * C pairs of query and class, of the last layer, best first (DETR).

        Returns:
            (B, K, 4) boxes xyxy relative to each image's own size, not clipped to it; (B, K)
            scores, indices of classes, and indices of queries.
        """
        scores = predictions.logits[-1].sigmoid().flatten(1)
        scores, indices = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        queries, classes = indices // self.num_classes, indices % self.num_classes
        boxes = box_convert(predictions.boxes_cxcywh[-1], "cxcywh", "xyxy")
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        return boxes, scores, classes, queries

    def postprocess(
        self,
        predictions: Predictions,
        batched_inputs: List[Dict[str, Any]],
        image_sizes: Sequence[Tuple[int, int]],
    ) -> List[Dict[str, Instances]]:
        """What `forward` returns in evaluation. `image_sizes` are those (height, width) that boxes
        are scaled to where the dict has none."""
        image_sizes = [
            (item.get("height", height), item.get("width", width))
            for item, (height, width) in zip(batched_inputs, image_sizes)
        ]
        boxes, *others = self.top_detections(predictions)
        boxes = boxes * _corner_sizes(image_sizes, boxes)[:, None]
        names = ("scores", "pred_classes", "query_indices")
        return [
            {"instances": Instances(image_size, pred_boxes=Boxes(b), **dict(zip(names, fields)))}
            for image_size, b, *fields in zip(image_sizes, boxes, *others)
        ]

    def _encode(self, images: ImageList) -> Tuple[List[Scale], Tensor]:
        """The encoded scales, and (B, 2) each image's own (width, height) in pixels."""
        scales = self.encoder(self.scales(images))
        sizes = images.image_sizes
        if not isinstance(sizes, Tensor):
            sizes = torch.tensor([(h, w) for h, w in sizes])
        sizes = sizes.float().flip(1)
        return scales, sizes.to(self.device, non_blocking=True)

    def _change_boxes(self, layer: int, hidden: Tensor) -> Tensor:
        """(B, Q, d) of a decoder layer to (B, Q, 4) changes of boxes."""
        with float32_region(hidden):
            return _apply(self.box_embed, hidden[None], layer)[0]

    def _losses(self, images: ImageList, targets: List[Targets]) -> Dict[str, Tensor]:
        """The losses of the decoder layers, and with the suffixes ``enc``, ``dn`` and ``dense`` of
        the proposals, the noisy objects (all layers together) and the dense head."""
        scales, image_sizes = self._encode(images)
        queries = self.query_embed(scales, image_sizes)
        num_queries = queries.content.shape[1]
        if self.denoising is not None:
            queries, padding = self.denoising(queries, targets)
        output = self.decoder(scales, queries, image_sizes, self._change_boxes)
        logits, boxes = self.forward_head(output)
        predictions = Predictions(logits[:, :, :num_queries], boxes[:, :, :num_queries])
        if queries.proposals is not None:  # matched together, for the matcher makes a GPU wait
            pairs = zip(queries.proposals, predictions)
            predictions = Predictions(*(torch.cat(pair) for pair in pairs))
        losses = self.criterion(predictions, targets)
        if queries.proposals is not None:
            losses = {_after_proposals(name): loss for name, loss in losses.items()}
        if self.denoising is not None:
            logits = logits[:, :, num_queries:].masked_fill(padding[..., None], IMPOSSIBLE)
            noisy = Predictions(logits, boxes[:, :, num_queries:])
            matching = self.denoising.matching(targets, len(logits))
            parts = self.criterion.by_layer(noisy, targets, matching, self.denoising.groups)
            for name, loss in parts.items():
                losses[f"{name}_dn"] = self.denoising.weight * loss.sum()
        if self.dense_head is not None:
            dense, matching = self.dense_head(scales, image_sizes, targets)
            for name, loss in self.criterion.by_layer(dense, targets, matching).items():
                losses[f"{name}_dense"] = self.dense_head.weight * loss.sum()
        return losses

    def _targets(self, item: Dict[str, Any]) -> Targets:
        """Labels, and boxes relative to the image."""
        instances = item["instances"]
        classes = instances.gt_classes
        # Only on the host: to read classes that are on a GPU would wait for the GPU.
        if classes.device.type == "cpu" and len(classes) and classes.max() >= self.num_classes:
            raise UserError(
                f"Image {item.get('file_name', 'of a batch')} has an object of class index "
                f"{int(classes.max())}, the model has {self.num_classes} classes: set "
                "model.num_classes to the data set's number."
            )
        boxes = instances.gt_boxes.tensor.to(self.device, non_blocking=True)
        boxes = box_convert(boxes, "xyxy", "cxcywh") / _corner_sizes([instances.image_size], boxes)
        return Targets(classes.to(self.device, non_blocking=True), boxes)


def _corner_sizes(image_sizes: Sequence[Size], boxes: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of each (height, width), on the boxes' device.

    `boxes.new_tensor` would wait for the GPU."""
    sizes = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
    return sizes.to(boxes.device, non_blocking=True)


def _repeat(count: Optional[int], make: Callable[[], nn.Module]) -> nn.Module:
    """One head, or a list of `count`."""
    return make() if count is None else nn.ModuleList(make() for _ in range(count))


def _apply(head: nn.Module, hidden: Tensor, first: int) -> Tensor:
    """(N, B, Q, d) of the decoder layers from `first` on, each through its head."""
    if not isinstance(head, nn.ModuleList):
        return head(hidden)
    return torch.stack([head[first + index](x) for index, x in enumerate(hidden)])


def _after_proposals(name: str) -> str:
    """The name of a loss where the proposals count as the first layer: loss_ce_0 becomes
    loss_ce_enc, loss_ce_1 becomes loss_ce_0, and so on."""
    kind, _, layer = name.rpartition("_")
    if not layer.isdigit():
        return name
    return f"{kind}_enc" if layer == "0" else f"{kind}_{int(layer) - 1}"
