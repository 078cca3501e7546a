#!/usr/bin/env python3
"""
Train a config's backbone from random weights to tell the classes of the embedded data set's
objects, as backbones for COCO are trained on ImageNet, and write a file for train.init_checkpoint:

    train_backbone.py configs/convergence/pretrained_single_scale.py

The objects are cut out of pictures that no training of a detector sees (another seed).
"""

import argparse
import itertools
import os
from typing import List, Optional, Sequence, Tuple

from smca.checkpoint.files import write_atomically
from smca.config import load_config
from smca.data import SHAPE_CLASSES, register_shapes
from smca.errors import UserError, at_least, command_line, exit_code

import torch
import torch.nn.functional as F
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import Backbone
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

SIDE = 64  # pixels of an object's picture
_BATCH = 64  # objects of a step
_CONTEXT = 1.5  # side of the square that is cut out, in long sides of the object's box


class ObjectPictures(Dataset[Tuple[Tensor, int]]):
    """Each object of a data set as (3, S, S) RGB from 0 to 255, and its class.

    Args:
        name: of a registered data set.
        augment: another size, place and mirror image of an object each time.
    """

    def __init__(self, name: str, augment: bool) -> None:
        self.pictures: List[Image.Image] = []
        self.classes: List[int] = []
        for record in DatasetCatalog.get(name):
            image = Image.open(record["file_name"]).convert("RGB")
            for annotation in record["annotations"]:
                x, y, width, height = annotation["bbox"]
                half = max(width, height) * _CONTEXT / 2
                x, y = x + width / 2, y + height / 2
                square = tuple(round(v) for v in (x - half, y - half, x + half, y + half))
                picture = image.crop(square).resize((2 * SIDE, 2 * SIDE))
                self.pictures.append(picture)
                self.classes.append(annotation["category_id"])
        random = [
            v2.RandomResizedCrop(SIDE, scale=(0.3, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
        self.transform = v2.Compose(
            [v2.PILToTensor(), *(random if augment else [v2.Resize((SIDE, SIDE), antialias=True)])]
        )

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> Tuple[Tensor, int]:
        return self.transform(self.pictures[index]).float(), self.classes[index]


class Classifier(nn.Module):
    """The mean of a backbone's feature map, and a linear layer.

    Args:
        backbone: Detectron2's.
        feature: name of the feature map.
        mean, std: of red, green and blue, from 0 to 255.
    """

    def __init__(
        self, backbone: Backbone, feature: str, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        super().__init__()
        self.backbone, self.feature = backbone, feature
        channels = backbone.output_shape()[feature].channels
        self.linear = nn.Linear(channels, len(SHAPE_CLASSES))
        self.normalize = v2.Normalize(mean, std)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> (B, C) logits"""
        features = self.backbone(self.normalize(images))[self.feature]
        return self.linear(features.mean(dim=(2, 3)))


@torch.no_grad()
def accuracy(model: Classifier, loader: DataLoader) -> float:
    model.eval()
    correct = [(model(images).argmax(dim=1) == classes) for images, classes in loader]
    model.train()
    return float(torch.cat(correct).float().mean())


def run(args: argparse.Namespace) -> int:
    cfg = load_config(args.config_file, ["model.backbone.freeze_at=0", *args.opts]).model
    torch.manual_seed(args.seed)
    lengths = tuple(args.lengths)
    train_name, val_name = register_shapes(
        args.images, args.images // 10, seed=args.seed, prefix="backbone", lengths=lengths
    )
    objects, held_out = ObjectPictures(train_name, True), ObjectPictures(val_name, False)
    if len(objects) < _BATCH or not len(held_out):
        raise UserError(
            f"--images {args.images} is too few: a step takes {_BATCH} objects, and a tenth of the "
            "images is held out."
        )
    loader = DataLoader(objects, _BATCH, shuffle=True, drop_last=True)
    val_loader = DataLoader(held_out, _BATCH)
    model = Classifier(
        instantiate(cfg.backbone), cfg.in_features[-1], list(cfg.pixel_mean), list(cfg.pixel_std)
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    batches = itertools.islice(epochs, args.steps)
    for images, classes in tqdm(batches, total=args.steps, unit="step", disable=None):
        loss = F.cross_entropy(model(images), classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    print(f"{accuracy(model, val_loader):.1%} of {len(held_out)} objects are told apart.")
    weights = {f"backbone.{name}": value for name, value in model.backbone.state_dict().items()}
    os.makedirs(os.path.dirname(args.output) or ".", exist_ok=True)
    write_atomically(args.output, lambda file: torch.save({"model": weights}, file))
    print(f"Written: {args.output}")
    return 0


def get_parser() -> argparse.ArgumentParser:
    parser = command_line(__doc__)
    add = parser.add_argument
    add("config_file", metavar="CONFIG", help="whose backbone it is")
    add("--output", metavar="FILE", default="output/backbones/shapes_10x.pth")
    add("--images", type=int, default=2000, metavar="N", help="to draw; default: %(default)s")
    add("--steps", type=at_least(1), default=1500, help="of 64 objects; default: %(default)s")
    add("--lr", type=float, default=1e-3, help="highest rate; default: %(default)s")
    add("--seed", type=int, default=1000, help="of pictures and weights; default: %(default)s")
    lengths = "shortest and longest object in pixels; default: %(default)s"
    add("--lengths", type=int, nargs=2, default=(12, 120), metavar="N", help=lengths)
    add("opts", nargs="*", metavar="key=value", help="overrides of the config")
    return parser


def main(argv: Optional[Sequence[str]] = None) -> int:
    return exit_code(run, get_parser().parse_args(argv))


if __name__ == "__main__":
    raise SystemExit(main())
