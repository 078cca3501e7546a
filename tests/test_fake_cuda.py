"""The models on a GPU that is not there: which tensors stay on the host, and how often it waits."""

import contextlib

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only

from helpers import build_model, make_image, needs_fake_gpu
from smca.engine import Trainer

pytestmark = needs_fake_gpu
aten = torch.ops.aten
GPU = torch.device("cuda:0")

SIZES = ["model.embed_dim=16", "model.num_queries=6", "model.num_classes=3"]
SIZES += ["model.backbone.depth=18", "model.backbone.num_blocks=[1,1,1,1]"]
SIZES += ["model.decoder.num_layers=2", "model.decoder.ffn_dim=16", "model.decoder.num_heads=2"]
ATTENTION = ["model.encoder.ffn_dim=16", "model.encoder.num_heads=2"]
MODELS = {
    "single-scale": ("smca_single_scale_r50_50ep", [*ATTENTION, "model.encoder.pattern=I"]),
    "multi-scale": ("smca_r50_50ep", [*ATTENTION, "model.encoder.pattern=IM"]),
    "conv": ("smca_conv_r50_50ep", ["model.encoder.num_layers=1", "model.encoder.ffn_dim=16"]),
    "DETR": ("detr_r50_50ep", [*ATTENTION, "model.encoder.pattern=I"]),
    "plus": ("smca_plus", [*ATTENTION, "model.encoder.pattern=IM"]),
}
DTYPES = {"float32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
each_model_and_type = pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "bf16") for name in MODELS), ("multi-scale", "float32"), ("multi-scale", "fp16")],
)


class FakeGpu(FakeTensorMode):
    """Tensors on `GPU` have no data. Those on the host are real, and never mix with the others.

    Attributes:
        waits: the operations at which the host has to wait for the GPU, with its tensor's shape: a
            copy to the host; one from the host that is not non_blocking, for PyTorch then
            synchronizes the stream; and a result whose value or shape the data decide.
    """

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        to_gpu = torch.device(kwargs.get("device") or "cpu").type == "cuda"
        on_gpu = [x for x in tensors if isinstance(x, FakeTensor)]
        if not on_gpu and not to_gpu:
            return func(*args, **kwargs)
        if self._waits(func, tensors, args, kwargs):
            self.waits.append((str(func), tuple(tensors[0].shape)))
        if func is aten._local_scalar_dense.default:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten.copy_.default and not isinstance(args[0], FakeTensor):
            return args[0].zero_()
        # A real tensor becomes a fake one of the host, which PyTorch refuses beside the GPU's
        # (but for one of a single number, as it does on a real GPU).
        args, kwargs = tree_map_only(torch.Tensor, self._without_data, (args, kwargs))
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(out, FakeTensor) and out.device.type == "cpu":
            return torch.zeros(out.shape, dtype=out.dtype)
        return out

    def _without_data(self, x):
        if isinstance(x, FakeTensor):
            return x
        settings = {"dtype": x.dtype, "device": x.device}
        make = aten.empty_strided.default
        return super().__torch_dispatch__(make, (), (x.shape, x.stride()), settings)

    @staticmethod
    def _waits(func, tensors, args, kwargs):
        if func is aten._to_copy.default:
            source = tensors[0].device.type
            target = torch.device(kwargs.get("device") or source).type
            blocking = not kwargs.get("non_blocking", False)
            return source != target and (blocking or target == "cpu")
        if func is aten.copy_.default:
            target, source = (x.device.type for x in tensors[:2])
            blocking = not (len(args) > 2 and args[2])
            return source != target and (blocking or target == "cpu")
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
        tags = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
        return any(tag in func.tags for tag in tags)


@pytest.fixture
def gpu(monkeypatch):
    # PyTorch's own takes a fake tensor's numbers one by one, and a real one's in a single copy.
    # There are no numbers, so these are zeros.
    monkeypatch.setattr(FakeTensor, "tolist", lambda x: np.zeros(x.cpu().shape).tolist())
    # Without a GPU autocast would disable itself.
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    with FakeGpu() as mode:
        yield mode


def model_on_gpu(gpu, name):
    config, overrides = MODELS[name]
    model = build_model(config, *SIZES, *overrides).to(GPU)
    gpu.waits.clear()
    return model


def batch(num_objects=(2, 1)):
    """On the host: two images of different sizes, and so many objects in each."""
    items = []
    for (height, width), count in zip([(64, 96), (90, 64)], num_objects):
        instances = Instances((height, width))
        instances.gt_boxes = Boxes(torch.tensor([[1.0, 2.0, 30.0, 40.0]] * count).view(-1, 4))
        instances.gt_classes = torch.ones(count, dtype=torch.long)
        image = torch.from_numpy(make_image(height, width).transpose(2, 0, 1).copy())
        items.append({"image": image, "instances": instances, "height": 200, "width": 300})
    return items


@contextlib.contextmanager
def autocast(dtype):
    with torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        assert torch.is_autocast_enabled("cuda") == (dtype is not None)
        yield


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_built_on_a_gpu(gpu, name, monkeypatch):
    # PyTorch cannot change the memory format of a fake parameter in place.
    monkeypatch.setattr(torch.utils, "swap_tensors", lambda old, new: None)
    config, overrides = MODELS[name]
    with GPU:
        model = build_model(config, *SIZES, *overrides)
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device for tensor in tensors} == {GPU}


@each_model_and_type
def test_inference_does_not_wait_for_the_gpu(gpu, name, dtype):
    model = model_on_gpu(gpu, name).eval()
    with torch.no_grad(), autocast(DTYPES[dtype]):
        results = [output["instances"] for output in model(batch())]
    assert gpu.waits == []
    for result in results:
        assert len(result) == 6 and result.image_size == (200, 300)
        for value in (result.pred_boxes, result.scores, result.pred_classes, result.query_indices):
            assert value.device == GPU


@each_model_and_type
def test_the_losses_wait_for_the_matcher_alone(gpu, name, dtype):
    model = model_on_gpu(gpu, name).train()
    with autocast(DTYPES[dtype]):
        losses = model(batch())
    # Costs of 2 layers (and the proposals), 2 images, 6 queries and at most 2 objects.
    num_layers = 3 if name == "plus" else 2
    assert gpu.waits == [("aten._to_copy.default", (num_layers, 2, 6, 2))]
    assert all(loss.device == GPU and loss.dtype == torch.float32 for loss in losses.values())


def test_images_without_objects_add_no_wait(gpu):
    model = model_on_gpu(gpu, "multi-scale").train()
    for num_objects in ((0, 3), (0, 0)):
        gpu.waits.clear()
        model(batch(num_objects))
        assert gpu.waits == [("aten._to_copy.default", (2, 2, 6, max(num_objects)))]


def set_gradients(model):
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
def test_a_step_of_training_waits_twice(gpu, dtype, monkeypatch):
    model = model_on_gpu(gpu, "multi-scale")
    # The backward pass itself needs a GPU's driver.
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: set_gradients(model))
    optimizer = torch.optim.AdamW(model.parameters(), foreach=True)
    trainer = Trainer(model, [batch()] * 2, optimizer, amp_dtype=DTYPES[dtype], clip_grad_norm=0.1)
    trainer.train(0, 2)  # in the first step AdamW makes its state
    # The matcher's costs, and six losses with the norm of the gradient, the loss's scale and
    # whether one of three signals came.
    assert gpu.waits == [
        ("aten._to_copy.default", (2, 2, 6, 2)),
        ("aten._to_copy.default", (11,)),
    ] * 2  # fmt: skip


# ------------------------------------------------------------- what the fake GPU itself notices


@pytest.mark.parametrize(
    "ask",
    [
        lambda x: bool(x > 0),
        lambda x: x.to("cpu", non_blocking=True),
        lambda x: torch.zeros(()).copy_(x),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: torch.zeros(1, device=GPU).index_put_((x > 0,), x),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor(1.0, device=GPU),
        lambda x: torch.zeros(1).to(GPU),
        lambda x: x.tolist(),
    ],
)
def test_a_wait_is_noticed(gpu, ask):
    x = torch.ones((), device=GPU)
    try:
        ask(x)
    except RuntimeError:  # a shape that the data decide does not exist
        pass
    assert len(gpu.waits) == 1


def test_what_does_not_wait_is_not_counted(gpu):
    x = torch.ones(3, device=GPU)
    x = x[torch.tensor([0, 1]).to(GPU, non_blocking=True)] + 1 + torch.tensor(2.0)
    x.copy_(torch.zeros(2), non_blocking=True)
    x[x.argsort()] = 0.5
    assert x.to(GPU).sum().device == GPU and gpu.waits == []
