"""SMCA, in miniature, learns one image by heart through the training script's own ways."""

from PIL import Image

from helpers import arguments, write_coco, write_smca_config
from smca.engine import main

COLORS = [(230, 60, 40), (40, 90, 230)]
# [x, y, width, height] in pixels, and the category.
OBJECTS = [([6, 6, 18, 22], 1), ([32, 10, 26, 14], 2), ([28, 34, 18, 22], 1)]
NUM_STEPS = 200


def write_picture(folder):
    """64 x 64 pixels, three colored boxes on gray."""
    picture, annotations = Image.new("RGB", (64, 64), (120, 120, 120)), []
    for n, ((x, y, width, height), category) in enumerate(OBJECTS):
        picture.paste(COLORS[category - 1], (x, y, x + width, y + height))
        annotation = {"id": n + 1, "image_id": 1, "category_id": category, "iscrowd": 0}
        annotations.append({**annotation, "bbox": OBJECTS[n][0], "area": width * height})
    write_coco(folder / "truth.json", folder, annotations, {1: "red", 2: "blue"}, [1], (64, 64))
    picture.save(folder / "1.png")


def test_an_image_is_learned_by_heart(tmp_path):
    write_picture(tmp_path)
    register = f"{{_target_: smca.data.register_coco, json_file: {tmp_path}/truth.json, "
    register += f"image_root: {tmp_path}}}"
    overrides = [
        *(f"+dataloader.{split}.dataset.names={register}" for split in ("train", "test")),
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
