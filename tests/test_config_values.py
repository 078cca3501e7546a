"""
What every config means: written down from the paper, its published recipe and the README, and
compared with what is built from the config. Whoever changes a value on purpose changes it here too.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from detectron2.structures import BoxMode
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from smca import add_smca_config, model_zoo
from smca.modeling import PyramidEncoder
from smca.solver import Muon

# ------------------------------------------------------------------------------------------- models

RESNET_50 = {
    "block": "BottleneckBlock",
    "blocks": [3, 4, 6, 3],
    "norm": "FrozenBatchNorm2d",
    "not trained": ["stem", "res2"],
    "kernel that halves the size": [3],
}
RESNET_101 = RESNET_50 | {"blocks": [3, 4, 23, 3]}
LOSS = {"class": 2.0, "box": 5.0, "giou": 2.0, "alpha": 0.25, "gamma": 2.0}

# The paper's model, ...
MULTI_SCALE = {
    "backbone": RESNET_50,
    "features": ["res4", "res5"],
    "strides": [16, 32, 64],
    "encoder": {
        "type": "TransformerEncoder",
        "layers": 5,
        "pattern": "IIMII",
        "heads": 8,
        "ffn": 1024,
        "checkpointing": False,
    },
    "decoder": {
        "layers": 6,
        "heads": 8,
        "ffn": 1024,
        "scales": 3,
        "modulation": "multi_head",
        "spread": "independent",
        "beta": 8.0,
        "offset gain": 1.0,
        "scale selection": True,
    },
    "classes": 80,
    "queries": 300,
    "detections": 300,
    "width": 256,
    "dropout": 0.1,
    "matching cost": LOSS,
    "loss": LOSS,
    "position features, temperature": (128, 10000.0),
}
# Of red, green and blue: the pretrained backbone's.
PIXEL_MEAN, PIXEL_STD = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]


def changed(model, backbone=None, encoder=None, decoder=None, **values):
    """`model` with other values in its parts."""
    parts = {"backbone": backbone, "encoder": encoder, "decoder": decoder}
    return model | {name: model[name] | (part or {}) for name, part in parts.items()} | values


MULTI_SCALE_R101 = changed(MULTI_SCALE, backbone=RESNET_101)

# ... its single-scale model, DETR ...
SINGLE_SCALE = changed(
    MULTI_SCALE,
    encoder={"layers": 6, "pattern": "IIIIII", "ffn": 2048},
    decoder={"ffn": 2048, "scales": 1, "scale selection": False},
    features=["res5"],
    strides=[32],
)
NO_MODULATION = {"modulation": "none", "spread": None, "beta": None, "offset gain": None}
DETR = changed(SINGLE_SCALE, decoder=NO_MODULATION)

# ... and the authors' later model.
CONV = changed(MULTI_SCALE, decoder={"scales": 4}) | {
    "features": ["res3", "res4", "res5"],
    "strides": [8, 16, 32, 64],
    "encoder": {
        "type": "ConvEncoder",
        "layers": 6,
        "scales": 4,
        "kernel": 7,
        "convolutions up and down": (1, 1),  # shared by all pairs of scales
        "pointwise": True,
        "reduces the finest": True,
        "ffn": 1024,
        "checkpointing": False,
    },
}
CONV_R101 = changed(CONV, backbone=RESNET_101, encoder={"convolutions up and down": (3, 3)})

# The demo, and what is compared with it.
DEMO = changed(
    SINGLE_SCALE,
    backbone={
        "block": "BasicBlock",
        "blocks": [1, 1],
        "norm": "GroupNorm",
        "not trained": [],
    },
    encoder={"layers": 1, "pattern": "I", "ffn": 512},
    decoder={"layers": 3, "ffn": 512, "beta": 2.0, "offset gain": 0.5},
    features=["res3"],
    strides=[8],
    classes=3,
    queries=40,
    detections=40,
    width=128,
    dropout=0.0,
) | {"position features, temperature": (64, 10000.0)}
DEMO_MULTI_SCALE = changed(
    DEMO,
    backbone={"blocks": [1, 1, 1]},
    encoder={"layers": 5, "pattern": "IIMII"},
    decoder={"scales": 3, "scale selection": True, "beta": 0.5, "offset gain": 0.25},
    features=["res3", "res4"],
    strides=[8, 16, 32],
)
DEMO_CONV = DEMO_MULTI_SCALE | {
    "encoder": CONV["encoder"]
    | {
        "layers": 5,
        "scales": 3,
        "kernel": 5,
        "reduces the finest": False,
        "ffn": 512,
    },
}
# The paper's comparisons in miniature.
PRETRAINED = changed(
    DEMO,
    backbone={"blocks": [1, 1, 1], "not trained": ["stem", "res2"]},
    encoder={"layers": 5, "pattern": "IIIII"},
    decoder={"beta": 1.5, "offset gain": pytest.approx(0.433, abs=1e-3)},
    features=["res4"],
    strides=[16],
    dropout=0.1,
)
PRETRAINED_MULTI_SCALE = changed(
    PRETRAINED,
    encoder={"pattern": "IIMII"},
    decoder={
        "scales": 3,
        "scale selection": True,
        "beta": 0.75,
        "offset gain": pytest.approx(0.306, abs=1e-3),
    },
    features=["res3", "res4"],
    strides=[8, 16, 32],
)
PRETRAINED_CONV = PRETRAINED_MULTI_SCALE | {"encoder": DEMO_CONV["encoder"]}
OWN_CLASSES = {"classes": 2}  # of the files that these tests give

# --------------------------------------------------------------------------------------------- data

FLIP = ("flip left and right", 0.5)
RESIZE = ("short side", [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800], "at most", 1333)
COCO = {
    "train": "coco_2017_train",
    "test": "coco_2017_val",
    "evaluator": ("CocoEvaluator", "val2017"),
    "images without objects stay": (True, True),
    "channels": ("RGB", "RGB"),
    "train augmentation": [
        [FLIP, RESIZE],
        [
            FLIP,
            ("short side", [400, 500, 600], "at most", 9600),
            ("crop to", "absolute_range", (384, 600)),
            RESIZE,
        ],
    ],
    "test augmentation": [[("short side", [800], "at most", 1333)]],
    "instances": (True, False),
    "batch": (8, 1),
    "workers": (4, 4),
    "seed follows train.seed": True,
}
SHAPES = COCO | {
    "train": "smca_shapes_train",
    "test": "smca_shapes_val",
    "evaluator": ("CocoEvaluator", "val"),
    "train augmentation": [[FLIP, ("short side", [128], "at most", 176)]],
    "test augmentation": [[("short side", [128], "at most", 176)]],
    "workers": (0, 0),
}
OWN_FILES = {
    "train": "own_train",
    "test": "own_val",
    "evaluator": ("CocoEvaluator", "own_val"),
    "train checks images": True,
    "test checks images": True,
    "test has the classes of": "own_train",
}
SMALL_OWN_FILES = (SHAPES | OWN_FILES) | {
    "train augmentation": [[FLIP, ("short side", [144, 160, 176], "at most", 256)]],
    "test augmentation": [[("short side", [160], "at most", 256)]],
}

# ----------------------------------------------------------------------------- optimizer, schedule


def adamw(lr, backbone_lr):
    values = {"weight decay": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}
    return {
        "type": "AdamW",
        "fused": True,
        "backbone": values | {"lr": backbone_lr},
        "rest": values | {"lr": lr},
    }


def epochs(count, drop, batch):
    """Number of iterations, and factors of the rate at iterations: a tenth after `drop` epochs."""
    length = 118_287 // batch  # iterations, without the incomplete last batch
    ends = [i for epoch in range(count) for i in (epoch * length, (epoch + 1) * length - 1)]
    return count * length, {i: 1.0 if i < drop * length else 0.1 for i in ends}


# A warm-up from a hundredth over a fifth of the steps, then a cosine to a hundredth.
DEMO_STEPS = 2700, {0: 0.01, 270: 0.457732, 540: 0.905463, 1350: 0.505, 2025: 0.154982, 2700: 0.01}
CUSTOM_STEPS = 10_000, {0: 0.01, 250: 0.505, 500: 1.0, 7999: 1.0, 8000: 0.1, 9999: 0.1}

# ------------------------------------------------------------------------- the run: section "train"

R50 = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
R101 = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"


def run(weights, period):
    return {
        "init_checkpoint": weights,
        "eval_period": period,
        "checkpointer": {"period": period, "max_to_keep": 5},
        "device": "auto",
        "seed": 0,
        "amp": {"enabled": False, "dtype": "bf16"},
        "accumulate": 1,
        "clip_grad_norm": 0.1,
        "skip_nonfinite": 0,
        "model_ema": {"enabled": False, "decay": 0.9997},
        "ddp": {
            "broadcast_buffers": False,
            "find_unused_parameters": False,
            "fp16_compression": False,
        },
        "compile": False,
        "best_metric": "bbox/AP",
        "log_period": 20,
        "early_stopping": 0,
        "writers": [],
        "hooks": [],
        "num_pictures": 4,
        "cudnn_benchmark": False,
        "fast_dev_run": False,
    }


# ---------------------------------------------------------------------------------------- the table


def recipe(count, drop, batch, weights=R50):
    """The paper's: data, optimizer, schedule, run. Evaluated after every epoch."""
    data = COCO | {"batch": (batch, 1)}
    return data, adamw(1e-4, 1e-5), epochs(count, drop, batch), run(weights, 118_287 // batch)


DEMO_RECIPE = (SHAPES, adamw(5e-4, 5e-4), DEMO_STEPS, run("", 540))
SLOW_DEMO_RECIPE = (SHAPES, adamw(2e-4, 2e-4), DEMO_STEPS, run("", 540))

PRETRAINED_RECIPE = (
    SHAPES | {"train": "smca_shapes_10x_train", "test": "smca_shapes_10x_val", "batch": (4, 1)},
    adamw(1e-4, 1e-5),
    (1500, {0: 1.0, 1199: 1.0, 1200: 0.1, 1499: 0.1}),
    run("output/backbones/shapes_10x.pth", 500),
)

# Of each config the model, the data, the optimizer, the schedule and the run.
CUSTOM = (
    MULTI_SCALE | OWN_CLASSES,
    COCO | OWN_FILES,
    adamw(1e-4, 1e-5),
    CUSTOM_STEPS,
    run(R50, 1000),
)
TABLE = {
    "smca_r50_50ep": (MULTI_SCALE, *recipe(50, 40, batch=8)),
    "smca_r50_108ep": (MULTI_SCALE, *recipe(108, 80, batch=8)),
    "smca_r101_50ep": (MULTI_SCALE_R101, *recipe(50, 40, batch=8, weights=R101)),
    "smca_r101_108ep": (MULTI_SCALE_R101, *recipe(108, 80, batch=8, weights=R101)),
    "smca_conv_r50_50ep": (CONV, *recipe(50, 40, batch=8)),
    "smca_conv_r101_50ep": (CONV_R101, *recipe(50, 40, batch=8, weights=R101)),
    "smca_single_scale_r50_50ep": (SINGLE_SCALE, *recipe(50, 40, batch=16)),
    "smca_single_scale_r50_108ep": (SINGLE_SCALE, *recipe(108, 80, batch=16)),
    "smca_single_scale_r50_250ep": (SINGLE_SCALE, *recipe(250, 200, batch=16)),
    "detr_r50_50ep": (DETR, *recipe(50, 40, batch=16)),
    "ablations/head_shared": (
        changed(SINGLE_SCALE, decoder={"modulation": "head_shared"}),
        *recipe(50, 40, batch=16),
    ),
    "ablations/multi_head_fixed": (
        changed(SINGLE_SCALE, decoder={"spread": "fixed"}),
        *recipe(50, 40, batch=16),
    ),
    "ablations/multi_head_single": (
        changed(SINGLE_SCALE, decoder={"spread": "single"}),
        *recipe(50, 40, batch=16),
    ),
    "ablations/multi_scale_no_selection": (
        changed(MULTI_SCALE, decoder={"scale selection": False}),
        *recipe(50, 40, batch=8),
    ),
    "ablations/multi_scale_IIIII": (
        changed(MULTI_SCALE, encoder={"pattern": "IIIII"}),
        *recipe(50, 40, batch=8),
    ),
    "ablations/multi_scale_III": (
        changed(MULTI_SCALE, encoder={"pattern": "III", "layers": 3}),
        *recipe(50, 40, batch=8),
    ),
    "custom_coco": CUSTOM,
    "custom_yolo": CUSTOM,  # of files that tests/test_data_convert.py converts
    "custom_voc": CUSTOM,
    "fine_tune": (
        MULTI_SCALE | OWN_CLASSES,
        COCO | OWN_FILES,
        adamw(5e-5, 5e-6),
        # 50 epochs of two images in batches of 8.
        (12, {0: 0.01, 6: 0.505, 12: 0.01}),
        run("???", 1) | {"early_stopping": 5, "max_epochs": 50, "eval_epochs": 2},
    ),
    "smca_shapes": (DEMO, *DEMO_RECIPE),
    "detr_shapes": (changed(DEMO, decoder=NO_MODULATION), *DEMO_RECIPE),
    "convergence/shapes_multi_scale": (DEMO_MULTI_SCALE, *SLOW_DEMO_RECIPE),
    "convergence/shapes_conv": (DEMO_CONV, *DEMO_RECIPE),
    "convergence/coco_single_scale": (DEMO | OWN_CLASSES, SMALL_OWN_FILES, *DEMO_RECIPE[1:]),
    "convergence/coco_multi_scale": (
        DEMO_MULTI_SCALE | OWN_CLASSES,
        SMALL_OWN_FILES,
        *SLOW_DEMO_RECIPE[1:],
    ),
    "convergence/pretrained_single_scale": (PRETRAINED, *PRETRAINED_RECIPE),
    "convergence/pretrained_multi_scale": (PRETRAINED_MULTI_SCALE, *PRETRAINED_RECIPE),
    "convergence/pretrained_conv": (PRETRAINED_CONV, *PRETRAINED_RECIPE),
    "convergence/coco_conv": (DEMO_CONV | OWN_CLASSES, SMALL_OWN_FILES, *DEMO_RECIPE[1:]),
}

YACS = [
    "smca_r50_50ep",
    "smca_r101_50ep",
    "smca_conv_r50_50ep",
    "smca_conv_r101_50ep",
    "smca_single_scale_r50_50ep",
    "detr_r50_50ep",
]

# ----------------------------------------------------------------------- what a config really gives

SPREADS = {0: "fixed", 1: "single", 2: "independent"}  # values a head and scale
SPLITS = [
    "coco_2017_train",
    "coco_2017_val",
    "smca_shapes_train",
    "smca_shapes_val",
    "smca_shapes_10x_train",
    "smca_shapes_10x_val",
]


def flat(values, prefix=""):
    """Dicts in dicts as one, whose keys are like "encoder.layers": a difference is easy to see."""
    result = {}
    for key, value in values.items():
        is_part = isinstance(value, dict)
        result.update(flat(value, f"{prefix}{key}.") if is_part else {f"{prefix}{key}": value})
    return result


def common(values):
    """The value that all have."""
    first, *others = values
    assert all(value == first for value in others), [first, *others]
    return first


def build_without_memory(config):
    with torch.device("meta"):
        return instantiate(config.model)


def read_model(model):
    position = model.position_encoding
    return {
        "backbone": read_backbone(model.backbone),
        "features": list(model.neck.projections),
        "strides": model.neck.strides,
        "encoder": read_encoder(model.encoder),
        "decoder": read_decoder(model.decoder),
        "classes": common([model.num_classes, model.class_embed.out_features]),
        "queries": len(model.query_embed.weight),
        "detections": model.max_detections,
        "width": model.query_embed.weight.shape[1],
        "dropout": common(dropout_rates(model)),
        "matching cost": read_weights(model.criterion.matcher),
        "loss": read_weights(model.criterion),
        "position features, temperature": (position.num_features, position.temperature),
    }


def dropout_rates(model):
    """Of blocks and attention. torchvision's MLP has layers of PyTorch's own that are never on."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout) and type(module) is not torch.nn.Dropout:
            yield module.p
        elif isinstance(getattr(module, "dropout", None), float):
            yield module.dropout


def read_pixel_statistics(config):
    """Of a small model, since tensors without memory have no values."""
    config.model.update(embed_dim=8, num_queries=1)
    config.model.backbone.update(depth=18, num_blocks=[1, 1, 1, 1])
    config.model.encoder.ffn_dim = config.model.decoder.ffn_dim = 8
    model = instantiate(config.model)
    return [
        [round(value, 4) for value in statistic.flatten().tolist()]
        for statistic in (model.pixel_mean, model.pixel_std)
    ]


def read_backbone(backbone):
    blocks = [block for stage in backbone.stages for block in stage]
    halving = [block for block in blocks if block.stride == 2]
    parts = {"stem": backbone.stem, **dict(zip(backbone.stage_names, backbone.stages))}
    return {
        "block": common(type(block).__name__ for block in blocks),
        "blocks": [len(stage) for stage in backbone.stages],
        "norm": common(type(m.norm).__name__ for m in backbone.modules() if hasattr(m, "norm")),
        "not trained": [
            name
            for name, part in parts.items()
            if not any(parameter.requires_grad for parameter in part.parameters())
        ],
        "kernel that halves the size": sorted(
            {
                conv.kernel_size[0]
                for block in halving
                for name, conv in block.named_children()
                if name.startswith("conv") and conv.stride == (2, 2)
            }
        ),
    }


def read_encoder(encoder):
    layers = encoder.layers
    values = {
        "type": type(encoder).__name__,
        "layers": len(layers),
        "ffn": common(layer.ffn.linear1.out_features for layer in layers),
        "checkpointing": encoder.checkpointing,
    }
    if values["type"] == "TransformerEncoder":
        heads = common(layer.self_attention.num_heads for layer in layers)
        return values | {"pattern": encoder.pattern, "heads": heads}
    depthwise = [conv for x in layers for conv in (*x.intra, *x.up, *x.down)]
    return values | {
        "scales": common(len(layer.intra) for layer in layers),
        "kernel": common(size for conv in depthwise for size in conv.kernel_size),
        "convolutions up and down": common((len(layer.up), len(layer.down)) for layer in layers),
        "pointwise": common(
            isinstance(conv, torch.nn.Conv2d) for x in layers for conv in (x.conv_in, x.conv_out)
        ),
        "reduces the finest": encoder.reduce is not None,
    }


def read_decoder(decoder):
    def read_layer(layer):
        modulation = layer.modulation
        kind, spread, beta, gain = "none", None, None, None
        if modulation is not None:
            kind = "head_shared" if modulation.offset is None else "multi_head"
            spread = SPREADS[len(modulation.shape.initial_spreads)]
            beta, gain = modulation.settings.beta, modulation._offset_gain()
        return {
            "heads": common([layer.self_attention.num_heads, layer.co_attention.num_heads]),
            "ffn": layer.ffn.linear1.out_features,
            "modulation": kind,
            "spread": spread,
            "beta": beta,
            "offset gain": gain,
            "scale selection": layer.scale_weight is not None,
        }

    values = common(read_layer(layer) for layer in decoder.layers)
    return values | {"layers": len(decoder.layers), "scales": decoder.num_scales}


def read_weights(part):
    names = {"class": "class_weight", "box": "box_weight", "giou": "giou_weight"}
    values = {name: getattr(part, attribute) for name, attribute in names.items()}
    focal = getattr(part, "class_loss", part)
    return values | {"alpha": focal.alpha, "gamma": focal.gamma}


def read_data(config):
    dataloader = config.dataloader
    own_files = {}
    for split in ("train", "test"):
        names = dataloader[split].dataset.names
        if isinstance(names, DictConfig):  # files, which the training script registers like this
            dataloader[split].dataset.names = instantiate(names)
            own_files[f"{split} checks images"] = names.check_images
            if "categories_from" in names:
                own_files[f"{split} has the classes of"] = Path(names.categories_from).stem
    config.train.seed = 7
    train, test = instantiate(dataloader.train), instantiate(dataloader.test)
    loaders = train, test
    datasets = train.dataset.dataset, test.dataset._dataset
    mappers = train.dataset.mapper, test.dataset._map_func._obj
    records = [list(dataset) for dataset in datasets]
    samples = [mapper(split[0]) for mapper, split in zip(mappers, records)]
    evaluated = MetadataCatalog.get(dataloader.evaluator.dataset_name)
    return {
        "train": common(Path(record["file_name"]).parent.name for record in records[0]),
        "test": common(Path(record["file_name"]).parent.name for record in records[1]),
        "evaluator": (dataloader.evaluator._target_.__name__, Path(evaluated.image_root).name),
        "images without objects stay": tuple(
            any(not record["annotations"] for record in split) for split in records
        ),
        "channels": tuple(read_channels(sample["image"]) for sample in samples),
        "train augmentation": [read_augmentations(branch) for branch in mappers[0].branches],
        "test augmentation": [read_augmentations(branch) for branch in mappers[1].branches],
        "instances": tuple("instances" in sample for sample in samples),
        "batch": tuple(len(next(iter(loader.batch_sampler))) for loader in loaders),
        "workers": tuple(loader.num_workers for loader in loaders),
        "seed follows train.seed": train.batch_sampler.seed == 7 and train.dataset.seed == 7,
        **own_files,
    }


def read_channels(image):
    """Of an image of one color, that of `data`."""
    color = image[:, 0, 0].tolist()
    return {(200, 100, 50): "RGB", (50, 100, 200): "BGR"}[tuple(color)]


def read_augmentations(branch):
    result = []
    for augmentation in branch.augs:
        kind = type(augmentation).__name__
        if kind == "RandomFlip":
            direction = "left and right" if augmentation.horizontal else "up and down"
            result.append((f"flip {direction}", augmentation.prob))
        elif kind == "RandomCrop":
            result.append(("crop to", augmentation.crop_type, augmentation.crop_size))
        else:
            assert not augmentation.is_range  # the side is one of these, none between
            sides = list(augmentation.short_edge_length)
            result.append(("short side", sides, "at most", augmentation.max_size))
    return result


def read_optimizer(config, model):
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert groups.keys() == {id(p) for p in trained.values()}

    def read(parameters):
        groups_of_part = [groups[id(parameter)] for parameter in parameters]
        keys = {"lr": "lr", "weight decay": "weight_decay"}
        keys |= {key: key for key in ("betas", "eps", "amsgrad")}
        values = {name: common(g[key] for g in groups_of_part) for name, key in keys.items()}
        return values | {"lr": round(values["lr"], 9)}  # a factor has rounded it

    return {
        "type": type(optimizer).__name__,
        "fused": optimizer.defaults["fused"],
        "backbone": read(p for name, p in trained.items() if name.startswith("backbone.")),
        "rest": read(p for name, p in trained.items() if not name.startswith("backbone.")),
    }


def read_schedule(config, iterations):
    multiplier = instantiate(config.lr_multiplier)
    steps = instantiate(config.train.max_iter)
    return steps, {i: round(multiplier(i / steps), 6) for i in iterations}


def read_run(config):
    """Without the path, and the number of iterations that the schedule has."""
    train = config.train.copy()
    train.eval_period = instantiate(config.train.eval_period)
    train.checkpointer.period = instantiate(config.train.checkpointer.period)
    del train.max_iter
    values = OmegaConf.to_container(train, resolve=True)
    return {key: value for key, value in values.items() if key != "output_dir"}


# -------------------------------------------------------------------------------------------- tests


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """
    For each split a folder of two images of one color, the second without objects, and a COCO
    file beside it. Gives the folders' parent.
    """
    root = tmp_path_factory.mktemp("data")
    image = Image.fromarray(np.full((60, 80, 3), (200, 100, 50), dtype=np.uint8))
    for split in (*SPLITS, "own_train", "own_val"):
        (root / split).mkdir()
        images = []
        for n in (1, 2):
            name = f"{split}{n}.png"  # that no other folder has
            image.save(root / split / name)
            images.append({"id": n, "file_name": name, "height": 60, "width": 80})
        box = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 80, 60], "area": 4800}
        categories = [{"id": n, "name": f"class {n}"} for n in (1, 2)]
        content = {"images": images, "annotations": [{**box, "iscrowd": 0}]}
        (root / f"{split}.json").write_text(json.dumps({**content, "categories": categories}))
    return root


@pytest.fixture
def get_config(data, monkeypatch):
    """Loads a config by name; all data sets are replaced by those of `data`."""

    def load(split):
        box = {"bbox": [0, 0, 80, 60], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
        return [
            {"file_name": f"{data}/{split}/{split}{n}.png", "image_id": n, "annotations": objects}
            for n, objects in enumerate([[box], []], start=1)
        ]

    for split in SPLITS:
        monkeypatch.setitem(DatasetCatalog.data, split, functools.partial(load, split))

    def get(name):
        config = model_zoo.get_config(name)
        if "data" in config:
            own = [("train_json", "own_train.json"), ("train_images", "own_train")]
            own += [("val_json", "own_val.json"), ("val_images", "own_val")]
            overrides = [f"data.{key}={data / path}" for key, path in own]
            LazyConfig.apply_overrides(config, overrides)
        return config

    return get


FASTER_RCNN = {
    "convergence/faster_rcnn_shapes": (3, *DEMO_RECIPE),
    "convergence/faster_rcnn_coco": (2, SMALL_OWN_FILES, *DEMO_RECIPE[1:]),
}


PLUS = {
    "smca_plus_r50_12ep": ("smca_r50_50ep", 12),
    "smca_plus_r50_50ep": ("smca_r50_50ep", 50),
    "smca_plus_conv_r50_12ep": ("smca_conv_r50_50ep", 12),
    "smca_plus_conv_r50_50ep": ("smca_conv_r50_50ep", 50),
}
SMALL_PLUS = {"smca_plus_shapes": "smca_shapes", "custom_small": "custom_coco"}


def test_tables_have_every_config():
    assert {*TABLE, *FASTER_RCNN, *PLUS, *SMALL_PLUS} == set(model_zoo.list_configs())
    yacs = {path.stem for path in yacs_folder().glob("*.yaml")}
    assert yacs == {"Base-SMCA", *YACS}


def yacs_folder():
    return Path(model_zoo.get_config_file("custom_coco")).parent / "yacs"


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("name", TABLE)
def test_config_means_what_the_table_says(name, get_config):
    model, data, optimizer, schedule, run = TABLE[name]
    config = get_config(name)
    assert config.train.output_dir == f"output/{name}"
    assert flat(read_run(config)) == flat(run)
    assert read_schedule(config, schedule[1]) == schedule
    built = build_without_memory(config)
    assert flat(read_model(built)) == flat(model)
    assert flat(read_optimizer(config, built)) == flat(optimizer)
    assert read_data(get_config(name)) == data
    assert read_pixel_statistics(get_config(name)) == [PIXEL_MEAN, PIXEL_STD]


@pytest.mark.parametrize("name", FASTER_RCNN)
def test_faster_rcnn_has_the_same_backbone_data_and_schedule(name, get_config):
    num_classes, data, optimizer, schedule, run = FASTER_RCNN[name]
    config = get_config(name)
    assert flat(read_run(config)) == flat(run)
    assert read_schedule(config, schedule[1]) == schedule
    model = build_without_memory(config)
    assert isinstance(model, GeneralizedRCNN)
    assert flat(read_backbone(model.backbone.bottom_up)) == flat(DEMO_MULTI_SCALE["backbone"])
    assert {level.stride for level in model.backbone.output_shape().values()} == {4, 8, 16}
    anchors = model.proposal_generator.anchor_generator
    assert anchors.strides == [4, 8, 16]
    # Two sizes and three aspect ratios: the area is the size's square.
    areas = [
        sorted({round(float((x1 - x0) * (y1 - y0)) ** 0.5) for x0, y0, x1, y1 in cell})
        for cell in instantiate(config.model.proposal_generator.anchor_generator).cell_anchors
    ]
    assert areas == [[16, 24], [32, 48], [64, 96]]
    assert model.roi_heads.num_classes == num_classes
    assert model.roi_heads.box_predictor.cls_score.out_features == num_classes + 1
    assert not model.roi_heads.mask_on
    assert model.input_format == "RGB"
    assert (config.model.pixel_mean, config.model.pixel_std) == (PIXEL_MEAN, PIXEL_STD)
    assert flat(read_optimizer(config, model)) == flat(optimizer)
    assert read_data(get_config(name)) == data


@pytest.mark.parametrize("name", PLUS)
def test_proposals_refinement_denoising_and_a_dense_head_join_the_papers_model(name, get_config):
    """What they take from the paper's config is the same; theirs is named here."""
    base, epochs = PLUS[name]
    config, paper = get_config(name), get_config(base)
    assert read_data(config) == read_data(paper)
    assert config.train.max_iter == epochs * (118287 // 8)
    ignored = {"eval_period": 0, "checkpointer": 0}
    assert read_run(config) | ignored == read_run(paper) | ignored
    model, plain = build_without_memory(config), build_without_memory(paper)
    assert flat(read_optimizer(config, model)) == flat(read_optimizer(paper, plain))
    names = {key for key, _ in model.named_parameters()}
    shared = {key for key, _ in plain.named_parameters() if "head" in key or "coder.layers" in key}
    assert {key for key in shared if ".center." not in key} <= names
    assert model.refine and model.denoising.groups == 3 and model.dense_head.num_cells == 10
    assert len(model.class_embed) == len(model.box_embed) == len(model.decoder.layers)
    assert (len(model.query_embed.weight), model.criterion.class_loss.uses_iou) == (300, True)


@pytest.mark.parametrize("name", SMALL_PLUS)
def test_small_models_learn_from_scratch_with_muon(name, get_config):
    config = get_config(name)
    model = build_without_memory(config)
    strides, read = ([4, 8, 16], [1, 2]) if name == "custom_small" else ([8, 16], [0, 1])
    assert (model.neck.strides, model.decoder.read) == (strides, read)
    assert isinstance(model.encoder, PyramidEncoder) and model.refine
    config.optimizer.params.model = model
    optimizer = instantiate(config.optimizer)
    assert isinstance(optimizer, Muon) and optimizer.param_groups[0]["lr"] == 4e-3
    assert (config.train.clip_grad_norm, config.train.init_checkpoint) == (None, "")
    multiplier = instantiate(config.lr_multiplier)
    assert [round(multiplier(t), 3) for t in (0.0, 0.1, 1.0)] == [0.01, 0.976, 0.01]


def test_demo_data_has_2000_images_to_train_and_200_to_evaluate_on():
    for split in ("train", "val"):
        folder = Path(MetadataCatalog.get(f"smca_shapes_{split}").json_file).parent
        assert folder.name.endswith("_2000_200_seed0")


@pytest.mark.parametrize("name", YACS)
def test_yacs_config_reads_images_like_its_lazy_config(name):
    cfg = get_cfg()
    add_smca_config(cfg)
    cfg.merge_from_file(str(yacs_folder() / f"{name}.yaml"))
    assert cfg.MODEL.SMCA.CONFIG == name and cfg.MODEL.META_ARCHITECTURE == "SMCA"
    assert (cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT) == ("", "RGB")
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST) == (800, 1333)
    assert cfg.DATASETS.TRAIN == ("coco_2017_train",) and cfg.DATASETS.TEST == ("coco_2017_val",)
    assert cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS is False
