"""The meta-architecture: ResNet features -> scales -> encoder -> decoder -> classes and boxes."""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence, Tuple

import torch
from detectron2.config import configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

from .backbone import fold_frozen_norms
from .criterion import SetCriterion
from .decoder import DecoderOutput
from .layers import mlp
from .matcher import Targets
from .neck import ScaleProjection
from .position_encoding import SinePositionEncoding
from .scales import Scale, as_tokens, padding_masks
from .weight_map import float32_region


class Predictions(NamedTuple):
    """
    Attributes:
        logits: (N, B, Q, C) class logits of the N decoder layers (in evaluation of the last only).
        boxes_cxcywh: (N, B, Q, 4) in [0, 1], relative to each image's own size.
    """

    logits: Tensor
    boxes_cxcywh: Tensor


@META_ARCH_REGISTRY.register()
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
        num_classes: C. num_queries: Q. embed_dim: d, the same in all parts.
        dropout: the one rate that encoder and decoder were built with (their configs refer to it).
        max_detections: detections returned for each image; None: as many as queries (DETR).
        pixel_mean, pixel_std: of the channels of the input image, RGB, 0 to 255.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: nn.Module,
        in_features: Sequence[str],
        num_extra_scales: int = 0,
        encoder: nn.Module,
        decoder: nn.Module,
        criterion: Optional[SetCriterion] = None,
        num_classes: int = 80,
        num_queries: int = 300,
        embed_dim: int = 256,
        dropout: float = 0.1,
        max_detections: Optional[int] = None,
        pixel_mean: Tuple[float, float, float] = (123.675, 116.28, 103.53),
        pixel_std: Tuple[float, float, float] = (58.395, 57.12, 57.375),
    ):
        super().__init__()
        num_scales = len(in_features) + num_extra_scales
        for name, part in (("encoder", encoder), ("decoder", decoder)):
            expected = getattr(part, "num_scales", num_scales)
            if expected != num_scales:
                raise ValueError(
                    f"model.in_features and model.num_extra_scales give {num_scales} scales, but "
                    f"the {name} is made for {expected}: set model.{name}.num_scales={num_scales}."
                )
        if num_classes < 1 or num_queries < 1:
            raise ValueError(
                f"model.num_classes={num_classes} and model.num_queries={num_queries} must be at "
                "least 1."
            )
        self.backbone = fold_frozen_norms(backbone)
        self.neck = ScaleProjection(
            backbone.output_shape(), in_features, num_extra_scales, embed_dim
        )
        self.encoder = encoder
        self.decoder = decoder
        self.criterion = criterion
        self.num_classes = num_classes
        self.dropout = dropout
        self.max_detections = max_detections or num_queries

        self.position_encoding = SinePositionEncoding(embed_dim // 2)
        self.scale_embed = nn.Embedding(num_scales, embed_dim) if num_scales > 1 else None
        self.query_embed = nn.Embedding(num_queries, embed_dim)
        self.class_embed = nn.Linear(embed_dim, num_classes)
        self.box_embed = mlp(embed_dim, 4)
        # Every query starts at a foreground probability of 0.01 (focal loss, section 4.1).
        nn.init.constant_(self.class_embed.bias, -math.log((1 - 0.01) / 0.01))

        self.register_buffer("pixel_mean", torch.tensor(pixel_mean).view(3, 1, 1), False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std).view(3, 1, 1), False)
        # Convolutions are faster so, and their results are tokens without a copy.
        self.to(memory_format=torch.channels_last)

    @classmethod
    def from_config(cls, cfg) -> Dict:
        """Constructor arguments from a yacs config, see `smca.config.add_smca_config`."""
        from ..config import model_arguments

        return model_arguments(cfg)

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def compile(self, **kwargs) -> None:
        """Compile backbone, encoder and decoder in place with ``torch.compile`` and its arguments,
        for images of any size. What is left works on lists of images and on the host."""
        for part in (self.backbone, self.encoder, self.decoder):
            part.compile(**{"dynamic": True, **kwargs})

    def forward(self, batched_inputs: List[Dict]):
        """
        Args:
            batched_inputs: one dict an image: ``image``, (3, height, width) RGB, 0 to 255; in
                training ``instances`` with ``gt_boxes`` (corners, in pixels of ``image``) and
                ``gt_classes``; optionally ``height`` and ``width`` that detections are scaled to.

        Returns:
            In training a dict of weighted losses, whose sum is the objective. Else a list of
            ``{"instances": Instances}`` with ``pred_boxes`` (in pixels of height and width),
            ``scores``, ``pred_classes`` and ``query_indices``, best first.
        """
        images = self.preprocess(batched_inputs)
        predictions = self.predict(self.decode(images))
        if self.training:
            targets = [self._targets(x["instances"]) for x in batched_inputs]
            return self.criterion(*predictions, targets)
        return self.inference(predictions, batched_inputs, images.image_sizes)

    def preprocess(self, batched_inputs: List[Dict]) -> ImageList:
        """Images normalised, then padded at the right and bottom with zeros."""
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
        sizes = [tuple(feature_map.shape[-2:]) for feature_map in maps]
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
        sizes = torch.tensor([(w, h) for h, w in images.image_sizes], dtype=torch.float32)
        sizes = sizes.to(self.device, non_blocking=True)
        return self.decoder(scales, self.query_embed.weight, sizes)

    def predict(self, decoded: DecoderOutput) -> Predictions:
        """Class logits and boxes; the predicted centre is the boxes' starting point."""
        hidden = decoded.hidden if self.training else decoded.hidden[-1:]
        with float32_region(hidden):
            logits = self.class_embed(hidden)
            boxes = self.box_embed(hidden)
            if decoded.reference is not None:
                centre, size = boxes.split(2, dim=-1)
                boxes = torch.cat([centre + decoded.reference, size], dim=-1)
            return Predictions(logits, boxes.sigmoid())

    def inference(
        self, predictions: Predictions, batched_inputs: List[Dict], image_sizes: List[Tuple]
    ) -> List[Dict]:
        """The best of all Q * C pairs of query and class, boxes scaled to the original image.

        Several detections may come from one query; there is no non-maximum suppression, and
        boxes are not clipped to the image (DETR)."""
        scores = predictions.logits[-1].sigmoid().flatten(1)
        scores, indices = scores.topk(min(self.max_detections, scores.shape[1]), dim=1)
        queries, classes = indices // self.num_classes, indices % self.num_classes
        boxes = box_convert(predictions.boxes_cxcywh[-1], "cxcywh", "xyxy")
        results = []
        for image, (item, size) in enumerate(zip(batched_inputs, image_sizes)):
            height, width = item.get("height", size[0]), item.get("width", size[1])
            scale = boxes.new_tensor([width, height, width, height])
            instances = Instances((height, width))
            instances.pred_boxes = Boxes(boxes[image, queries[image]] * scale)
            instances.scores = scores[image]
            instances.pred_classes = classes[image]
            instances.query_indices = queries[image]
            results.append({"instances": instances})
        return results

    def _targets(self, instances: Instances) -> Targets:
        """Labels, and boxes relative to the image."""
        height, width = instances.image_size
        boxes = instances.gt_boxes.tensor.to(self.device, non_blocking=True)
        boxes = box_convert(boxes, "xyxy", "cxcywh")
        size = boxes.new_tensor([width, height, width, height])
        return Targets(instances.gt_classes.to(self.device, non_blocking=True), boxes / size)
