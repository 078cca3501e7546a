#!/usr/bin/env python3
"""SMCA's weight maps inside Hugging Face's DETR; see docs/plug_in.md.

    python tools/plug_in_example.py

trains a small DETR from random weights on drawn shapes, with weight maps and as it is, and prints
the validation losses of both as a table in Markdown.
"""

import argparse
import sys
from types import SimpleNamespace
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

from smca.data import draw_scene
from smca.errors import at_least, command_line, exit_code
from smca.modeling.weight_map import Modulation, WeightMapPredictor

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.ops import MLP, box_convert, masks_to_boxes
from tqdm import trange

try:
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig
    from transformers.models.detr.modeling_detr import DetrObjectDetectionOutput
except ImportError as missing:
    sys.exit(f"Error: {missing}: install this package with the extra 'plug_in'.")

SIDE = 160  # pixels that a batch is padded to
PARTS = {"loss_ce": "class loss", "loss_bbox": "L1", "loss_giou": "1 - GIoU"}


class ModulatedDetr(nn.Module):
    """A DETR whose cross-attention adds the logarithms of weight maps to its logits.

    Args:
        detr: with random or trained weights; it gets hooks, and is otherwise as it was.
        settings: the arguments of `Modulation`: map, per_head, beta.
    """

    def __init__(self, detr: DetrForObjectDetection, **settings: Any):
        super().__init__()
        self.detr, width, layers = detr, detr.config.d_model, detr.model.decoder.layers
        sizes = dict(embed_dim=width, num_heads=detr.config.decoder_attention_heads)
        modulation = Modulation(**settings)
        self.center = MLP(width, [width, width, 2])
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in layers)
        self.predictors = nn.ModuleList(WeightMapPredictor(modulation, **sizes) for _ in layers)
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


# ---- A short training


def make_detr(**settings: Any) -> DetrForObjectDetection:
    """A small DETR with random weights, nothing of it frozen."""
    resnet = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],  # stride 8
    )
    defaults: Dict[str, Any] = dict(num_labels=3, num_queries=20, d_model=64)
    defaults.update(encoder_layers=1, decoder_layers=2, encoder_ffn_dim=128, decoder_ffn_dim=128)
    defaults.update(dropout=0.0, auxiliary_loss=True)
    config = DetrConfig(backbone_config=resnet, use_timm_backbone=False, **{**defaults, **settings})
    return DetrForObjectDetection(config).requires_grad_(True)


def make_batch(rng: np.random.Generator, batch_size: int = 4) -> Dict:
    """New scenes, padded; the arguments of `DetrForObjectDetection`."""
    pixels = torch.zeros(batch_size, 3, SIDE, SIDE)
    mask, labels = torch.zeros(batch_size, SIDE, SIDE, dtype=torch.int64), []
    for index in range(batch_size):
        scene = draw_scene(rng)
        height, width = scene.image.shape[:2]
        image = torch.tensor(scene.image).permute(2, 0, 1)
        pixels[index, :, :height, :width] = (image - 128.0) / 64
        mask[index, :height, :width] = 1
        # The last pixel of an object belongs to its box.
        boxes = masks_to_boxes(torch.from_numpy(np.stack(scene.masks)))
        boxes = boxes + torch.tensor([0, 0, 1, 1])
        boxes = box_convert(boxes, "xyxy", "cxcywh") / torch.tensor([width, height] * 2)
        labels.append({"class_labels": torch.tensor(scene.classes), "boxes": boxes})
    return dict(pixel_values=pixels, pixel_mask=mask, labels=labels)


def train(args: argparse.Namespace, plain: bool) -> Dict[int, List[str]]:
    """Train DETR, `plain` or with weight maps.

    Returns:
        At each evaluation, by its step, the validation loss of each of `PARTS`.
    """
    torch.manual_seed(args.seed)
    model: Any = make_detr()
    if not plain:
        model = ModulatedDetr(model, map=args.map, beta=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    validation = [make_batch(np.random.default_rng(10**6 + index)) for index in range(8)]
    rng, found = np.random.default_rng(args.seed), {}
    name = "plain" if plain else "with weight maps"
    for step in trange(1, args.steps + 1, desc=name, unit="step", disable=None):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 100)
        optimizer.zero_grad()
        model(**make_batch(rng)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if step % args.period == 0:
            with torch.no_grad():
                losses = [model(**batch).loss_dict for batch in validation]
            means = [torch.stack([x[key] for x in losses]).mean() for key in PARTS]
            found[step] = [f"{mean:.3f}" for mean in means]
    return found


def main(argv: Optional[Sequence[str]] = None) -> None:
    """Run the command line."""
    parser = command_line(__doc__)
    parser.add_argument("--steps", type=at_least(1), default=350)
    parser.add_argument("--period", type=at_least(1), default=50, help="steps between evaluations")
    parser.add_argument("--map", default="independent", help="the shape of the maps")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    ours, plain = (train(args, plain) for plain in (False, True))
    headers = ["step", *PARTS.values(), *(f"{label}, plain" for label in PARTS.values())]
    rows = [[str(step), *ours[step], *plain[step]] for step in ours]
    print(tabulate(rows, headers, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    sys.exit(exit_code(main))
