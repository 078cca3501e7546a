#!/usr/bin/env python3
"""Parameters and GFLOPs of the configs' models, beside the paper's.

    python benchmarks/analyze_model.py                    # the main models
    python benchmarks/analyze_model.py configs/detr_r50_50ep.py model.num_queries=100

GFLOPs are multiply-adds of one image, counted by fvcore while the model runs: convolutions, matrix
products and norms (frozen ones are part of the convolutions), and the two products of fused
attention, which fvcore does not know.
"""

import sys
from pathlib import Path
from typing import Any, List, Sequence, Tuple

from smca.config import load_config
from smca.errors import command_line, exit_code

import torch
from detectron2.config import instantiate
from detectron2.utils.analysis import FlopCountAnalysis, parameter_count
from fvcore.nn.jit_handles import get_shape
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
# Published parameters (M) and GFLOPs.
PUBLISHED = {
    "smca_r50_50ep": (40, 152),
    "smca_r101_50ep": (58, 218),
    "smca_single_scale_r50_50ep": (42, 86),
    "smca_conv_r50_50ep": (41, None),
    "smca_conv_r101_50ep": (60, None),
    "detr_r50_50ep": (41, 86),
}


def attention_flops(inputs: Sequence[Any], outputs: Sequence[Any]) -> int:
    """Multiply-adds of q k^T and of its softmax times v, of the operator's traced values."""
    query, key, value = (get_shape(x) for x in inputs[:3])
    batch, heads, num_queries, width = query
    return batch * heads * num_queries * key[2] * (width + value[3])


def count_work(model: nn.Module, height: int, width: int) -> FlopCountAnalysis:
    """Multiply-adds of one image of `height` x `width` pixels, by operator and by module."""
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    flops = FlopCountAnalysis(model.eval(), ([{"image": image}],))
    flops.set_op_handle("aten::scaled_dot_product_attention", attention_flops)
    return flops.unsupported_ops_warnings(False).uncalled_modules_warnings(False)


def analyze(cfg: DictConfig, height: int, width: int) -> Tuple[int, int, int]:
    """Count the parameters and the work of a config's model for an image of a size in pixels.

    Returns:
        Trainable parameters, all parameters, multiply-adds of one image.
    """
    model = instantiate(cfg.model)
    flops = count_work(model, height, width)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, parameter_count(model)[""], sum(flops.by_operator().values())


def analyze_training(cfg: DictConfig, height: int, width: int) -> int:
    """Multiply-adds of one image forward and backward, without losses and optimizer.

    The gradients of inputs and of weights take as much as the forward pass each, but for the stages
    of the backbone that are frozen. What is computed twice to save memory counts once.
    """
    model = instantiate(cfg.model)
    flops = count_work(model, height, width)
    frozen = sum(
        flops.by_module()[f"model.backbone.{name}"]  # inside Detectron2's wrapper
        for name, stage in model.backbone.named_children()
        if not any(p.requires_grad for p in stage.parameters())
    )
    return 3 * sum(flops.by_operator().values()) - 2 * frozen


def main() -> None:
    """Print the table."""
    parser = command_line(__doc__)
    parser.add_argument("config", nargs="?", help="one config; the main models if left out")
    parser.add_argument("opts", nargs="*", help="LazyConfig overrides, key=value")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 1066), metavar=("H", "W"))
    args = parser.parse_args()
    files = [args.config] if args.config else [CONFIGS / f"{name}.py" for name in PUBLISHED]
    rows: List[List[Any]] = []
    for file in tqdm(files, unit="model", disable=None):
        trainable, total, flops = analyze(load_config(str(file), args.opts), *args.size)
        published = PUBLISHED.get(Path(file).stem, (None, None))
        rows.append(
            [Path(file).stem, trainable, f"{total / 1e6:.1f}", published[0]]
            + [f"{flops / 1e9:.1f}", published[1]]
        )
    headers = ["config", "trainable parameters", "parameters (M)", "paper", "GFLOPs", "paper"]
    print(f"One image of {args.size[0]} x {args.size[1]} pixels, multiply-adds")
    print(tabulate(rows, headers=headers, tablefmt="github", missingval="-"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
