"""What every config says, from the paper, its published recipe and the README. Whoever changes a
value on purpose changes it here too. (That it is also done is in test_configs.py and
test_wiring.py.)"""

from pathlib import Path

import pytest
from detectron2.config import get_cfg, instantiate
from detectron2.data import MetadataCatalog
from omegaconf import DictConfig, OmegaConf

from smca import add_smca_config, model_zoo

R50, R101 = (f"detectron2://ImageNetPretrained/torchvision/R-{depth}.pkl" for depth in (50, 101))

# The paper's model and recipe: each key, and what has none is None.
PAPER = {
    "model.backbone.depth": 50,
    "model.backbone.num_blocks": None,
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
    "model.decoder.modulation.offset_gain": None,
    "model.decoder.scale_selection": True,
    "model.decoder.refine": False,
    "model.queries": None,
    "model.denoising": None,
    "model.denoising.groups": None,
    "model.dense_head": None,
    "model.dense_head.num_cells": None,
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
    "dataloader.train.mapper.augmentations.short_sides": None,
    "dataloader.train.mapper.augmentations.max_size": None,
    "dataloader.train.mapper.augmentations_with_crop.crop_range": [384, 600],
    "dataloader.train.total_batch_size": 8,
    "dataloader.train.num_workers": 4,
    "dataloader.test.dataset.names": "coco_2017_val",
    "dataloader.test.dataset.filter_empty": False,
    "dataloader.test.mapper.augmentations.short_sides": 800,
    "dataloader.test.mapper.augmentations.max_size": None,
    "dataloader.test.mapper.augmentations.flip": False,
    "optimizer._target_": "AdamW",
    "optimizer.lr": 1e-4,
    "optimizer.weight_decay": 1e-4,
    "optimizer.fused": True,
    "optimizer.params.lr_factor_func.factor": 0.1,  # of the backbone
    "train.init_checkpoint": R50,
    "train.eval_period": 14_785,  # an epoch
    "train.checkpointer.period": 14_785,
    "train.checkpointer.max_to_keep": 5,
    "train.device": "auto",
    "train.seed": 0,
    "train.amp.enabled": False,
    "train.accumulate": 1,
    "train.clip_grad_norm": 0.1,
    "train.skip_nonfinite": 0,
    "train.model_ema.enabled": False,
    "train.compile": False,
    "train.best_metric": "bbox/AP",
    "train.early_stopping": 0,
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

# The demo, and what is compared with it.
SMALL = {
    "model.backbone.depth": 18,
    "model.backbone.num_blocks": [1, 1, 1],
    "model.backbone.norm": "GN",
    "model.encoder.ffn_dim": 512,
    "model.decoder.ffn_dim": 512,
    "model.decoder.num_layers": 3,
    "model.num_classes": 3,
    "model.num_queries": 40,
    "model.embed_dim": 128,
    "dataloader.train.dataset.names": "smca_shapes_train",
    "dataloader.train.mapper.augmentations.short_sides": 128,
    "dataloader.train.mapper.augmentations.max_size": 176,
    "dataloader.train.mapper.augmentations_with_crop.crop_range": None,
    "dataloader.train.num_workers": 0,
    "dataloader.test.dataset.names": "smca_shapes_val",
    "dataloader.test.mapper.augmentations.short_sides": 128,
    "dataloader.test.mapper.augmentations.max_size": 176,
}
TRAINED_FROM_SCRATCH = {
    "model.backbone.freeze_at": 0,
    "model.dropout": 0.0,
    "optimizer.lr": 5e-4,
    "optimizer.params.lr_factor_func.factor": 1.0,
    "train.init_checkpoint": "",
    "train.eval_period": 540,
    "train.checkpointer.period": 540,
}
DEMO = (SMALL | TRAINED_FROM_SCRATCH) | {
    "model.backbone.num_blocks": [1, 1],
    "model.in_features": ["res3"],
    "model.num_extra_scales": 0,
    "model.encoder.pattern": "I",
    "model.decoder.modulation.beta": 2.0,
}
THREE_SCALES = {"model.in_features": ["res3", "res4"], "model.decoder.modulation.beta": 0.5}
DEMO_MULTI_SCALE = (SMALL | TRAINED_FROM_SCRATCH) | THREE_SCALES | {"optimizer.lr": 2e-4}
DEMO_CONV = (SMALL | TRAINED_FROM_SCRATCH) | THREE_SCALES | CONV_ENCODER
SMALL_OWN_FILES = {
    "dataloader.train.mapper.augmentations.short_sides": [144, 160, 176],
    "dataloader.train.mapper.augmentations.max_size": 256,
    "dataloader.test.mapper.augmentations.short_sides": 160,
    "dataloader.test.mapper.augmentations.max_size": 256,
}
# The paper's comparisons in miniature.
PRETRAINED = SMALL | {
    "model.decoder.modulation.beta": 0.75,
    "model.in_features": ["res3", "res4"],
    "dataloader.train.dataset.names": "smca_shapes_10x_train",
    "dataloader.test.dataset.names": "smca_shapes_10x_val",
    "dataloader.train.total_batch_size": 4,
    "train.init_checkpoint": "output/backbones/shapes_10x.pth",
    "train.eval_period": 500,
    "train.checkpointer.period": 500,
}
PRETRAINED_SINGLE_SCALE = PRETRAINED | {
    "model.decoder.modulation.beta": 1.5,
    "model.in_features": ["res4"],
    "model.num_extra_scales": 0,
    "model.encoder.pattern": "IIIII",
}

OWN_FILES = {  # which are read when a training starts
    "model.num_classes": "num_classes",
    "dataloader.train.dataset.names": "register_coco",
    "dataloader.test.dataset.names": "register_coco",
}
CUSTOM = OWN_FILES | PLUS
CUSTOM |= {"train.eval_period": 1000, "train.checkpointer.period": 1000}
CUSTOM["model.num_queries"] = "fit_num_queries"
FINE_TUNE = CUSTOM | {
    "optimizer.lr": 5e-5,
    "optimizer.params.lr_factor_func.factor": None,  # one for each part
    "train.init_checkpoint": None,  # has to be given
    "train.eval_period": "steps_of_epochs",
    "train.checkpointer.period": "steps_of_epochs",
    "train.early_stopping": 5,
}


def epochs(count, drop, batch):
    """Number of iterations, and factors of the rate at iterations: a tenth after `drop` epochs."""
    length = 118_287 // batch  # iterations, without the incomplete last batch
    ends = [i for epoch in range(count) for i in (epoch * length, (epoch + 1) * length - 1)]
    return count * length, {i: 1.0 if i < drop * length else 0.1 for i in ends}


# A warm-up from a hundredth over a fifth of the steps, then a cosine to a hundredth.
DEMO_STEPS = 2700, {0: 0.01, 270: 0.457732, 540: 0.905463, 1350: 0.505, 2025: 0.154982, 2700: 0.01}
CUSTOM_STEPS = 10_000, {0: 0.01, 250: 0.505, 500: 1.0, 7999: 1.0, 8000: 0.1, 9999: 0.1}
PRETRAINED_STEPS = 1500, {0: 1.0, 1199: 1.0, 1200: 0.1, 1499: 0.1}

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
    "custom_coco": (CUSTOM, CUSTOM_STEPS),
    "custom_yolo": (CUSTOM, CUSTOM_STEPS),
    "custom_voc": (CUSTOM, CUSTOM_STEPS),
    "fine_tune": (FINE_TUNE, None),  # so many epochs: tests/test_fine_tuning.py
    "smca_shapes": (DEMO, DEMO_STEPS),
    "detr_shapes": (DEMO | NO_MODULATION, DEMO_STEPS),
    "convergence/shapes_multi_scale": (DEMO_MULTI_SCALE, DEMO_STEPS),
    "convergence/shapes_conv": (DEMO_CONV, DEMO_STEPS),
    "convergence/coco_single_scale": (DEMO | SMALL_OWN_FILES | OWN_FILES, DEMO_STEPS),
    "convergence/coco_multi_scale": (DEMO_MULTI_SCALE | SMALL_OWN_FILES | OWN_FILES, DEMO_STEPS),
    "convergence/coco_conv": (DEMO_CONV | SMALL_OWN_FILES | OWN_FILES, DEMO_STEPS),
    "convergence/pretrained_single_scale": (PRETRAINED_SINGLE_SCALE, PRETRAINED_STEPS),
    "convergence/pretrained_multi_scale": (PRETRAINED, PRETRAINED_STEPS),
    "convergence/pretrained_conv": (PRETRAINED | CONV_ENCODER, PRETRAINED_STEPS),
}
FASTER_RCNN = {  # a model of Detectron2's in a config of the demo's
    "convergence/faster_rcnn_shapes": DEMO,
    "convergence/faster_rcnn_coco": DEMO | SMALL_OWN_FILES | OWN_FILES,
}
YACS = {
    path.stem: path
    for path in sorted(Path(model_zoo.get_config_file("smca_r50_50ep")).parent.glob("yacs/*"))
}


SMALL_PLUS = {
    "model.encoder._target_": "PyramidEncoder",
    "model.decoder.refine": True,
    "optimizer._target_": "Muon",
    "optimizer.lr": 4e-3,
    "train.clip_grad_norm": None,
    "train.init_checkpoint": "",
}
CUSTOM_SMALL = {
    "model.in_features": ["res2", "res3", "res4"],
    "model.decoder.read": [1, 2],
    "model.num_queries": "fit_num_queries",
    "train.max_iter": "fit_num_iterations",
}
FROM_SCRATCH = {
    "smca_plus_shapes": {"model.in_features": ["res3", "res4"], "model.decoder.read": None},
    "custom_small": CUSTOM_SMALL,
    "custom_small_yolo": CUSTOM_SMALL,
    "custom_small_voc": CUSTOM_SMALL,
    "custom_small_pretrained": {
        **CUSTOM_SMALL,
        "model.backbone": "TimmBackbone",
        "train.init_checkpoint": "efficientnet-lite0",
    },
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


def test_tables_have_every_config():
    assert {*TABLE, *FROM_SCRATCH, *FASTER_RCNN} == set(model_zoo.list_configs())


@pytest.mark.parametrize("name", TABLE)
def test_config_says_what_the_table_says(name):
    changes, schedule = TABLE[name]
    config = model_zoo.get_config(name)
    assert config.train.output_dir == f"output/{name}"
    expected = PAPER | changes
    assert {key: read(config, key) for key in expected} == expected
    if schedule:
        assert read_schedule(config, schedule[1]) == schedule


@pytest.mark.parametrize("name", FROM_SCRATCH)
def test_small_models_learn_from_scratch_with_muon(name):
    config, expected = model_zoo.get_config(name), SMALL_PLUS | FROM_SCRATCH[name]
    assert {key: read(config, key) for key in expected} == expected
    multiplier = instantiate(config.lr_multiplier)
    assert [round(multiplier(t), 3) for t in (0.0, 0.1, 1.0)] == [0.01, 0.976, 0.01]


@pytest.mark.parametrize("name", FASTER_RCNN)
def test_faster_rcnn_has_the_same_data_and_schedule(name):
    config = model_zoo.get_config(name)
    expected = PAPER | FASTER_RCNN[name]
    expected = {key: value for key, value in expected.items() if not key.startswith("model.")}
    assert {key: read(config, key) for key in expected} == expected
    assert read_schedule(config, DEMO_STEPS[1]) == DEMO_STEPS
    assert config.model._target_.__name__ == "GeneralizedRCNN"
    assert config.model.input_format == "RGB"
    for key in ("model.pixel_mean", "model.pixel_std"):
        assert read(config, key) == PAPER[key]


def test_demo_data_has_2000_images_to_train_and_200_to_evaluate_on():
    for split in ("train", "val"):
        folder = Path(MetadataCatalog.get(f"smca_shapes_{split}").json_file).parent
        assert folder.name.endswith("_2000_200_seed0")


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
