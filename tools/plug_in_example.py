"""SMCA's weight maps inside Hugging Face's DETR; see docs/plug_in.md."""

from types import SimpleNamespace
from typing import Any, Callable, Dict, Optional, Sequence, Tuple

from smca.modeling.weight_map import WeightMapPredictor

import torch
from torch import Tensor, nn
from torchvision.ops import MLP
from transformers import DetrForObjectDetection
from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput


class ModulatedDetr(nn.Module):
    """A DETR whose cross-attention adds the logarithms of weight maps to its logits.

    Args:
        detr: with random or trained weights; it gets hooks, and is otherwise as it was.
        settings: of `WeightMapPredictor`: modulation, spread, beta.
    """

    def __init__(self, detr: DetrForObjectDetection, **settings: Any):
        super().__init__()
        self.detr, width, layers = detr, detr.config.d_model, detr.model.decoder.layers
        settings.update(embed_dim=width, num_heads=detr.config.decoder_attention_heads)
        self.center = MLP(width, [width, width, 2])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.predictors = nn.ModuleList(WeightMapPredictor(**settings) for _ in layers)
        detr.model.backbone.register_forward_hook(self._keep_grid)
        for *parts, layer in zip(self.norms, self.predictors, layers):
            layer.register_forward_pre_hook(self._modulate(*parts), with_kwargs=True)
        detr.bbox_predictor.register_forward_hook(self._add_center)

    def forward(
        self, pixel_values: Tensor, pixel_mask: Tensor, labels: Optional[Sequence[Dict]] = None
    ) -> DetrObjectDetectionOutput:
        """As of `DetrForObjectDetection`; pixel_mask (B, H, W) is 1 on the image."""
        sizes = [pixel_mask[:, 0].sum(1), pixel_mask[:, :, 0].sum(1)]  # without padding
        self.sizes = torch.stack(sizes, dim=1)[:, None]
        self.reference: Any = None  # a Tensor once the first layer has it
        return self.detr(pixel_values=pixel_values, pixel_mask=pixel_mask, labels=labels)

    def _keep_grid(self, module: nn.Module, inputs: Tuple, features: Sequence) -> None:
        height, width = features[-1][0].shape[-2:]
        stride = round(inputs[0].shape[-1] / width)
        self.grid = SimpleNamespace(size=(height, width), stride=stride)

    def _modulate(self, norm: nn.Module, predictor: nn.Module) -> Callable:
        def before_layer(layer: nn.Module, args: Tuple, kwargs: Dict) -> Tuple[Tuple, Dict]:
            queries, mask = norm(args[0] + args[3]), kwargs["encoder_attention_mask"]
            if self.reference is None:  # in the first layer
                self.reference = self.center(queries)
            center = self.reference.sigmoid() * self.sizes
            (weight_map,) = predictor(queries, center, [self.grid])
            bias = weight_map.log_weights().flatten(3)  # (B, H, Q, S)
            bias = bias if mask is None else bias.masked_fill(~mask, -torch.inf)
            return args, {**kwargs, "encoder_attention_mask": bias}

        return before_layer

    def _add_center(self, module: nn.Module, inputs: Tuple, boxes: Tensor) -> Tensor:
        return torch.cat([boxes[..., :2] + self.reference, boxes[..., 2:]], dim=-1)
