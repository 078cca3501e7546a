"""DETR's ResNets, put together from Detectron2's blocks, and faster frozen batch norm."""

from typing import Any, Dict, Optional, Sequence, Tuple

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone import BasicStem, ResNet
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn

from .layers import autocast_dtype

# Blocks in each stage, by depth.
_NUM_BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


def build_resnet(
    *,
    depth: int,
    out_features: Sequence[str],
    norm: str,
    freeze_at: int,
    dilated_res5: bool = False,
    num_blocks: Optional[Sequence[int]] = None,
    width: int = 64,
) -> ResNet:
    """A ResNet as torchvision's weights want it: the stride is in the 3x3 convolution.

    Detectron2's `ResNet.make_default_stages` can neither dilate the last stage alone nor make
    smaller networks, and its `build_resnet_backbone` needs a yacs config.

    Args:
        depth: 18, 34, 50 or 101.
        out_features: among res2, ..., res5 (strides 4, ..., 32).
        norm: "FrozenBN" for pretrained weights; "GN" trains from scratch in small batches.
        freeze_at: 2 freezes the stem and res2 (DETR), 0 nothing.
        dilated_res5: res5 keeps res4's stride and dilates its convolutions (DC5).
        num_blocks: blocks of each stage in place of the depth's own, to make a smaller network.
        width: channels of the stem and of res2's 3x3 convolutions, 64 in pretrained weights. Each
            later stage has twice as many as the one before.
    """
    if depth not in _NUM_BLOCKS:
        raise ValueError(f"depth={depth} must be one of {sorted(_NUM_BLOCKS)}.")
    bottleneck = depth >= 50
    if dilated_res5 and not bottleneck:
        raise ValueError("dilated_res5=True needs depth 50 or 101.")
    num_blocks = num_blocks or _NUM_BLOCKS[depth]
    names = ["stem", *(f"res{index + 2}" for index in range(len(num_blocks)))]
    if not out_features or not set(out_features) <= set(names):
        given, known = ", ".join(out_features), ", ".join(names)
        raise ValueError(f"out_features=[{given}] must be some of {known}.")
    stages, in_channels = [], width
    for index, blocks in enumerate(num_blocks):
        channels = width * 2**index
        out_channels = 4 * channels if bottleneck else channels
        dilated = dilated_res5 and index == 3
        stride = 1 if index == 0 or dilated else 2
        kwargs: Dict[str, Any] = dict(stride_per_block=[stride] + [1] * (blocks - 1), norm=norm)
        kwargs.update(in_channels=in_channels, out_channels=out_channels)
        if bottleneck:
            kwargs.update(bottleneck_channels=channels, stride_in_1x1=False)
        if dilated:
            # As torchvision's replace_stride_with_dilation: the first block is not dilated.
            kwargs["dilation_per_block"] = [1] + [2] * (blocks - 1)
        block = BottleneckBlock if bottleneck else BasicBlock
        stages.append(ResNet.make_stage(block, blocks, **kwargs))
        in_channels = out_channels
    stem = BasicStem(in_channels=3, out_channels=width, norm=norm)
    resnet = ResNet(stem, stages, out_features=list(out_features), freeze_at=freeze_at)
    fold_frozen_norms(resnet)
    return resnet


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution with its frozen batch norm folded into weight and bias.

    norm(conv(x)) = s (w * x) + b - s m = (s w) * x + (b - s m), with s = weight / sqrt(variance +
    eps). Folding costs a pass over the weights and saves two over the much larger output, in
    training too. Parameters, buffers and their names stay as they are. What does not change from
    call to call is kept, in autocast's type: the norm's factor and shift, and without gradients the
    weight.
    """

    norm: Optional[nn.Module]
    # What of, with the tensors to hold on to them; factor or weight; shift.
    _kept: Tuple[Any, ...] = (None,)

    @classmethod
    def like(cls, convolution: Conv2d) -> "FrozenNormConv2d":
        """A convolution that shares the parameters, norm and settings of another."""
        names = ["in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"]
        names += ["groups", "padding_mode", "norm", "activation"]
        arguments = {name: getattr(convolution, name) for name in names}
        with torch.device("meta"):  # which draws no random numbers
            folded = cls(bias=convolution.bias is not None, **arguments)
        folded.weight, folded.bias = convolution.weight, convolution.bias
        return folded.train(convolution.training)

    def forward(self, x: Tensor) -> Tensor:
        """(B, c, h, w) -> (B, c', h', w')"""
        norm = self.norm
        if not isinstance(norm, FrozenBatchNorm2d):
            return super().forward(x)
        x = self._conv_forward(x, *self._fold(norm))
        return x if self.activation is None else self.activation(x)

    def _fold(self, norm: FrozenBatchNorm2d) -> Tuple[Tensor, Tensor]:
        """Weight and bias of the convolution and its norm in one."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        cannot_keep = torch.compiler.is_compiling() or torch.is_inference_mode_enabled()
        if cannot_keep or (learns and self.bias is not None):
            factor, shift = self._factor_and_shift(norm)
            return self.weight * factor, shift
        dtype = autocast_dtype(self.weight)
        tensors = [*norm.buffers(), *(() if learns else self.parameters())]
        made_of = dtype, learns, [(id(t), t._version, t.device, t.dtype) for t in tensors]
        kept = self._kept
        if kept[0] != made_of:
            with torch.no_grad():
                factor, shift = self._factor_and_shift(norm)
                first = factor if learns else (self.weight * factor).to(dtype)
            kept = self._kept = made_of, first, shift.to(dtype), tensors
        return self.weight * kept[1] if learns else kept[1], kept[2]

    def _factor_and_shift(self, norm: FrozenBatchNorm2d) -> Tuple[Tensor, Tensor]:
        """What the norm makes of the weight, and of the bias."""
        factor = norm.weight * (norm.running_var + norm.eps).rsqrt()
        mean = norm.running_mean if self.bias is None else norm.running_mean - self.bias
        return factor[:, None, None, None], norm.bias - mean * factor

    @torch.no_grad()
    def absorb_norm(self) -> None:
        """Take the frozen norm into weight and bias for good: the same function without the norm's
        buffers, for graphs that are not trained further."""
        norm = self.norm
        if isinstance(norm, FrozenBatchNorm2d):
            weight, bias = self._fold(norm)
            self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
            self._kept = (None,)
            self.norm = None


def fold_frozen_norms(module: nn.Module) -> nn.Module:
    """The module with a `FrozenNormConv2d` of the same parameters, buffers and names in place of
    every Detectron2 convolution that a `FrozenBatchNorm2d` follows.

    For a backbone of your own: ``L(fold_frozen_norms)(module=L(MyBackbone)(...))``.
    """
    if type(module) is Conv2d and isinstance(module.norm, FrozenBatchNorm2d):
        return FrozenNormConv2d.like(module)
    for name, child in module.named_children():
        setattr(module, name, fold_frozen_norms(child))
    return module
