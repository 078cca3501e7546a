"""Every config is whole, makes the published model, and can be built both ways."""

from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import SwinTransformer, ViT, build_model

from helpers import write_dataset
from smca import add_smca_config
from smca.config import load_config
from smca.errors import ConfigError

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
ALL_FILES = {
    str(path.relative_to(CONFIGS).with_suffix(""))
    for folder in (CONFIGS, CONFIGS / "ablations", CONFIGS / "convergence")
    for path in folder.glob("*.py")
    if path.stem != "__init__"
}
NEEDS_DATA = sorted(name for name in ALL_FILES if "coco_" in name or name.endswith("_coco"))
FILES = sorted(ALL_FILES - set(NEEDS_DATA))
SMALL = [
    "model.backbone.depth=18",
    "model.embed_dim=32",
    "model.encoder.ffn_dim=32",
    "model.decoder.ffn_dim=32",
    "model.num_queries=7",
    "model.num_classes=5",
]


def load(name, *overrides):
    return load_config(str(CONFIGS / f"{name}.py"), overrides)


def build_without_memory(cfg):
    """The model's structure; nothing is allocated or initialised."""
    with torch.device("meta"):
        return instantiate(cfg.model)


def trainable_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def detect(model, height=64, width=96):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return model.eval()([{"image": image}])[0]["instances"]


@pytest.mark.parametrize("name", FILES)
def test_config_builds_its_model(name):
    assert trainable_parameters(build_without_memory(load(name))) > 0


@pytest.mark.parametrize("name", NEEDS_DATA)
def test_config_for_other_data_builds_the_model_for_their_classes(name, tmp_path):
    write_dataset(tmp_path)
    file = tmp_path / "truth.json"
    data = [f"data.train_json=[{file},{file}]", f"data.train_images={tmp_path}"]
    data += [f"data.val_json={file}", f"data.val_images={tmp_path}"]
    cfg = load(name, *data)
    assert instantiate(cfg.model.num_classes) == 2
    assert trainable_parameters(build_without_memory(cfg)) > 0


@pytest.mark.parametrize("name", FILES)
def test_all_dropout_follows_one_value(name):
    model = build_without_memory(load(name, "model.dropout=0.25"))
    rates = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
    rates |= {m.dropout for m in model.modules() if isinstance(getattr(m, "dropout", None), float)}
    # torchvision's MLP has dropout layers that are never on.
    assert rates == {0.0, 0.25}


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("smca_conv_r50_50ep", [], 40_763_514),
        ("smca_conv_r50_50ep", ["model.encoder.share_cross_scale=False"], 41_070_714),
        ("smca_conv_r50_50ep", ["model.encoder.pointwise=False"], 39_974_010),
        ("smca_conv_r101_50ep", [], 60_010_618),
    ],
)
def test_conv_model_has_the_parameters_of_the_official_logs(name, overrides, expected):
    model = build_without_memory(load(name, "model.num_classes=92", *overrides))
    assert trainable_parameters(model) == expected


@pytest.mark.parametrize(
    ("name", "batch_size", "epochs", "drop"),
    [
        ("smca_r50_50ep", 8, 50, 40),
        ("smca_r50_108ep", 8, 108, 80),
        ("smca_r101_50ep", 8, 50, 40),
        ("smca_r101_108ep", 8, 108, 80),
        ("smca_conv_r50_50ep", 8, 50, 40),
        ("smca_conv_r101_50ep", 8, 50, 40),
        ("detr_r50_50ep", 16, 50, 40),
        ("smca_single_scale_r50_50ep", 16, 50, 40),
        ("smca_single_scale_r50_108ep", 16, 108, 80),
        ("smca_single_scale_r50_250ep", 16, 250, 200),
    ],
)
def test_schedule_is_the_papers(name, batch_size, epochs, drop):
    cfg = load(name)
    iterations = 118287 // batch_size  # of an epoch, without the incomplete last batch
    assert cfg.dataloader.train.total_batch_size == batch_size
    assert cfg.train.max_iter == epochs * iterations
    multiplier = instantiate(cfg.lr_multiplier)
    at = {i: multiplier(i / cfg.train.max_iter) for i in (0, drop * iterations - 1)}
    assert set(at.values()) == {1.0}
    assert multiplier(drop * iterations / cfg.train.max_iter) == pytest.approx(0.1)
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (1e-4, 1e-4)
    assert cfg.optimizer.params.lr_factor_func.factor == 0.1
    assert cfg.train.clip_grad_norm == 0.1


@pytest.mark.parametrize("depth", [18, 34, 50, 101])
def test_resnet_depths(depth):
    cfg = load("smca_r50_50ep", *SMALL)
    cfg.model.backbone.depth = depth
    assert len(detect(instantiate(cfg.model))) == 7


def test_dilated_res5_has_the_stride_of_res4():
    cfg = load("detr_r50_50ep", *SMALL, "model.backbone.depth=50")
    cfg.model.backbone.dilated_res5 = True
    model = instantiate(cfg.model)
    assert model.neck.strides == [16]
    features = model.backbone(torch.zeros(1, 3, 64, 96))
    assert features["res5"].shape == (1, 2048, 4, 6)
    assert len(detect(model)) == 7


def test_a_swin_backbone_works():
    cfg = load("smca_r50_50ep", *SMALL)
    cfg.model.backbone = L(SwinTransformer)(
        embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), out_indices=(2, 3)
    )
    cfg.model.in_features = ["p2", "p3"]
    model = instantiate(cfg.model)
    assert model.neck.strides == [16, 32, 64]
    assert len(detect(model)) == 7


def test_a_vit_backbone_works():
    cfg = load("smca_single_scale_r50_50ep", *SMALL)
    cfg.model.backbone = L(ViT)(
        img_size=64, embed_dim=24, depth=1, num_heads=2, out_feature="last_feat"
    )
    cfg.model.in_features = ["last_feat"]
    model = instantiate(cfg.model)
    assert model.neck.strides == [16]
    assert len(detect(model)) == 7


def yacs_config(name):
    cfg = get_cfg()
    add_smca_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "yacs" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("smca_r50_50ep", {"NUM_CLASSES": 5, "ENCODER.PATTERN": "IM"}),
        ("smca_single_scale_r50_50ep", {"DECODER.SPREAD": "single", "DECODER.BETA": 4.0}),
        ("smca_conv_r50_50ep", {"ENCODER.KERNEL_SIZE": 5, "ENCODER.SHARE_CROSS_SCALE": False}),
        ("detr_r50_50ep", {"NUM_QUERIES": 9}),
    ],
)
def test_yacs_and_lazy_config_make_the_same_model(name, settings):
    cfg = yacs_config(name)
    cfg.merge_from_list([x for k, v in settings.items() for x in (f"MODEL.SMCA.{k}", v)])
    from_yacs = build_model(cfg)
    overrides = [f"model.{key.lower()}={value}" for key, value in settings.items()]
    from_lazy = instantiate(load(name, *overrides).model)
    from_lazy.load_state_dict(from_yacs.state_dict())  # the same parameters
    ours, theirs = detect(from_lazy), detect(from_yacs)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def test_every_yacs_config_names_a_lazy_config():
    names = [p.stem for p in (CONFIGS / "yacs").glob("*.yaml") if not p.stem.startswith("Base")]
    assert names and set(names) <= set(FILES)
    for name in names:
        assert yacs_config(name).MODEL.SMCA.CONFIG == name


def test_yacs_setting_that_the_model_lacks_is_named():
    cfg = yacs_config("smca_r50_50ep")
    cfg.MODEL.SMCA.ENCODER.KERNEL_SIZE = 5
    with pytest.raises(ConfigError, match="ENCODER.KERNEL_SIZE.*smca_r50_50ep"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.encoder.pattern=IXI", "pattern='IXI'.*letters I"),
        ("model.decoder.spread=wide", "spread='wide'.*independent"),
        ("model.decoder.modulation=heads", "modulation='heads'.*multi_head"),
        ("model.decoder.beta=0", "beta=0.*positive"),
        ("model.decoder.num_scales=2", "give 3 scales.*made for 2.*num_scales=3"),
        ("model.backbone.depth=51", "depth=51.*one of"),
        ("model.embed_dim=30", "embed_dim=30.*num_heads=8"),
        ("model.num_queries=0", "num_queries=0"),
    ],
)
def test_a_bad_model_setting_is_named(override, message):
    with pytest.raises(ValueError, match=message):
        build_without_memory(load("smca_r50_50ep", override))
