"""Any model of timm as a backbone."""

import math
from typing import Any, Dict, List, Sequence

import torch
import torch.nn.functional as F
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn


class TimmBackbone(Backbone):
    """A model of `timm <https://github.com/huggingface/pytorch-image-models>`_ that gives features.

    Features are called as in Detectron2's ResNets: res2 has stride 4, and so on to res5 with
    stride 32. Weights start at random; ``train.init_checkpoint=timm://NAME.TAG`` loads timm's.

    Args:
        name: of the model in timm, such as "resnet18" or "convnext_tiny".
        out_features: among res2, ..., res5. Parts after the last one are not built.
        freeze: names of the model's modules that do not learn, with their norms' statistics.
        freeze_norms: batch norms keep their weights and statistics, as pretrained ones should in
            small batches.
        kwargs: further arguments of ``timm.create_model``.

    Raises:
        ValueError: timm has no such model, or the model no such feature.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        freeze: Sequence[str] = (),
        freeze_norms: bool = True,
        **kwargs: Any,
    ):
        super().__init__()
        try:
            import timm
            import timm.layers
            import timm.utils
        except ImportError as error:
            raise ImportError("TimmBackbone needs timm: run pip install timm.") from error
        if not timm.is_model(name):
            similar = ", ".join(timm.list_models(f"*{name}*")[:5]) or "see timm.list_models()"
            raise ValueError(f"timm has no model {name!r}: {similar}.")
        with torch.device("meta"):  # only to see what features there are
            whole: Any = timm.create_model(name, features_only=True, **kwargs)
        info = whole.feature_info
        indices = {f"res{int(math.log2(r))}": i for i, r in enumerate(info.reduction())}
        unknown = [feature for feature in out_features if feature not in indices]
        if unknown or not out_features:
            known = ", ".join(indices)
            raise ValueError(f"out_features={list(out_features)} must be some of {known}.")
        out_features = sorted(out_features)  # fine to coarse, as timm gives them
        out_indices = [info.out_indices[indices[feature]] for feature in out_features]
        model: Any = timm.create_model(name, features_only=True, out_indices=out_indices, **kwargs)
        sizes = zip(model.feature_info.channels(), model.feature_info.reduction())
        self._shapes = {
            feature: ShapeSpec(channels=channels, stride=stride)
            for feature, (channels, stride) in zip(out_features, sizes, strict=True)
        }
        if freeze_norms:
            model = timm.layers.freeze_batch_norm_2d(model)
        _pad_alike(model)
        absent = set(freeze) - set(dict(model.named_modules()))
        if absent:
            raise ValueError(f"freeze names {absent.pop()!r}, which {name} does not have.")
        if freeze:
            timm.utils.freeze(model, list(freeze))
        self.name = name.split(".")[0]
        self.model = model

    def forward(self, x: Tensor) -> Dict[str, Tensor]:
        """(B, 3, h, w) normalized images to (B, c, h / stride, w / stride) by feature."""
        return dict(zip(self._shapes, self.model(x)))

    def output_shape(self) -> Dict[str, ShapeSpec]:
        return self._shapes


class _PaddedConv2d(nn.Conv2d):
    """A convolution with "same" padding as TensorFlow has it for sizes that the stride divides. Any
    other size counts as padded with zeros to the next of these."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c', ceil(h / stride), ceil(w / stride))"""
        pads: List[int] = []
        for kernel, stride, dilation in zip(self.kernel_size, self.stride, self.dilation):
            total = max((kernel - 1) * dilation + 1 - stride, 0)
            pads = [total // 2, total - total // 2 + stride - 1, *pads]
        return self._conv_forward(F.pad(x, pads), self.weight, self.bias)


def _pad_alike(module: nn.Module) -> None:
    """Replace convolutions whose padding depends on the size of the image, which graphs for images
    of any size cannot hold well."""
    from timm.layers import Conv2dSame

    for name, child in module.named_children():
        if isinstance(child, Conv2dSame):
            names = ["in_channels", "out_channels", "kernel_size", "stride", "dilation", "groups"]
            arguments = {name: getattr(child, name) for name in names}
            padded = _PaddedConv2d(**arguments, bias=child.bias is not None, device="meta")
            padded.weight, padded.bias = child.weight, child.bias
            setattr(module, name, padded)
        else:
            _pad_alike(child)
