"""Models of the configs: the published sizes, other backbones, and both ways to build them."""

import os
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import get_cfg, instantiate
from detectron2.modeling import SwinTransformer, build_model
from omegaconf import OmegaConf

from smca import add_smca_config
from smca.config import build, get_config, list_configs, load_config
from smca.errors import ConfigError, command_line
from smca.modeling import TimmBackbone

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
SMALL = [
    "model.backbone.depth=18",
    "+model.backbone.width=16",
    "model.embed_dim=32",
    "model.encoder.ffn_dim=32",
    "model.decoder.ffn_dim=32",
    "model.num_queries=7",
    "model.num_classes=5",
]


def load(name, *overrides):
    return load_config(str(CONFIGS / f"{name}.py"), overrides)


def build_without_memory(cfg):
    """The model's structure; nothing is allocated or initialized."""
    with torch.device("meta"):
        return instantiate(cfg.model)


def trainable_parameters(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def detect(model, height=64, width=96):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (3, height, width), generator=generator, dtype=torch.uint8)
    with torch.no_grad():
        return model.eval()([{"image": image}])[0]["instances"]


@pytest.mark.parametrize("name", list_configs())
def test_a_config_has_nothing_but_what_trains(name):
    """What a config imports to build on would be saved with every training, beside what it used."""
    keys = {"model", "dataloader", "optimizer", "lr_multiplier", "train", "data", "base"}
    assert set(get_config(name)) <= keys


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
    "value, expected",
    [
        ("2024_01", "2024_01"),
        ("/my photos/für (2).json", "/my photos/für (2).json"),
        ("[1, 007,ü b]", ["1", "007", "ü b"]),
        ('"a,b"', "a,b"),
        ("null", None),
    ],
)
def test_paths_and_names_of_classes_need_no_quotes(value, expected):
    path = str(CONFIGS / "custom_voc.py")
    assert load_config(path, [f"data.names={value}"], needed=()).data.names == expected
    assert load_config(path, ["train.output_dir=1.10"], needed=()).train.output_dir == "1.10"


def test_the_home_folder_has_its_sign_anywhere_in_a_command():
    parser, home = command_line(None), os.path.expanduser("~")
    parser.add_argument("words", nargs="*")
    words = parser.parse_args(["~/a", "x=~/a", 'x="~/a"', "a~/b", "~a", "x=~"]).words
    assert words == [f"{home}/a", f"x={home}/a", f'x="{home}/a"', "a~/b", "~a", "x=~"]


def test_a_value_of_another_kind_may_stand_for_what_a_config_computes():
    key = "dataloader.test.mapper.augmentations.short_sides"
    assert OmegaConf.select(load_config("custom_small", [f"{key}=300"], needed=()), key) == 300


def test_a_swin_backbone_works():
    cfg = load("smca_r50_50ep", *SMALL)
    cfg.model.backbone = L(SwinTransformer)(
        embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), out_indices=(2, 3)
    )
    cfg.model.in_features = ["p2", "p3"]
    model = instantiate(cfg.model)
    assert model.neck.strides == [16, 32, 64]
    assert len(detect(model)) == 7


def test_the_number_of_scales_follows_from_the_features():
    cfg = load("smca_conv_r50_50ep", "model.in_features=[res4,res5]", "model.num_extra_scales=3")
    model = build_without_memory(cfg)
    assert model.encoder.num_scales == model.decoder.num_scales == len(model.scale_embed.weight)


def yacs_config(name):
    cfg = get_cfg()
    add_smca_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "yacs" / f"{name}.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def test_yacs_and_lazy_config_make_the_same_model():
    name = "smca_single_scale_r50_50ep"
    settings = {"DECODER.MODULATION.MAP": "single", "DECODER.MODULATION.BETA": 4.0}
    cfg = yacs_config(name)
    cfg.merge_from_list([x for k, v in settings.items() for x in (f"MODEL.SMCA.{k}", v)])
    from_yacs = build_model(cfg)
    overrides = [f"model.{key.lower()}={value}" for key, value in settings.items()]
    from_lazy = instantiate(load(name, *overrides).model)
    from_lazy.load_state_dict(from_yacs.state_dict())  # the same parameters
    ours, theirs = detect(from_lazy), detect(from_yacs)
    assert torch.equal(ours.scores, theirs.scores)
    assert torch.equal(ours.pred_boxes.tensor, theirs.pred_boxes.tensor)


def test_yacs_takes_any_model_of_timm_as_the_backbone():
    cfg = yacs_config("smca_r50_50ep")
    cfg.MODEL.SMCA.merge_from_list(
        ["TIMM", "resnet18", "NUM_QUERIES", 7, "IN_FEATURES", ["res3", "res4"]]
    )
    model = build_model(cfg)
    assert isinstance(model.backbone, TimmBackbone) and model.backbone.name == "resnet18"
    assert model.neck.strides == [8, 16, 32] and len(detect(model)) == 7


def test_yacs_setting_that_the_model_lacks_is_named():
    cfg = yacs_config("smca_r50_50ep")
    cfg.MODEL.SMCA.ENCODER.KERNEL_SIZE = 5
    with pytest.raises(ConfigError, match="ENCODER.KERNEL_SIZE.*smca_r50_50ep"):
        build_model(cfg)


@pytest.mark.parametrize(
    ("name", "override", "message"),
    [
        ("smca_conv_r50_50ep", "model.encoder.kernel_size=4", "model.encoder.kernel_size=4 must"),
        ("smca_r50_50ep", "model.decoder.modulation.beta=0", "decoder.modulation.beta=0 must be a"),
        ("smca_r50_50ep", "model.decoder.refine=True", "decoder.refine=True and queries with"),
        ("smca_r50_50ep", "model.decoder.num_scales=2", "give 3 scales, but the decoder is made"),
        ("smca_r50_50ep", "model.encoder.pattern=IXI", "model.encoder.pattern='IXI' may only"),
        ("smca_r50_50ep", "model.backbone.depth=51", "model.backbone.depth=51 must be one of"),
        ("smca_r50_50ep", "model.num_queries=0", "model.num_queries=0 must be at least 1"),
        ("smca_plus_r50_12ep", "model.num_queries=-1", "model.num_queries=-1 must be at least 1"),
        # What the encoder is given is a reference to the model's.
        ("smca_r50_50ep", "model.embed_dim=30", "model.embed_dim=30 must be a multiple of"),
        ("smca_plus_shapes", "model.embed_dim=24", "model.embed_dim=24 and hidden_dim=64 must be"),
        ("smca_shapes", "model.in_features=[res9]", "model.in_features=[res9] must be some"),
        ("smca_r50_50ep", "model.encoder._target_=no.Such", "There is no model.encoder._target_="),
        ("smca_r50_50ep", "model.encoder=null", "model.encoder has to be a section, it"),
        ("smca_r50_50ep", "model.encoder=I", "model.encoder has to be a section, it cannot be 'I'"),
        ("smca_r50_50ep", "model.num_queries=abc", "model.num_queries has to be a whole number"),
        ("smca_r50_50ep", "model.num_queries=1.5", "model.num_queries has to be a whole number"),
        ("smca_r50_50ep", "model.dropout=[]", "model.dropout has to be a number, it cannot be []"),
        ("smca_r50_50ep", "model.in_features=res3", "model.in_features has to be a list of texts"),
        ("smca_r50_50ep", "model.backbone.norm=XX", "The config's model.backbone cannot be built"),
    ],
)
def test_what_cannot_be_built_is_said_with_its_full_key(name, override, message):
    with torch.device("meta"), pytest.raises(ConfigError) as error:
        build(load(name, override).model)
    assert message in str(error.value)


class Broken(torch.nn.Module):
    """With a slip of the pen in its code."""

    def __init__(self):
        super().__init__()
        self.weight = undefined  # noqa: F821


def test_an_error_in_code_keeps_its_traceback_and_says_where_it_is(caplog):
    cfg = OmegaConf.create({"model": {"part": {"_target_": f"{__name__}.Broken"}}})
    with caplog.at_level("DEBUG", "smca"), pytest.raises(ConfigError) as error:
        build(cfg.model.part)
    words = "The config's model.part cannot be built: NameError: name 'undefined' is not defined ("
    assert words in str(error.value)
    assert ", line " in str(error.value) and "\n" not in str(error.value)
    assert "Traceback" in caplog.text and "test_configs.py" in caplog.text


def test_an_error_in_the_code_of_a_config_says_its_line(tmp_path):
    (tmp_path / "mine.py").write_text("a = 1\nb = a.nothing\n")
    with pytest.raises(ConfigError, match=r"AttributeError: .*nothing.*mine.py, line 2\)"):
        load_config(str(tmp_path / "mine.py"))
