"""SMCA, in miniature, learns one image by heart through the training script's own
ways, and the evaluation gives perfect detections 100 AP."""

import json

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image
from torch import nn

from helpers import arguments, write_dataset, write_smca_config
from smca.engine import main

COLORS = [(230, 60, 40), (40, 90, 230)]
# [x, y, width, height] in pixels, and the category.
OBJECTS = [([6, 6, 18, 22], 1), ([32, 10, 26, 14], 2), ([28, 34, 18, 22], 1)]
NUM_STEPS = 200


def write_image(folder):
    """64 x 64 pixels, three colored boxes on gray."""
    pixels = np.full((64, 64, 3), 120, np.uint8)
    pixels += np.random.default_rng(0).integers(0, 20, pixels.shape, dtype=np.uint8)
    annotations = []
    for n, ((x, y, width, height), category) in enumerate(OBJECTS):
        pixels[y : y + height, x : x + width] = COLORS[category - 1]
        annotation = {"id": n + 1, "image_id": 1, "category_id": category, "iscrowd": 0}
        annotations.append({**annotation, "bbox": OBJECTS[n][0], "area": width * height})
    Image.fromarray(pixels).save(folder / "image.png")
    image = {"id": 1, "file_name": "image.png", "height": 64, "width": 64}
    categories = [{"id": 1, "name": "red"}, {"id": 2, "name": "blue"}]
    data = {"images": [image], "annotations": annotations, "categories": categories, "info": {}}
    (folder / "truth.json").write_text(json.dumps(data))


def datasets(folder):
    """Overrides that train and evaluate on the data in a folder."""
    register = f"{{_target_: smca.data.register_coco, json_file: {folder}/truth.json, "
    register += f"image_root: {folder}}}"
    return [f"+dataloader.{split}.dataset.names={register}" for split in ("train", "test")]


def test_an_image_is_learned_by_heart(tmp_path):
    write_image(tmp_path)
    overrides = [
        *datasets(tmp_path),
        "model.num_classes=2",
        "model.embed_dim=32",
        "model.num_queries=8",
        "model.dropout=0",
        "model.encoder.ffn_dim=64",
        "model.decoder.ffn_dim=64",
        "model.decoder.num_heads=4",
        "dataloader.train.mapper.augmentations={short_sides: [64], flip: false}",
        "dataloader.train.mapper.augmentations_with_crop=null",
        "dataloader.test.mapper.augmentations.short_sides=64",
        "dataloader.train.total_batch_size=1",
        "dataloader.train.num_workers=0",
        "optimizer.lr=1e-3",
        "optimizer.params.lr_factor_func.factor=1.0",
        "+lr_multiplier._target_=fvcore.common.param_scheduler.CosineParamScheduler",
        "+lr_multiplier.start_value=1.0",
        "+lr_multiplier.end_value=0.01",
        f"train.max_iter={NUM_STEPS}",
        "train.eval_period=0",
        "train.log_period=1000",
        "train.checkpointer.period=1000",
        "train.clip_grad_norm=1.0",
    ]
    config = write_smca_config(tmp_path, "smca_single_scale")
    results = main(arguments("--config-file", config, *overrides))
    assert results["bbox"]["AP"] > 99.9


# Perfect detections


class Oracle(nn.Module):
    """
    Detects what the annotations say, moved to the right.

    Args:
        json_file: in COCO's format. shift: of the boxes' widths.
    """

    def __init__(self, json_file, shift, num_classes):
        super().__init__()
        self.register_buffer("shift", torch.tensor(float(shift)))
        with open(json_file) as file:
            self.annotations = json.load(file)["annotations"]

    def forward(self, batch):
        return [{"instances": self.detect(x)} for x in batch]

    def detect(self, item):
        result = Instances((item["height"], item["width"]))
        found = [a for a in self.annotations if a["image_id"] == item["image_id"]]
        x, y, width, height = torch.tensor([a["bbox"] for a in found]).float().unbind(-1)
        x = x + self.shift * width
        result.pred_boxes = Boxes(torch.stack([x, y, x + width, y + height], -1))
        result.scores = torch.full((len(found),), 0.9)
        result.pred_classes = torch.tensor([a["category_id"] - 1 for a in found])
        return result


@pytest.fixture
def command(tmp_path):
    """Arguments that evaluate an `Oracle` of several images, but for its shift."""
    write_dataset(tmp_path)
    config = write_smca_config(tmp_path, "smca")
    model = {"json_file": f"{tmp_path}/truth.json", "shift": "???", "num_classes": 2}
    with open(config, "a") as file:
        file.write("from detectron2.config import LazyCall as L\n")
        file.write("from test_learning import Oracle\n")
        file.write(f"model = L(Oracle)(**{model!r})\n")
    weights = tmp_path / "oracle.pth"
    torch.save({"model": {"shift": torch.tensor(0.0)}}, weights)
    overrides = [*datasets(tmp_path), f"train.init_checkpoint={weights}"]
    return ["--config-file", config, "--eval-only", *overrides]


def test_displaced_detections_have_the_ap_of_their_overlap(command, tmp_path):
    # By a tenth of the width: the intersection over union is 0.9 / 1.1 = 0.82, which is enough at
    # 0.5, 0.55, ... 0.8, 7 of the 10 thresholds.
    weights = tmp_path / "displaced.pth"
    torch.save({"model": {"shift": torch.tensor(0.1)}}, weights)
    results = main(arguments(*command, "model.shift=0", f"train.init_checkpoint={weights}"))
    assert results["bbox"]["AP"] == pytest.approx(70)
    assert results["bbox"]["AP50"] == pytest.approx(100)
