"""A tiny SMCA with random weights, its config and images, for the tests of demo and pictures."""

import textwrap
from pathlib import Path

import numpy as np
import torch
from detectron2.config import LazyConfig, instantiate
from PIL import Image

from modeling_cases import randomize

ROOT = Path(__file__).parents[1]
CLASS_NAMES = ["round", "square", "long"]

_CONFIG = """
    from detectron2.config import LazyConfig

    common = "{root}/configs/common/"
    model = LazyConfig.load(common + "models/{base}.py").model
    dataloader = LazyConfig.load(common + "coco.py").dataloader
    optimizer = LazyConfig.load(common + "optimizer.py").optimizer
    train = LazyConfig.load(common + "train.py").train

    model.backbone.update(depth=18, num_blocks=[1, 1, 1, 1], norm="GN", freeze_at=0)
    model.update(embed_dim=16, num_classes=3, num_queries=6)
    model.encoder.update(pattern="I", ffn_dim=16, num_heads=2)
    model.decoder.update(num_layers=2, ffn_dim=16, num_heads=2)
    model.decoder.update({decoder!r})
    dataloader.test.mapper.augmentations.update(short_sides=96, max_size=160)
    dataloader.test.num_workers = 0
    dataloader.test.dataset.names = "smca_shapes_val"
    optimizer.lr = 1e-4
    lr_multiplier = dict()
    train.update(device="cpu", output_dir="{folder}/run")
"""


def write_config(folder, base="smca", **decoder):
    """A LazyConfig of a tiny variant of configs/common/models/{base}.py; changes of its decoder."""
    path = folder / f"tiny_{base}.py"
    text = _CONFIG.format(root=ROOT, base=base, folder=folder, decoder=decoder)
    path.write_text(textwrap.dedent(text))
    return str(path)


def make_model(config):
    """Its scores are on both sides of 1/2, and no spread or scale weight is at its start."""
    model = randomize(instantiate(LazyConfig.load(config).model)).eval()
    with torch.no_grad():
        model.class_embed.bias.zero_()
        model.class_embed.weight.mul_(4)
        for layer in model.decoder.layers:
            if layer.modulation is not None and layer.modulation.spread is not None:
                layer.modulation.spread.weight.mul_(0.3)
    return model


def write_weights(folder, config, **others):
    path = folder / "tiny.pth"
    torch.save({"model": make_model(config).state_dict(), **others}, path)
    return str(path)


def make_image(height=90, width=120, seed=0):
    """A random uint8 RGB image."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def write_image(path, *args, **kwargs):
    """Lossless, so that what is read is what was made."""
    image = make_image(*args, **kwargs)
    Image.fromarray(image).save(path)
    return image
