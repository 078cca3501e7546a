"""Run by test_gpu_operations.py with fake_cuda.c as CUDA's library: prints, as JSON, the kernels
that attention takes, and how many operations and waits the configs' models have on the GPU."""

import collections
import ctypes
import json
import sys

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import smca.modeling.kernels  # noqa: F401  which has settings

GPU = torch.device("cuda:0")
# Not views, but they run nothing on the GPU either.
NOTHING = {"empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "detach"}
NOTHING |= {"alias", "lift_fresh", "_unsafe_view", "device", "_fused_sdp_choice"}
# The number of layers and operations is the config's, their width is not.
NARROW = ["model.embed_dim=64", "model.num_queries=20", "model.num_classes=5"]
NARROW += ["model.encoder.ffn_dim=64", "model.decoder.ffn_dim=64", "+model.backbone.width=8"]


class Counter(TorchDispatchMode):
    """Counts operations on the GPU by name."""

    def __init__(self):
        super().__init__()
        self.names = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((out, args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in tensors) and not func.is_view and name not in NOTHING:
            self.names[name] += 1
        return out


def kernels():
    """{"bf16 masked dropout": kernel} of training, with a bias that has a gradient as well."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for bias in (None, "mask", "map"):
            for dropout in (0.0, 0.1):
                query, key = (
                    torch.empty(2, 8, n, 32, dtype=dtype, device=GPU, requires_grad=True)
                    for n in (300, 1000)
                )
                mask = None
                if bias is not None:
                    shape = (2, 1, 1, 1000) if bias == "mask" else (2, 8, 300, 1000)
                    grad = bias == "map"
                    mask = torch.empty(shape, dtype=dtype, device=GPU, requires_grad=grad)
                with Counter() as counter:
                    F.scaled_dot_product_attention(query, key, key, mask, dropout)
                names = [name for name in counter.names if "scaled_dot_product" in name]
                words = [str(dtype)[6:], bias or "plain", "dropout" if dropout else ""]
                kernel = names[0].split("product_")[1].split("_")[0] if names else "math"
                found[" ".join(filter(None, words))] = kernel
    return found


def operations(config):
    """Of inference of an image and of a training step with padding, in bfloat16."""
    from helpers import build_model
    from test_fake_cuda import batch

    driver = ctypes.CDLL(None)
    model = build_model(config, *NARROW).to(GPU)
    found = {}
    for name, items in (("inference", batch()[:1]), ("training", batch())):
        model.train(name == "training")
        for _ in range(2):  # the first call makes what is kept
            model.zero_grad()
            waits = driver.count_waits()
            with Counter() as counter, torch.set_grad_enabled(model.training):
                with torch.autocast("cuda", dtype=torch.bfloat16):
                    out = model(items)
                if model.training:
                    torch.stack(list(out.values())).sum().backward()
            found[name] = sum(counter.names.values()), driver.count_waits() - waits
    return found


if __name__ == "__main__":
    torch.cuda._lazy_init = lambda: None
    torch.cuda.current_device = lambda: 0
    torch.cuda.is_bf16_supported = lambda: True
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    with FakeTensorMode():
        found = {"kernels": kernels()}
    for config in sys.argv[1:]:
        from test_fake_cuda import FakeGpu

        with FakeGpu():
            found[config] = operations(config)
    print(json.dumps(found))
