#!/usr/bin/env python3
"""Train Hugging Face's DETR from random weights on drawn shapes, with SMCA's weight maps or as it
is, and print its validation loss; see docs/plug_in.md.

    python tools/train_plug_in.py            # with weight maps
    python tools/train_plug_in.py --plain    # DETR alone
"""

import argparse
import time
from typing import Any, Dict

from smca.data import draw_scene

import numpy as np
import torch
from torchvision.ops import box_convert, masks_to_boxes
from tqdm import tqdm, trange
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from plug_in_example import ModulatedDetr

SIDE = 160  # pixels that a batch is padded to
PARTS = ("loss_ce", "loss_bbox", "loss_giou")


def make_detr(**settings: Any) -> DetrForObjectDetection:
    """A small DETR with random weights, nothing of it frozen."""
    resnet = ResNetConfig(
        embedding_size=32,
        hidden_sizes=[32, 64],
        depths=[1, 1],
        layer_type="basic",
        out_features=["stage2"],  # stride 8
    )
    defaults = dict(
        num_labels=3,
        num_queries=20,
        d_model=64,
        encoder_layers=1,
        decoder_layers=2,
        encoder_ffn_dim=128,
        decoder_ffn_dim=128,
        dropout=0.0,
        auxiliary_loss=True,
    )
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plain", action="store_true", help="DETR without weight maps")
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--period", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--spread", default="independent", help="the maps' shape")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    model = make_detr()
    if not args.plain:
        model = ModulatedDetr(model, spread=args.spread, beta=2.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    validation = [make_batch(np.random.default_rng(10**6 + index)) for index in range(8)]
    rng, start = np.random.default_rng(args.seed), time.perf_counter()
    for step in trange(1, args.steps + 1, unit="step", disable=None):
        optimizer.param_groups[0]["lr"] = args.lr * min(1, step / 100)
        optimizer.zero_grad()
        model(**make_batch(rng)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        if step % args.period == 0:
            with torch.no_grad():
                losses = [model(**batch).loss_dict for batch in validation]
            means = {key: float(torch.stack([x[key] for x in losses]).mean()) for key in PARTS}
            numbers = "  ".join(f"{key} {value:.3f}" for key, value in means.items())
            seconds = time.perf_counter() - start
            with tqdm.external_write_mode():
                print(f"step {step}  {numbers}  ({seconds:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
