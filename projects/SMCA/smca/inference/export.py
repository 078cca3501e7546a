"""A trained detector as a graph that runs without this package: ONNX or PyTorch's own .pt2."""

import copy

import torch
from detectron2.structures import ImageList
from torch import Tensor, nn

from smca.modeling import SMCA
from smca.modeling.backbone import FrozenNormConv2d
from smca.modeling.scales import padding_mask
from typing import Tuple


class ExportableDetector(nn.Module):
    def __init__(self, model: SMCA, image_format: str = "RGB"):
        super().__init__()
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.model.criterion = None
        for module in self.model.modules():
            if isinstance(module, FrozenNormConv2d):
                module.absorb_norm()
        self.reverse_channels = image_format == "BGR"

    def forward(self, images: Tensor, image_sizes: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        model = self.model
        if self.reverse_channels:
            images = images.flip(1)
        size = images.shape[-2:]
        padding = padding_mask(image_sizes, size, size)[:, None]
        images = ((images - model.pixel_mean) / model.pixel_std).masked_fill(padding, 0)
        decoded = model.decode(ImageList(images, image_sizes))
        boxes, scores, labels, _ = model.best(model.predict(decoded))
        scale = image_sizes.flip(1).repeat(1, 2)[:, None]
        return boxes * scale, scores, labels
