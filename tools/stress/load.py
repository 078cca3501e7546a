#!/usr/bin/env python3
"""Load: many steps, many images and a large image, in one process on the CPU.

    python tools/stress/load.py --steps 10000 --images 5000

Trains the smallest model for so many steps, evaluates it on so many images, and detects in an image
of 4000 x 3000 pixels. Prints memory, open files and time of each tenth; the exit code is 1 where
they grow.
"""

import argparse
import itertools
import os
import resource
import sys
import time
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

from smca.config import get_config
from smca.data import detr_augmentations
from smca.engine.storage import BoundedStorage
from smca.engine.trainer import Trainer
from smca.errors import exit_code
from smca.inference import Predictor

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes, Instances
from torch import nn

__all__ = ["Usage", "evaluate", "grows", "small_model", "train"]

_OVERRIDES = [
    "model.backbone.depth=18",
    "model.backbone.num_blocks=[1,1,1,1]",
    "+model.backbone.width=16",
    "model.embed_dim=16",
    "model.num_queries=6",
    "model.num_classes=3",
    "model.encoder.pattern=I",
    "model.encoder.ffn_dim=16",
    "model.encoder.num_heads=2",
    "model.decoder.num_layers=2",
    "model.decoder.ffn_dim=16",
    "model.decoder.num_heads=2",
]
# Of the second half over the first: what the allocator and a busy machine do.
_MEMORY_SLACK_MB, _TIME_SLACK = 50.0, 1.5


class Usage(NamedTuple):
    """After a tenth of the work: resident memory in MiB, open files, median seconds a step."""

    memory_mb: float
    files: int
    seconds: float


def small_model() -> nn.Module:
    """A single-scale SMCA, random."""
    torch.manual_seed(0)
    config = get_config("smca_single_scale_r50_50ep")
    return instantiate(LazyConfig.apply_overrides(config, _OVERRIDES).model)


def grows(usages: List[Usage]) -> List[str]:
    """What is greater at the end than in the middle, in words; the first half is for warming up."""
    middle, last = usages[len(usages) // 2], usages[-1]
    found = []
    if last.memory_mb > middle.memory_mb + _MEMORY_SLACK_MB:
        found.append(f"memory from {middle.memory_mb:.0f} to {last.memory_mb:.0f} MiB")
    if last.files > middle.files:
        found.append(f"open files from {middle.files} to {last.files}")
    fastest = [min(u.seconds for u in half) for half in (usages[:5], usages[5:])]
    if fastest[1] > _TIME_SLACK * fastest[0]:
        found.append(f"time from {fastest[0]:.4f} to {fastest[1]:.4f} s")
    return found


def _usage(seconds: List[float]) -> Usage:
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    memory = pages * resource.getpagesize() / 2**20
    return Usage(memory, len(os.listdir("/proc/self/fd")), float(np.median(seconds)))


def _measure(step: Callable[[], Any], num_steps: int) -> List[Usage]:
    usages, seconds = [], []
    for index in range(num_steps):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
        if (index + 1) % max(num_steps // 10, 1) == 0:
            usages.append(_usage(seconds))
            print(f"  {index + 1:6d}: {usages[-1]._asdict()}", flush=True)
            seconds = []
    return usages


def _batches(num_images: int = 2) -> Iterator[List[Dict[str, Any]]]:
    """Images of sizes and numbers of objects that change from step to step."""
    generator = np.random.default_rng(0)
    while True:
        batch = []
        for _ in range(num_images):
            height, width = generator.integers(32, 65, 2).tolist()
            count = int(generator.integers(0, 5))
            corners = torch.from_numpy(generator.random((count, 2, 2))).float().sort(dim=1).values
            instances = Instances((height, width))
            instances.gt_boxes = Boxes(corners.flatten(1) * torch.tensor([width, height] * 2))
            instances.gt_classes = torch.from_numpy(generator.integers(0, 3, count))
            pixels = generator.integers(0, 256, (3, height, width), dtype=np.uint8)
            batch.append({"image": torch.from_numpy(pixels), "instances": instances})
        yield batch


def train(num_steps: int) -> List[Usage]:
    """Steps of the trainer, with its metrics."""
    model = small_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    trainer = Trainer(model, _batches(), optimizer, clip_grad_norm=0.1)
    with BoundedStorage() as trainer.storage:

        def step() -> None:
            trainer.iter = next(counter)
            trainer.storage.iter = trainer.iter
            trainer.run_step()

        counter = itertools.count()
        return _measure(step, num_steps)


def evaluate(num_images: int) -> List[Usage]:
    """Inference on image after image; the detections are kept, as an evaluator does."""
    model, batches, kept = small_model().eval(), _batches(1), []

    @torch.no_grad()
    def step() -> None:
        (output,) = model(next(batches))
        kept.append(output["instances"])

    return _measure(step, num_images)


def large_image() -> None:
    """4000 x 3000 pixels, as they are and at the size of evaluation."""
    image = np.random.default_rng(0).integers(0, 256, (3000, 4000, 3), dtype=np.uint8)
    for words, augmentations in (
        ("scaled to 1066 x 800", detr_augmentations(800, flip=False)),
        ("as it is", []),
    ):
        start = time.perf_counter()
        found = Predictor.from_model(small_model(), augmentations)(image, threshold=0)
        assert found.image_size == (3000, 4000) and torch.isfinite(found.pred_boxes.tensor).all()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        seconds = time.perf_counter() - start
        print(f"4000 x 3000 pixels {words}: {seconds:.1f} s, peak {peak:.0f} MiB", flush=True)


def main(argv: Optional[List[str]] = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--steps", type=int, default=10000, help="at least 10")
    parser.add_argument("--images", type=int, default=5000, help="at least 10")
    args = parser.parse_args(argv)
    found = []
    for words, work, count in (("steps", train, args.steps), ("images", evaluate, args.images)):
        print(f"{count} {words}", flush=True)
        found += [f"{words}: {text}" for text in grows(work(count))]
    large_image()
    print("Grows: " + "; ".join(found) if found else "Nothing grows.")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(exit_code(main))
