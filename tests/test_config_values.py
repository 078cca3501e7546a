"""What the paper's configs say, from the paper and its published recipe, and that what is built of
a config has its values. (What a training does with them is in test_wiring.py.)"""

from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg, instantiate
from omegaconf import DictConfig, OmegaConf

from smca import add_smca_config, model_zoo
from smca.config import load_config
from smca.engine.build import build_run

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
    "model.encoder.num_layers": None,
    "model.encoder.kernel_size": None,
    "model.encoder.share_cross_scale": None,
    "model.encoder.pointwise": None,
    "model.encoder.reduce_finest": None,
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
CONV_ENCODER = {
    "model.encoder._target_": "ConvEncoder",
    "model.encoder.pattern": None,
    "model.encoder.num_heads": None,
    "model.encoder.kernel_size": 5,
    "model.encoder.num_layers": 5,
    "model.encoder.reduce_finest": False,
    "model.encoder.checkpointing": None,
}
CONV = CONV_ENCODER | {
    "model.in_features": ["res3", "res4", "res5"],
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


# Values of every kind that are no config's.
OTHER = {
    "model.embed_dim": 48,
    "model.num_queries": 7,
    "model.num_classes": 3,
    "model.dropout": 0.25,
    "model.backbone.depth": 18,
    "model.backbone.freeze_at": 3,
    "model.encoder.pattern": "MI",
    "model.encoder.num_heads": 4,
    "model.encoder.ffn_dim": 40,
    "model.decoder.num_layers": 3,
    "model.decoder.num_heads": 6,
    "model.decoder.ffn_dim": 56,
    "model.decoder.modulation.beta": 5.0,
    "model.criterion.box_weight": 2.5,
    "dataloader.train.dataset.names": "smca_shapes_train",
    "dataloader.train.mapper.augmentations.short_sides": [64],
    "dataloader.train.mapper.augmentations_with_crop": "null",
    "dataloader.train.total_batch_size": 3,
    "dataloader.train.num_workers": 0,
    "dataloader.test.dataset.names": "smca_shapes_val",
    "dataloader.test.mapper.augmentations.short_sides": 48,
    "dataloader.test.num_workers": 0,
    "optimizer.lr": 3e-4,
    "optimizer.weight_decay": 2e-3,
    "optimizer.params.lr_factor_func.factor": 0.5,
    "train.device": "cpu",
}


@pytest.fixture
def built(few_shapes):
    return build_run(load_config("smca_r50_50ep", [f"{k}={v}" for k, v in OTHER.items()]))


def test_the_model_is_built_of_the_config_s_values(built):
    model = built.model
    encoder, decoder = model.encoder.layers, model.decoder.layers
    assert (model.query_embed.weight.shape, model.class_embed.out_features) == ((7, 48), 3)
    assert (len(encoder), model.encoder.pattern, len(decoder)) == (2, "MI", 3)
    for layer, heads, width in ((encoder[1], 4, 40), (decoder[2], 6, 56)):
        assert layer.self_attention.num_heads == heads
        assert layer.ffn.linear1.out_features == width
    assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0, 0.25}
    assert decoder[0].modulation.settings.beta == 5
    assert model.criterion.box_weight == model.criterion.matcher.box_weight == 2.5
    frozen = {n.split(".")[1] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"stem", "res2", "res3"}


def test_optimizer_and_loaders_are_built_of_the_config_s_values(built):
    groups = {id(p): group for group in built.optimizer.param_groups for p in group["params"]}
    for name, parameter in built.model.named_parameters():
        if parameter.requires_grad:
            group, is_backbone = groups[id(parameter)], name.startswith("backbone.")
            assert group["lr"] == (1.5e-4 if is_backbone else 3e-4), name
            assert group["weight_decay"] == 2e-3, name
    batch = next(iter(built.train_loader))
    assert len(batch) == 3 and {min(x["image"].shape[1:]) for x in batch} == {64}
    (item,) = next(iter(built.test_loader))
    assert min(item["image"].shape[1:]) == 48
    assert {x["instances"].gt_classes.max().item() < 3 for x in batch} == {True}


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
