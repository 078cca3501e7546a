"""What encoder, decoder and heads share."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.ops import MLP


class FeedForward(nn.Module):
    """linear, ReLU, dropout, linear, dropout, added to the input and normalized (post-norm)."""

    def __init__(self, embed_dim: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.linear1 = nn.Linear(embed_dim, ffn_dim)
        self.linear2 = nn.Linear(ffn_dim, embed_dim)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(embed_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, N, d)"""
        hidden = self.dropout(F.relu(self.linear1(tokens)))
        return self.norm(tokens + self.dropout(self.linear2(hidden)))


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The type that linear layers and convolutions compute in: autocast's, else the tensor's."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def mlp(embed_dim: int, out_dim: int) -> MLP:
    """Three linear layers d, d, d -> out_dim with ReLU between."""
    return MLP(embed_dim, [embed_dim, embed_dim, out_dim])


def class_head(embed_dim: int, num_classes: int) -> nn.Linear:
    """A linear layer whose classes start at a probability of 0.01 (focal loss, section 4.1)."""
    head = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(head.bias, -math.log((1 - 0.01) / 0.01))
    return head


def xavier_uniform(module: nn.Module) -> None:
    """Xavier uniform for every weight of more than one dimension; the attentions' q, k and v are
    one stacked tensor and drawn as one (DETR)."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def run_layer(layer: nn.Module, checkpointing: bool, *args: Any) -> Any:
    """``layer(*args)``; with checkpointing its activations are not kept but computed again, with
    the same dropout, in the backward pass. Every tensor has to be in the arguments."""
    return _run_checkpointed(layer, *args) if checkpointing else layer(*args)


@torch.compiler.disable(recursive=False)
def _run_checkpointed(layer: nn.Module, *args: Any) -> Any:
    # PyTorch 2.14 fails to trace several of them with sizes that change; the layers are compiled.
    return checkpoint(layer, *args, use_reentrant=False)
