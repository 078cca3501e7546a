"""What the paper's configs say, from the paper and its published recipe. (What a training does with
it is in test_wiring.py.)"""

from pathlib import Path

import pytest
from detectron2.config import get_cfg, instantiate
from omegaconf import DictConfig, OmegaConf

from smca import add_smca_config, model_zoo

R50, R101 = (f"detectron2://ImageNetPretrained/torchvision/R-{depth}.pkl" for depth in (50, 101))

# The paper's model and recipe: each key, and what has none is None.
PAPER = {
    "model.backbone.depth": 50,
    "model.backbone.norm": "FrozenBN",
    "model.backbone.freeze_at": 2,
    "model.backbone.dilated_res5": False,
    "model.in_features": ["res4", "res5"],
    "model.num_extra_scales": 1,
    "model.encoder._target_": "TransformerEncoder",
    "model.encoder.pattern": "IIMII",
    "model.encoder.num_heads": 8,
    "model.encoder.ffn_dim": 1024,
    "model.encoder.checkpointing": False,
    "model.decoder.num_layers": 6,
    "model.decoder.num_heads": 8,
    "model.decoder.ffn_dim": 1024,
    "model.decoder.modulation.map": "smca.modeling.Gaussian",
    "model.decoder.modulation.per_head": True,
    "model.decoder.modulation.beta": 8.0,
    "model.decoder.scale_selection": True,
    "model.decoder.refine": False,
    "model.queries": None,
    "model.denoising": None,
    "model.dense_head": None,
    "model.share_heads": True,
    "model.criterion.class_loss": None,
    "model.num_classes": 80,
    "model.num_queries": 300,
    "model.max_detections": None,
    "model.embed_dim": 256,
    "model.dropout": 0.1,
    "model.pixel_mean": [123.675, 116.28, 103.53],
    "model.pixel_std": [58.395, 57.12, 57.375],
    "dataloader.train.dataset.names": "coco_2017_train",
    "dataloader.train.dataset.filter_empty": False,
    "dataloader.train.mapper.augmentations_with_crop.crop_range": [384, 600],
    "dataloader.train.total_batch_size": 8,
    "dataloader.test.dataset.names": "coco_2017_val",
    "dataloader.test.dataset.filter_empty": False,
    "dataloader.test.mapper.augmentations.short_sides": 800,
    "dataloader.test.mapper.augmentations.flip": False,
    "optimizer._target_": "AdamW",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.params.lr_factor_func.factor": 0.1,  # of the backbone
    "train.init_checkpoint": R50,
    "train.eval_period": 14_785,  # an epoch
    "train.checkpointer.period": 14_785,
    "train.amp.enabled": False,
    "train.accumulate": 1,
    "train.clip_grad_norm": 0.1,
}
R101_BACKBONE = {"model.backbone.depth": 101, "train.init_checkpoint": R101}
SINGLE_SCALE = {
    "model.in_features": ["res5"],
    "model.num_extra_scales": 0,
    "model.encoder.pattern": "IIIIII",
    "model.encoder.ffn_dim": 2048,
    "model.decoder.ffn_dim": 2048,
    "dataloader.train.total_batch_size": 16,
    "train.eval_period": 7392,
    "train.checkpointer.period": 7392,
}
NO_MODULATION = {
    f"model.decoder.modulation.{key}": None for key in ("map", "per_head", "beta", "offset_gain")
}
CONV = {
    "model.in_features": ["res3", "res4", "res5"],
    "model.encoder._target_": "ConvEncoder",
    "model.encoder.pattern": None,
    "model.encoder.num_heads": None,
    "model.encoder.kernel_size": 7,
    "model.encoder.num_layers": 6,
    "model.encoder.share_cross_scale": True,
    "model.encoder.pointwise": True,
    "model.encoder.reduce_finest": True,
    "model.encoder.checkpointing": False,
}

PLUS = {
    "model.decoder.refine": True,
    "model.queries": "ProposedQueries",
    "model.denoising": "Denoising",
    "model.denoising.groups": 3,
    "model.dense_head": "DenseHead",
    "model.dense_head.num_cells": 10,
    "model.share_heads": False,
    "model.criterion.class_loss": "VarifocalLoss",
}


def epochs(count, drop, batch):
    """Number of iterations, and factors of the rate at iterations: a tenth after `drop` epochs."""
    length = 118_287 // batch  # iterations, without the incomplete last batch
    ends = [i for epoch in range(count) for i in (epoch * length, (epoch + 1) * length - 1)]
    return count * length, {i: 1.0 if i < drop * length else 0.1 for i in ends}


# Of each config what is not the paper's, and the schedule.
TABLE = {
    "smca_r50_50ep": ({}, epochs(50, 40, 8)),
    "smca_r50_108ep": ({}, epochs(108, 80, 8)),
    "smca_r101_50ep": (R101_BACKBONE, epochs(50, 40, 8)),
    "smca_r101_108ep": (R101_BACKBONE, epochs(108, 80, 8)),
    "smca_conv_r50_50ep": (CONV, epochs(50, 40, 8)),
    "smca_conv_r101_50ep": (
        CONV | R101_BACKBONE | {"model.encoder.share_cross_scale": False},
        epochs(50, 40, 8),
    ),
    "smca_plus_r50_12ep": (PLUS, epochs(12, 11, 8)),
    "smca_plus_r50_50ep": (PLUS, epochs(50, 40, 8)),
    "smca_plus_conv_r50_12ep": (CONV | PLUS, epochs(12, 11, 8)),
    "smca_plus_conv_r50_50ep": (CONV | PLUS, epochs(50, 40, 8)),
    "smca_single_scale_r50_50ep": (SINGLE_SCALE, epochs(50, 40, 16)),
    "smca_single_scale_r50_108ep": (SINGLE_SCALE, epochs(108, 80, 16)),
    "smca_single_scale_r50_250ep": (SINGLE_SCALE, epochs(250, 200, 16)),
    "detr_r50_50ep": (SINGLE_SCALE | NO_MODULATION, epochs(50, 40, 16)),
    "ablations/head_shared": (
        SINGLE_SCALE | {"model.decoder.modulation.per_head": False},
        epochs(50, 40, 16),
    ),
    "ablations/multi_head_fixed": (
        SINGLE_SCALE | {"model.decoder.modulation.map": "smca.modeling.FixedGaussian"},
        epochs(50, 40, 16),
    ),
    "ablations/multi_head_single": (
        SINGLE_SCALE | {"model.decoder.modulation.map": "smca.modeling.SingleGaussian"},
        epochs(50, 40, 16),
    ),
    "ablations/multi_scale_no_selection": (
        {"model.decoder.scale_selection": False},
        epochs(50, 40, 8),
    ),
    "ablations/multi_scale_IIIII": ({"model.encoder.pattern": "IIIII"}, epochs(50, 40, 8)),
    "ablations/multi_scale_III": ({"model.encoder.pattern": "III"}, epochs(50, 40, 8)),
}
YACS = {
    path.stem: path
    for path in sorted(Path(model_zoo.get_config_file("smca_r50_50ep")).parent.glob("yacs/*"))
}


def read(config, key):
    """A value of a config; of a call the name of what is called."""
    value = OmegaConf.select(config, key, throw_on_missing=False)
    if isinstance(value, DictConfig):
        value = value._target_
    value = getattr(value, "__name__", value)
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def read_schedule(config, iterations):
    multiplier = instantiate(config.lr_multiplier)
    steps = config.train.max_iter
    return steps, {i: round(multiplier(i / steps), 6) for i in iterations}


@pytest.mark.parametrize("name", TABLE)
def test_config_says_what_the_table_says(name):
    changes, schedule = TABLE[name]
    config = model_zoo.get_config(name)
    assert config.train.output_dir == f"output/{name}"
    expected = PAPER | changes
    assert {key: read(config, key) for key in expected} == expected
    if schedule:
        assert read_schedule(config, schedule[1]) == schedule


@pytest.mark.parametrize("name", sorted(YACS.keys() - {"Base-SMCA"}))
def test_yacs_config_reads_images_like_its_lazy_config(name):
    cfg = get_cfg()
    add_smca_config(cfg)
    cfg.merge_from_file(str(YACS[name]))
    assert cfg.MODEL.SMCA.CONFIG == name and cfg.MODEL.META_ARCHITECTURE == "SMCA"
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT) == ("", "RGB")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS is False
