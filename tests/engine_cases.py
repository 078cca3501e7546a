"""A detector, a data set and a config that are as small as they can be, for the engine's tests."""

import json
import textwrap

import numpy as np
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn
from torch.nn import functional as F


class TinyDetector(nn.Module):
    """
    Says from the mean colours of an image which box there is; with everything that makes
    resuming hard: dropout, batch norm, and losses that depend on the random state.
    """

    def __init__(self, num_classes=2, width=8, dropout=0.1, batch_norm=True):
        super().__init__()
        norm = nn.BatchNorm2d(width) if batch_norm else nn.Identity()
        self.backbone = nn.ModuleDict({"stem": nn.Conv2d(3, width, 3, 2), "norm": norm})
        self.class_embed = nn.Linear(width, num_classes)
        self.bbox_embed = nn.Linear(width, 4)
        self.dropout = nn.Dropout(dropout)
        self.num_classes = num_classes

    def forward(self, batch):
        device = self.class_embed.weight.device
        images = [x["image"].to(device)[:, :16, :16].float() / 255 for x in batch]
        features = self.backbone["norm"](self.backbone["stem"](torch.stack(images)))
        features = self.dropout(features.relu().mean((2, 3)))
        logits, boxes = self.class_embed(features), self.bbox_embed(features).sigmoid()
        return self.losses(batch, logits, boxes) if self.training else self.detect(batch, logits)

    def losses(self, batch, logits, boxes):
        truth = [x["instances"] for x in batch]
        classes = torch.stack([t.gt_classes[0] for t in truth]).to(logits.device)
        corners = torch.stack([t.gt_boxes.tensor[0] for t in truth]).to(logits.device) / 32
        return {
            "loss_ce": F.cross_entropy(logits.float(), classes),
            "loss_bbox": F.l1_loss(boxes.float(), corners),
        }

    def detect(self, batch, logits):
        results = []
        for x, scores in zip(batch, logits.softmax(-1)):
            boxes = torch.tensor([[4.0, 4.0, 20.0, 20.0]] * self.num_classes)
            results.append(
                Instances(
                    (x["height"], x["width"]),
                    pred_boxes=Boxes(boxes),
                    scores=scores.cpu(),
                    pred_classes=torch.arange(self.num_classes),
                )
            )
        return [{"instances": result} for result in results]


class MeanLoss(nn.Module):
    """A linear layer whose loss is the mean over the batch, a tensor (N, 3)."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, batch):
        return {"loss": self.layer(batch).float().square().mean()}


def write_dataset(folder, num_images=8):
    """Random 32 x 32 images with one box each, as files and COCO JSON."""
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for n in range(num_images):
        name = f"{n}.png"
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / name)
        images.append({"id": n + 1, "file_name": name, "height": 32, "width": 32})
        annotations.append(
            {
                "id": n + 1,
                "image_id": n + 1,
                "category_id": 1 + n % 2,
                "bbox": [4 + n % 3, 4, 16, 16],
                "area": 256,
                "iscrowd": 0,
            }
        )
    categories = [{"id": 1, "name": "round"}, {"id": 2, "name": "square"}]
    data = {"images": images, "annotations": annotations, "categories": categories, "info": {}}
    (folder / "truth.json").write_text(json.dumps(data))


def write_config(folder, **changes):
    """
    A LazyConfig for :class:`TinyDetector` on :func:`write_dataset`, in `folder`.

    Args:
        changes: of ``train``, e.g. ``max_iter=4``.
    """
    write_dataset(folder)
    text = f"""
        import detectron2.data.transforms as T
        import torch
        from detectron2.config import LazyCall as L
        from detectron2.data import (
            DatasetCatalog, DatasetMapper, build_detection_test_loader, get_detection_dataset_dicts
        )
        from detectron2.data.datasets import register_coco_instances
        from detectron2.evaluation import COCOEvaluator
        from detectron2.solver.build import get_default_optimizer_params
        from fvcore.common.param_scheduler import MultiStepParamScheduler

        from engine_cases import TinyDetector
        from smca.configs.common.train import train as default_train
        from smca.data.loader import build_train_loader

        name = "engine_cases:{folder}"
        if name not in DatasetCatalog:
            register_coco_instances(name, {{}}, "{folder}/truth.json", "{folder}")

        model = L(TinyDetector)(num_classes=2)
        dataloader = dict(
            train=L(build_train_loader)(
                dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
                mapper=L(DatasetMapper)(
                    is_train=True,
                    image_format="RGB",
                    augmentations=[L(T.RandomFlip)(), L(T.RandomBrightness)(
                        intensity_min=0.5, intensity_max=1.5)],
                ),
                total_batch_size=4,
                num_workers=0,
                seed="${{train.seed}}",
            ),
            test=L(build_detection_test_loader)(
                dataset=L(get_detection_dataset_dicts)(names=name, filter_empty=False),
                mapper=L(DatasetMapper)(is_train=False, image_format="RGB", augmentations=[]),
                num_workers=0,
            ),
            evaluator=L(COCOEvaluator)(dataset_name=name),
        )
        optimizer = L(torch.optim.AdamW)(
            params=L(get_default_optimizer_params)(base_lr="${{..lr}}"), lr=1e-2
        )
        lr_multiplier = L(MultiStepParamScheduler)(values=[1.0, 0.1], milestones=[2, 4])
        train = dict(default_train)
        train.update(output_dir="{folder}/run", device="cpu", max_iter=4, eval_period=2)
        train.update(log_period=1, checkpointer=dict(period=2, max_to_keep=5))
        train.update(model_ema=dict(enabled=True, decay=0.9))
        train.update({changes!r})
    """
    path = folder / "config.py"
    path.write_text(textwrap.dedent(text))
    return str(path)
