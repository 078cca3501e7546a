#!/usr/bin/env python3
"""Train Hugging Face's DETR from random weights on drawn shapes, with SMCA's weight maps and as it
is, and print both validation losses; see docs/plug_in.md.

    python tools/train_plug_in.py
"""

import argparse
import sys
from typing import Any, Dict, List

from smca.data import draw_scene
from smca.errors import exit_code

import numpy as np
import torch
from torchvision.ops import box_convert, masks_to_boxes
from tqdm import tqdm, trange
from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

from benchmark import device_name
from figures import Table, command_line, markdown, write_figures
from plug_in_example import ModulatedDetr

SIDE = 160  # pixels that a batch is padded to
PARTS = {"loss_ce": "class loss", "loss_bbox": "L1", "loss_giou": "1 - GIoU"}


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


def train(args: argparse.Namespace, plain: bool) -> Dict[int, List[str]]:
    """Train DETR, `plain` or with weight maps.

    Returns:
        At each evaluation, by its step, the validation loss of each of `PARTS`.
    """
    torch.manual_seed(args.seed)
    model = make_detr()
    if not plain:
        model = ModulatedDetr(model, spread=args.spread, beta=2.0)
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
            with tqdm.external_write_mode():
                print(f"{name}, step {step}: {dict(zip(PARTS, found[step]))}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=350)
    parser.add_argument("--period", type=int, default=50, help="steps between evaluations")
    parser.add_argument("--spread", default="independent", help="the maps' shape")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the losses as JSON")
    args = parser.parse_args()

    ours, plain = (train(args, plain) for plain in (False, True))
    columns = ["step", *PARTS.values(), *(f"{label}, plain" for label in PARTS.values())]
    rows = [[str(step), *ours[step], *plain[step]] for step in ours]
    print(markdown(Table(columns, rows)))
    if args.output:
        where = f"{device_name('cpu')}, torch {torch.__version__}"
        write_figures(
            args.output, command_line(__file__, sys.argv[1:]), columns, rows, machine=where
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
