"""The meta-architecture: ResNet features -> scales -> encoder -> decoder -> classes and boxes."""

import math
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple, Union

import torch
from detectron2.modeling import Backbone
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..errors import UserError
from .backbone import fold_frozen_norms
from .decoder import DecoderOutput
from .layers import mlp
from .matcher import Targets
from .neck import ScaleProjection
from .position_encoding import SinePositionEncoding
from .scales import Scale, Size, as_tokens, padding_masks
from .weight_map import float32_region


class Predictions(NamedTuple):
    """
    Attributes:
        logits: (N, B, Q, C) class logits of the N decoder layers (in evaluation of the last only).
        boxes_cxcywh: (N, B, Q, 4) in [0, 1], relative to each image's own size.
    """

    logits: Tensor
    boxes_cxcywh: Tensor


class Detections(NamedTuple):
    """The K best pairs of a query and a class, best first.

    Attributes:
        boxes_xyxy: (B, K, 4) relative to each image's own size, not clipped to it.
        scores: (B, K) probabilities.
        classes: (B, K) indices.
        queries: (B, K) indices.
    """

    boxes_xyxy: Tensor
    scores: Tensor
    classes: Tensor
    queries: Tensor


class SMCA(nn.Module):
    """DETR with spatially modulated co-attention (SMCA, ICCV 2021), single- or multi-scale.

    Without modulation and with one scale it is DETR (with focal loss).

    Args:
        backbone: a Detectron2 backbone.
        in_features: names of the backbone's features to take as scales, from fine to coarse.
        num_extra_scales: coarser scales to add, see `ScaleProjection`.
        encoder: a `TransformerEncoder` or `ConvEncoder`.
        decoder: a `Decoder`.
        criterion: gives the losses in training; None for inference only.
        num_classes: C.
        num_queries: Q.
        embed_dim: d, the same in all parts.
        dropout: the one rate that encoder and decoder were built with (their configs refer to it).
        max_detections: detections returned for each image; None: as many as queries (DETR).
        pixel_mean: of the channels of the input image, RGB, 0 to 255.
        pixel_std: likewise.

    Raises:
        ValueError: for a number that is too small, a width that is no multiple of 4, features that
            the backbone does not give, or parts that are missing or made for another number of
            scales.
    """

    def __init__(
        self,
        *,
        backbone: Backbone,
        in_features: Sequence[str],
        num_extra_scales: int,
        encoder: nn.Module,
        decoder: nn.Module,
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
        for name, part in (("backbone", backbone), ("encoder", encoder), ("decoder", decoder)):
            if part is None:
                raise ValueError(
                    f"{name}=None must be a module: only the criterion may be missing."
                )
        num_scales = len(in_features) + num_extra_scales
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            expected = getattr(part, "num_scales", num_scales)
            if expected != num_scales:
                raise ValueError(
                    f"in_features and num_extra_scales give {num_scales} scales, but the {name} "
                    f"is made for {expected}: build it with num_scales={num_scales}."
                )
        for name, value in (
            ("num_classes", num_classes),
            ("num_queries", num_queries),
            ("max_detections", max_detections),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self.backbone = fold_frozen_norms(backbone)
        self.neck = ScaleProjection(
            backbone.output_shape(), in_features, num_extra_scales, embed_dim
        )
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.dropout = dropout
        self.max_detections = num_queries if max_detections is None else max_detections

        self.position_encoding = SinePositionEncoding(embed_dim)
        self.scale_embed = nn.Embedding(num_scales, embed_dim) if num_scales > 1 else None
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes)
        self.box_embed = mlp(embed_dim, 4)
        # Every query starts at a foreground probability of 0.01 (focal loss, section 4.1).
        nn.init.constant_(self.class_embed.bias, -math.log((1 - 0.01) / 0.01))

        self.pixel_mean: Tensor
        self.pixel_std: Tensor
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), False)
        # Convolutions are faster so, and their results are tokens without a copy.
        self.to(memory_format=torch.channels_last)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def compile_parts(self, **kwargs: Any) -> None:
        """Compile backbone, encoder and decoder in place, for images of any size.

        What is left works on lists of images and on the host: `compile`, which takes all of it, is
        slower.

        Args:
            kwargs: of ``torch.compile``.
        """
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
            UserError: in training without a criterion, or for an object of a class that the model
                lacks.
        """
        images = self.preprocess(batched_inputs)
        if not self.training:
            predictions = self.predict(self.decode(images))
            return self.inference(predictions, batched_inputs, images.image_sizes)
        if self.criterion is None:
            raise UserError(
                "The model has criterion=None and cannot be trained: build it with a SetCriterion, "
                "or call eval() for detections."
            )
        predictions = self.predict(self.decode(images))
        targets = [self._targets(x) for x in batched_inputs]
        return self.criterion(*predictions, targets)

    def preprocess(self, batched_inputs: List[Dict[str, Any]]) -> ImageList:
        """Images normalized, then padded at the right and bottom with zeros: (B, 3, H, W)."""
        images = [
            (x["image"].to(self.device, non_blocking=True) - self.pixel_mean) / self.pixel_std
            for x in batched_inputs
        ]
        # Detectron2's Swin, which pads by itself, has no size_divisibility in spite of its base.
        return ImageList.from_tensors(
            images,
            getattr(self.backbone, "size_divisibility", 0),
            padding_constraints=self.backbone.padding_constraints,
        )

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

    def decode(self, images: ImageList) -> DecoderOutput:
        """Everything but the heads."""
        scales = self.encoder(self.scales(images))
        sizes = images.image_sizes
        if not isinstance(sizes, Tensor):
            sizes = torch.tensor([(h, w) for h, w in sizes])
        sizes = sizes.float().flip(1)
        sizes = sizes.to(self.device, non_blocking=True)
        return self.decoder(scales, self.query_embed.weight, sizes)

    def predict(self, decoded: DecoderOutput) -> Predictions:
        """Class logits and boxes; the predicted center is the boxes' starting point."""
        hidden = decoded.hidden if self.training else decoded.hidden[-1:]
        with float32_region(hidden):
            logits = self.class_embed(hidden)
            boxes = self.box_embed(hidden)
            if decoded.reference is not None:
                center, size = boxes.split(2, dim=-1)
                boxes = torch.cat([center + decoded.reference, size], dim=-1)
            return Predictions(logits, boxes.sigmoid())

    def best(self, predictions: Predictions) -> Detections:
        """The best of all Q * C pairs of query and class, of the last layer.

        Several detections may come from one query; there is no non-maximum suppression (DETR).
        """
        scores = predictions.logits[-1].sigmoid().flatten(1)
        scores, indices = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        queries, classes = indices // self.num_classes, indices % self.num_classes
        boxes = box_convert(predictions.boxes_cxcywh[-1], "cxcywh", "xyxy")
        boxes = boxes.gather(1, queries[..., None].expand(-1, -1, 4))
        return Detections(boxes, scores, classes, queries)

    def inference(
        self,
        predictions: Predictions,
        batched_inputs: List[Dict[str, Any]],
        image_sizes: Sequence[Tuple[int, int]],
    ) -> List[Dict[str, Instances]]:
        """The best detections, boxes scaled to the original image.

        Args:
            predictions: of the last layer at least.
            batched_inputs: as in `forward`.
            image_sizes: (height, width) of each image, where the item does not say another.

        Returns:
            As `forward` in evaluation.
        """
        image_sizes = [
            (item.get("height", height), item.get("width", width))
            for item, (height, width) in zip(batched_inputs, image_sizes)
        ]
        best = self.best(predictions)
        all_boxes = best.boxes_xyxy * _corner_sizes(image_sizes, best.boxes_xyxy)[:, None]
        results = []
        for boxes, scores, classes, queries, image_size in zip(all_boxes, *best[1:], image_sizes):
            instances = Instances(image_size)
            instances.pred_boxes = Boxes(boxes)
            instances.scores = scores
            instances.pred_classes = classes
            instances.query_indices = queries
            results.append({"instances": instances})
        return results

    def _targets(self, item: Dict[str, Any]) -> Targets:
        """Labels, and boxes relative to the image."""
        instances = item["instances"]
        self._check_classes(instances.gt_classes, item.get("file_name", "of a batch"))
        boxes = instances.gt_boxes.tensor.to(self.device, non_blocking=True)
        boxes = box_convert(boxes, "xyxy", "cxcywh") / _corner_sizes([instances.image_size], boxes)
        return Targets(instances.gt_classes.to(self.device, non_blocking=True), boxes)

    def _check_classes(self, classes: Tensor, image: str) -> None:
        # Where a GPU holds them, asking would wait for all that it still has to do.
        if classes.device.type == "cpu" and len(classes) and classes.max() >= self.num_classes:
            raise UserError(
                f"Image {image} has an object of class index {int(classes.max())}, the model has "
                f"{self.num_classes} classes: set model.num_classes to the data set's number."
            )


def _corner_sizes(image_sizes: Sequence[Size], boxes: Tensor) -> Tensor:
    """(B, 4) width, height, width, height of each (height, width), where the boxes are. Made by
    `boxes.new_tensor`, they would wait for all that a GPU still has to do."""
    sizes = torch.tensor([(w, h, w, h) for h, w in image_sizes], dtype=boxes.dtype)
    return sizes.to(boxes.device, non_blocking=True)
