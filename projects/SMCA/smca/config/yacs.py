"""The yacs way to the same models, for ``DefaultPredictor`` and other tools that want one.

A yacs config names a LazyConfig of this project, which has all the defaults, and may replace its
main settings. Nothing is defined twice."""

import functools
from typing import Any, Dict

from detectron2.config import CfgNode, LazyCall, configurable, instantiate
from detectron2.modeling import META_ARCH_REGISTRY
from omegaconf import OmegaConf

from smca import modeling
from smca.config.lazy import load_config
from smca.errors import ConfigError

# Settings of `model` that a yacs config can replace under MODEL.SMCA; None leaves them as they
# are in the LazyConfig.
_SETTINGS = (
    "num_classes",
    "num_queries",
    "in_features",
    "dropout",
    "max_detections",
    "encoder.pattern",
    "encoder.num_layers",
    "encoder.kernel_size",
    "encoder.share_cross_scale",
    "decoder.num_layers",
    "decoder.modulation.map",
    "decoder.modulation.per_head",
    "decoder.modulation.beta",
    "decoder.modulation.offset_gain",
    "decoder.scale_selection",
)


def add_smca_config(cfg: CfgNode) -> None:
    """Add ``MODEL.SMCA``: ``CONFIG``, the LazyConfig's name (``"smca_r50_50ep"``) or path, a key
    for each setting, in capitals (``NUM_CLASSES``, ``ENCODER.PATTERN``, ...), and ``TIMM``, the
    name of a model of timm that gives the features ``IN_FEATURES`` in place of the LazyConfig's
    backbone.

    yacs' own keys for backbones are not read. Of the rest, ``MODEL.WEIGHTS``, ``MODEL.DEVICE`` and
    ``INPUT`` are used as always."""
    cfg.MODEL.SMCA = CfgNode({"CONFIG": "smca_r50_50ep", "TIMM": ""})
    for setting in _SETTINGS:
        *sections, name = setting.upper().split(".")
        node = cfg.MODEL.SMCA
        for section in sections:
            node = node.setdefault(section, CfgNode())
        node[name] = None


@META_ARCH_REGISTRY.register()
class SMCA(modeling.SMCA):
    """The meta-architecture ``SMCA`` of yacs configs: the model, built from ``cfg.MODEL.SMCA``."""

    @configurable
    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Dict[str, Any]:
        model = load_config(cfg.MODEL.SMCA.CONFIG, needed=["model"]).model
        if cfg.MODEL.SMCA.TIMM:
            model.backbone = LazyCall(modeling.TimmBackbone)(
                name=cfg.MODEL.SMCA.TIMM, out_features="${..in_features}"
            )
        for setting in _SETTINGS:
            value = functools.reduce(getattr, setting.upper().split("."), cfg.MODEL.SMCA)
            if value is None:
                continue
            section, _, name = setting.rpartition(".")
            if name not in ((OmegaConf.select(model, section) if section else model) or ()):
                raise ConfigError(
                    f"MODEL.SMCA.{setting.upper()} is set, but the model of "
                    f"{cfg.MODEL.SMCA.CONFIG} has no such setting: leave it out."
                )
            OmegaConf.update(model, setting, value)
        return {name: instantiate(value) for name, value in model.items() if name != "_target_"}
