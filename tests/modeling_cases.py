"""Small inputs and checks that the tests of the model's parts share."""

import re

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reference import resize_mask
from smca.modeling.matcher import Targets
from smca.modeling.scales import Scale

# (height, width) in pixels; the second is padded in a batch of both, at every stride up to 64.
IMAGE_SIZES = [(96, 128), (40, 60)]


def pixel_mask(image_sizes):
    """(B, H, W) mask, True on padding, of a batch padded to its largest height and width."""
    height = max(size[0] for size in image_sizes)
    width = max(size[1] for size in image_sizes)
    mask = torch.ones(len(image_sizes), height, width, dtype=torch.bool)
    for image_mask, (h, w) in zip(mask, image_sizes):
        image_mask[:h, :w] = False
    return mask


def make_scales(strides, image_sizes=None, num_channels=32, seed=0):
    """Scales with random features and positions, and the masks of the image sizes."""
    generator = torch.Generator().manual_seed(seed)
    mask = pixel_mask(image_sizes or IMAGE_SIZES)
    scales = []
    for stride in strides:
        size = (-(-mask.shape[1] // stride), -(-mask.shape[2] // stride))
        shape = (len(mask), size[0] * size[1], num_channels)
        scales.append(
            Scale(
                tokens=torch.randn(shape, generator=generator),
                position=torch.randn(shape, generator=generator),
                padding_mask=resize_mask(mask, *size).flatten(1),
                size=size,
                stride=stride,
            )
        )
    return scales


def random_predictions(num_layers, num_images, num_queries, num_classes, seed=0):
    """Logits (N, B, Q, C) and normalised cxcywh boxes (N, B, Q, 4)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (num_layers, num_images, num_queries)
    logits = 2 * torch.randn(*shape, num_classes, generator=generator)
    return logits, 0.05 + 0.9 * torch.rand(*shape, 4, generator=generator)


def make_targets(num_objects, num_classes, seed=0):
    """Targets with so many objects in each image."""
    generator = torch.Generator().manual_seed(seed + 1000)
    return [
        Targets(
            torch.randint(0, num_classes, (count,), generator=generator),
            0.1 + 0.8 * torch.rand(count, 4, generator=generator),
        )
        for count in num_objects
    ]


def randomize(module, seed=0):
    """Give every parameter random values, so that none is 0 or 1 where a mistake would not show."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                near_one = name.endswith(("weight", "spread.bias"))
                parameter.copy_(0.2 * noise + (1.0 if near_one else 0.0))
    return module


def assert_close(actual, expected, tolerance=1e-4):
    """Largest difference at most `tolerance` of the largest expected value (or of 1)."""
    assert actual.shape == expected.shape, f"{tuple(actual.shape)} != {tuple(expected.shape)}"
    bound = tolerance * max(expected.abs().max().item(), 1.0) if expected.numel() else 0
    difference = (actual - expected).abs().max().item() if expected.numel() else 0
    assert difference <= bound, f"differs by {difference:.2e}, allowed {bound:.2e}"


def assert_same_gradients(actual, expected, inputs, tolerance=1e-4):
    """Gradients of two (lists of) outputs by each of `inputs`, a dict name -> tensor."""
    generator = torch.Generator().manual_seed(0)
    actual = actual if isinstance(actual, (list, tuple)) else [actual]
    expected = expected if isinstance(expected, (list, tuple)) else [expected]
    weights = [torch.randn(output.shape, generator=generator) for output in expected]
    gradients = []
    for outputs in (actual, expected):
        total = sum((output * weight).sum() for output, weight in zip(outputs, weights))
        gradients.append(
            torch.autograd.grad(total, list(inputs.values()), retain_graph=True, allow_unused=True)
        )
    for name, got, wanted in zip(inputs, *gradients):
        assert (got is None) == (wanted is None), f"{name}: only one side uses it"
        if wanted is None:
            continue
        bound = tolerance * max(wanted.abs().max().item(), 1.0)
        difference = (got - wanted).abs().max().item()
        assert difference <= bound, f"{name}: differs by {difference:.2e}, allowed {bound:.2e}"


# Where the package's names differ from the official checkpoints'. Norms have their own rules below.
OFFICIAL_NAMES = [
    (r"self_attention\.", r"self_attn."),
    (r"co_attention\.", r"multihead_attn."),
    (r"ffn\.linear", r"linear"),
    (r"input_norm\.", r"norm4."),
    (r"modulation\.offset\.", r"point2."),
    (r"modulation\.spread\.", r"point3."),
    (r"scale_weight\.", r"point4."),
    (r"conv_in\.", r"conv_1."),
    (r"conv_out\.", r"conv_2."),
]


def official_name(name, part, module):
    """A parameter of the encoder or decoder (`part`) in the official checkpoint."""
    if name.startswith("reduce."):
        return name.replace("reduce.", "transformer.conv.")
    for pattern, official in OFFICIAL_NAMES:
        name = re.sub(pattern, official, name)
    name = re.sub(r"ffn\.norm\.", "norm2." if part == "encoder" else "norm3.", name)
    if part == "encoder":
        name = re.sub(r"(layers\.\d+)\.norm\.", r"\1.norm1.", name)
    name = re.sub(r"centre\.(\d)\.", lambda m: f"point1.layers.{int(m[1]) // 3}.", name)
    name = re.sub(r"intra\.(\d)\.", lambda m: f"self_attn_{8 << int(m[1])}.", name)
    shared = not any(".down.1." in key for key, _ in module.named_parameters())
    for ours, theirs in (("down", "high_to_low"), ("up", "low_to_high")):
        name = re.sub(
            rf"\b{ours}\.(\d)\.",
            lambda m, theirs=theirs: f"{theirs}." if shared else f"{theirs}_{int(m[1]) + 1}.",
            name,
        )
    return f"transformer.{part}.{name}"


def official_state_dict(module, part):
    """The parameters themselves, under the official names: gradients reach the module."""
    return {official_name(n, part, module): p for n, p in module.named_parameters()}


def assert_uniform(values, bound):
    """Values look drawn from uniform(-bound, bound)."""
    assert values.abs().max() <= bound * 1.0001
    spread = values.std().item() / (bound / 3**0.5)
    slack = 4 / values.numel() ** 0.5
    assert 1 - slack < spread < 1 + slack, f"{spread:.2f} times the expected standard deviation"


def leaves(tensors):
    """A dict of tensors as leaves that require gradients."""
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}


def with_leaves(scales):
    """The scales on leaf tokens and positions, and these leaves by name."""
    inputs = {}
    for i, scale in enumerate(scales):
        inputs[f"tokens{i}"] = scale.tokens
        inputs[f"position{i}"] = scale.position
    inputs = leaves(inputs)
    scales = [
        scale._replace(tokens=inputs[f"tokens{i}"], position=inputs[f"position{i}"])
        for i, scale in enumerate(scales)
    ]
    return scales, inputs


def valid_cells(tokens, scales):
    """Tokens with those under padding set to 0: what these hold has no meaning."""
    return [x.masked_fill(s.padding_mask[..., None], 0) for x, s in zip(tokens, scales)]


def weighted_sum(tensors):
    """A scalar that depends on every element, unlike the sum behind a LayerNorm."""
    generator = torch.Generator().manual_seed(0)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in tensors)


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operator returns."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        outputs = result if isinstance(result, (list, tuple)) else [result]
        for output in outputs:
            # A view that repeats one element (stride 0) holds no memory of its own.
            if isinstance(output, torch.Tensor) and 0 not in output.stride():
                self.num_elements = max(self.num_elements, output.numel())
        return result
