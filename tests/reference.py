"""SMCA written out slowly: the reference that the tests compare the package with.

Plain functions on tensors and on a plain ``state_dict`` with the official checkpoints' key names.
Every map is built in full, heads and cells are visited in loops, and no code is shared with the
package.
`dropout` marks where the model drops, and drops nothing.

Shorthand for shapes: B images, Q queries, C classes, d channels, H heads, L scales, S = h * w cells
of one scale, T boxes of one image. Tokens are batch first, ``padding_mask`` is True on padding,
lists of scales run from fine to coarse.
"""

import math
from dataclasses import dataclass
from typing import Any, List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from scipy.optimize import linear_sum_assignment

# The squared distance of a scale is multiplied by this. Only models of several scales.
SCALE_FACTORS = {16: 0.5, 32: 1.0, 64: 2.0}

LOSS_WEIGHTS = {"loss_ce": 2.0, "loss_bbox": 5.0, "loss_giou": 2.0}


@dataclass
class Settings:
    """What a state dict alone does not say about its model."""

    decoder_layers: int = 6
    num_heads: int = 8
    modulation: str = "multi_head"  # or "head_shared", "none"
    spread: str = "independent"  # or "fixed", "single", "covariance"
    beta: float = 8.0
    scale_selection: bool = False


class Memory(NamedTuple):
    """What the decoder reads: of each scale (B, S_l, d) tokens and positions, the (B, S_l) padding
    mask, (h, w), and the stride."""

    tokens: List[Any]
    positions: List[Any]
    padding_masks: List[Any]
    shapes: List[Any]
    strides: List[int]


# -------------------------------------------------------------------------- positions and masks


def sine_position_encoding(padding_mask, num_features=128):
    """(B, h, w) mask to (B, 2 * num_features, h, w): the features of y, then those of x."""
    feature, halves = torch.arange(num_features), []
    for axis in (1, 2):
        count = (~padding_mask).double().cumsum(axis)
        angle = count / (count.select(axis, -1).unsqueeze(axis) + 1e-6) * 2 * math.pi
        phase = angle[..., None] / 10000 ** (2 * (feature // 2) / num_features)
        halves.append(torch.where(feature % 2 == 0, phase.sin(), phase.cos()))
    return torch.cat(halves, -1).permute(0, 3, 1, 2).float()


def resize_mask(padding_mask, height, width):
    """(B, H, W) pixel mask to (B, height, width): cell i is padding if pixel floor(i H / h) is."""
    rows = torch.arange(height) * padding_mask.shape[1] // height
    columns = torch.arange(width) * padding_mask.shape[2] // width
    return padding_mask[:, rows[:, None], columns]


# --------------------------------------------------------------------------------- small layers


def linear(state_dict, name, x):
    return x @ state_dict[name + ".weight"].T + state_dict[name + ".bias"]


def layer_norm(state_dict, name, x):
    return F.layer_norm(x, x.shape[-1:], state_dict[name + ".weight"], state_dict[name + ".bias"])


def dropout(x):
    """Where dropout is, for tests to put something else in its place."""
    return x


def mlp(state_dict, name, x):
    """Three linear layers with ReLU between."""
    for i in range(3):
        x = linear(state_dict, f"{name}.layers.{i}", x)
        x = x.relu() if i < 2 else x
    return x


def convolution(state_dict, name, x, stride=1, depthwise=False):
    """Convolution with bias and padding k // 2."""
    weight, bias = state_dict[name + ".weight"], state_dict[name + ".bias"]
    groups = x.shape[1] if depthwise else 1
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=groups)


def feed_forward(state_dict, name, x):
    hidden = dropout(linear(state_dict, name + ".linear1", x).relu())
    return dropout(linear(state_dict, name + ".linear2", hidden))


def to_tokens(feature_map):
    """(B, d, h, w) to (B, h * w, d)."""
    return feature_map.flatten(2).transpose(1, 2)


# ------------------------------------------------------------------------------------ attention


def project_qkv(state_dict, name, query, key, value):
    """The input projections, stacked as q, k, v in ``in_proj_weight`` (3 d, d)."""
    weights = state_dict[name + ".in_proj_weight"].chunk(3)
    biases = state_dict[name + ".in_proj_bias"].chunk(3)
    return [x @ w.T + b for x, w, b in zip((query, key, value), weights, biases)]


def attend(q, k, v, num_heads, padding_mask=None, log_weights=None):
    """Attention before its output projection.

    q (B, Q, d), k and v (B, S, d), already projected; padding_mask (B, S); log_weights (B, H, Q, S)
    is added to the logits. Returns (B, Q, d), head by head.
    """
    size = q.shape[-1] // num_heads
    heads = []
    for h in range(num_heads):
        part = slice(h * size, (h + 1) * size)
        logits = q[..., part] @ k[..., part].transpose(1, 2) / math.sqrt(size)  # (B, Q, S)
        if log_weights is not None:
            logits = logits + log_weights[:, h]
        if padding_mask is not None:
            logits = logits.masked_fill(padding_mask[:, None, :], float("-inf"))
        heads.append(dropout(logits.softmax(-1)) @ v[..., part])
    return torch.cat(heads, -1)


def self_attention(state_dict, name, x, pos, num_heads, padding_mask=None):
    """q = k = x + pos, v = x."""
    q, k, v = project_qkv(state_dict, name, x + pos, x + pos, x)
    return linear(state_dict, name + ".out_proj", attend(q, k, v, num_heads, padding_mask))


def log_weights(height, width, centers, spreads, mode, beta=8.0, factor=1.0):
    """The modulation of one scale, every cell of every head.

    centers (B, Q, H, 2): (x, y) in cells. spreads: None (fixed), or (B, Q, H, n) with n = 1
    (single), 2 (independent), 3 (covariance), as they come out of the linear layer.
    Returns (B, H, Q, h * w).
    """
    x = torch.arange(width, dtype=centers.dtype)
    rows = []
    for y in range(height):
        dx2 = (x - centers[..., 0:1]) ** 2  # (B, Q, H, w)
        dy2 = (y - centers[..., 1:2]) ** 2  # (B, Q, H, 1)
        if mode == "fixed":
            distance = dx2 + dy2
        elif mode == "single":
            distance = spreads[..., 0:1] ** 2 * (dx2 + dy2)
        else:
            distance = spreads[..., 0:1] ** 2 * dx2 + spreads[..., 1:2] ** 2 * dy2
            if mode == "covariance":
                distance = distance + spreads[..., 2:3] ** 2 * dx2 * dy2
        rows.append(-factor * distance / beta)
    return torch.cat(rows, -1).transpose(1, 2)


def modulated_co_attention(
    state_dict, name, query, memory, maps=None, scale_weights=None, num_heads=8
):
    """Co-attention with the softmax taken within each scale.

    query (B, Q, d), with its positions; maps: list of (B, H, Q, S_l) or None; scale_weights
    (B, Q, L), or None for 1 each. Returns (B, Q, d).
    """
    total = 0
    for level, (tokens, pos, mask, *_) in enumerate(zip(*memory)):
        q, k, v = project_qkv(state_dict, name, query, tokens + pos, tokens)
        read = attend(q, k, v, num_heads, mask, None if maps is None else maps[level])
        if scale_weights is not None:
            read = read * scale_weights[:, :, level : level + 1]
        total = total + read
    return linear(state_dict, name + ".out_proj", total)


# -------------------------------------------------------------------------------------- decoder


def center_logits(state_dict, name, o):
    """``r`` (B, Q, 2), the center before its sigmoid."""
    return mlp(state_dict, name + ".point1", o)


def head_centers(state_dict, name, o, r, level, num_levels, stride, image_sizes, settings):
    """(B, Q, H, 2): each head's center on one scale, in cells. image_sizes: (h, w) in pixels."""
    sizes = torch.tensor([[w, h] for h, w in image_sizes], dtype=r.dtype)
    shared = r.sigmoid() * sizes[:, None, :] / stride
    centers = shared[:, :, None, :].repeat(1, 1, settings.num_heads, 1)
    if settings.modulation == "multi_head":
        blocks = linear(state_dict, name + ".point2", o).chunk(num_levels, -1)
        centers = centers + blocks[level].unflatten(-1, (settings.num_heads, 2))
    return centers


def head_spreads(state_dict, name, o, level, num_levels, settings):
    """(B, Q, H, n) before they are squared, or None where the spread is fixed."""
    if settings.spread == "fixed":
        return None
    block = linear(state_dict, name + ".point3", o).chunk(num_levels, -1)[level]
    if settings.modulation == "head_shared":
        return block[:, :, None, :].repeat(1, 1, settings.num_heads, 1)
    return block.unflatten(-1, (settings.num_heads, -1))


def modulation_maps(state_dict, name, o, r, shapes, strides, image_sizes, settings):
    """One (B, H, Q, S_l) map a scale. shapes: (h, w) of each scale."""
    maps = []
    for level, ((height, width), stride) in enumerate(zip(shapes, strides)):
        factor = SCALE_FACTORS[stride] if len(strides) > 1 else 1.0
        centers = head_centers(
            state_dict, name, o, r, level, len(strides), stride, image_sizes, settings
        )
        spreads = head_spreads(state_dict, name, o, level, len(strides), settings)
        maps.append(
            log_weights(height, width, centers, spreads, settings.spread, settings.beta, factor)
        )
    return maps


def decoder_layer(state_dict, name, tgt, query_pos, r, memory, image_sizes, settings):
    """One layer. r is None at the first layer, which predicts it. Returns the new (tgt, r)."""
    o = None  # where nothing reads it, its norm does not exist
    if name + ".norm4.weight" in state_dict:
        o = layer_norm(state_dict, name + ".norm4", tgt + query_pos)

    attended = self_attention(state_dict, name + ".self_attn", tgt, query_pos, settings.num_heads)
    tgt = layer_norm(state_dict, name + ".norm1", tgt + dropout(attended))

    maps, scale_weights = None, None
    if settings.modulation != "none":
        r = center_logits(state_dict, name, o) if r is None else r
        sizes = (memory.shapes, memory.strides, image_sizes)
        maps = modulation_maps(state_dict, name, o, r, *sizes, settings)
    if settings.scale_selection:
        scale_weights = linear(state_dict, name + ".point4", o).softmax(-1)
    attention, query = name + ".multihead_attn", tgt + query_pos
    read = modulated_co_attention(
        state_dict, attention, query, memory, maps, scale_weights, settings.num_heads
    )
    tgt = layer_norm(state_dict, name + ".norm2", tgt + dropout(read))
    tgt = layer_norm(state_dict, name + ".norm3", tgt + feed_forward(state_dict, name, tgt))
    return tgt, r


def decoder(state_dict, query_pos, memory, image_sizes, settings):
    """All layers' outputs after the final norm, a list of (B, Q, d), and r (B, Q, 2) or None.

    query_pos (Q, d).
    """
    query_pos = query_pos[None].repeat(len(image_sizes), 1, 1)
    tgt, r = torch.zeros_like(query_pos), None
    outputs = []
    for i in range(settings.decoder_layers):
        name = f"transformer.decoder.layers.{i}"
        tgt, r = decoder_layer(state_dict, name, tgt, query_pos, r, memory, image_sizes, settings)
        outputs.append(layer_norm(state_dict, "transformer.decoder.norm", tgt))
    return outputs, r


# ------------------------------------------------------------------------------------- encoders


def encoder_layer(state_dict, name, x, pos, padding_mask, num_heads=8):
    """One post-norm attention layer on (B, S, d)."""
    attended = self_attention(state_dict, name + ".self_attn", x, pos, num_heads, padding_mask)
    x = layer_norm(state_dict, name + ".norm1", x + dropout(attended))
    return layer_norm(state_dict, name + ".norm2", x + feed_forward(state_dict, name, x))


def attention_encoder(state_dict, tokens, positions, padding_masks, pattern, num_heads=8):
    """I: each scale attends to itself; M: the cells of all scales attend to each other.

    tokens, positions: lists of (B, S_l, d); padding_masks: list of (B, S_l). Returns such a list.
    """
    for i, kind in enumerate(pattern):
        name = f"transformer.encoder.layers.{i}"
        if kind == "I":
            tokens = [
                encoder_layer(state_dict, name, x, pos, mask, num_heads)
                for x, pos, mask in zip(tokens, positions, padding_masks)
            ]
        else:
            lengths = [x.shape[1] for x in tokens]
            merged = (torch.cat(x, 1) for x in (tokens, positions, padding_masks))
            tokens = encoder_layer(state_dict, name, *merged, num_heads).split(lengths, 1)
    return tokens


def conv_encoder_layer(state_dict, name, maps, positions):
    """One conv layer on four maps of strides 8, 16, 32, 64; maps, positions: lists of (B, d, h, w).

    Convolutions that the state dict lacks: without ``conv_1`` and ``conv_2`` they are the identity,
    without numbers in the cross-scale names one convolution serves all pairs of scales.
    """

    def pointwise(which, x):
        if f"{name}.{which}.weight" not in state_dict:
            return x
        return convolution(state_dict, f"{name}.{which}", x)

    def cross_scale(which, pair):
        numbered = f"{name}.{which}_{pair}"
        return numbered if numbered + ".weight" in state_dict else f"{name}.{which}"

    own = []
    for stride, x, pos in zip((8, 16, 32, 64), maps, positions):
        mixed = pointwise("conv_1", x + pos)
        own.append(convolution(state_dict, f"{name}.self_attn_{stride}", mixed, depthwise=True))

    outputs = []
    for level, x in enumerate(maps):
        total = own[level]
        if level > 0:
            down = cross_scale("high_to_low", level)
            total = total + convolution(state_dict, down, own[level - 1], stride=2, depthwise=True)
        if level < len(maps) - 1:
            up = cross_scale("low_to_high", level + 1)
            coarse = convolution(state_dict, up, own[level + 1], depthwise=True)
            total = total + F.interpolate(
                coarse, size=x.shape[-2:], mode="bilinear", align_corners=True
            )
        tokens = to_tokens(x + dropout(pointwise("conv_2", total)))
        tokens = layer_norm(state_dict, name + ".norm1", tokens)
        tokens = tokens + feed_forward(state_dict, name, tokens)
        tokens = layer_norm(state_dict, name + ".norm2", tokens)
        outputs.append(tokens.transpose(1, 2).unflatten(2, x.shape[-2:]))
    return outputs


def conv_encoder(state_dict, maps, positions, num_layers):
    for i in range(num_layers):
        maps = conv_encoder_layer(state_dict, f"transformer.encoder.layers.{i}", maps, positions)
    return maps


# ---------------------------------------------------------------------------- matching and loss


def corners(boxes):
    """(..., 4) cxcywh to xyxy."""
    return torchvision.ops.box_convert(boxes, "cxcywh", "xyxy")


def generalized_iou(boxes_a, boxes_b):
    """(A, B) GIoU of all pairs of cxcywh boxes."""
    return torchvision.ops.generalized_box_iou(corners(boxes_a), corners(boxes_b))


def class_cost(logit):
    p = torch.sigmoid(logit)
    positive = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8)
    negative = 0.75 * p**2 * -torch.log(1 - p + 1e-8)
    return positive - negative


def cost_matrix(logits, boxes, labels, target_boxes):
    """One image: logits (Q, C), boxes (Q, 4), labels (T,), target_boxes (T, 4); returns (Q, T)."""
    l1 = (boxes[:, None] - target_boxes).abs().sum(-1)
    return 2 * class_cost(logits[:, labels]) + 5 * l1 - 2 * generalized_iou(boxes, target_boxes)


def match(logits, boxes, labels, target_boxes):
    """Pairs (query, target) of the cheapest assignment of one image, sorted by query."""
    costs = cost_matrix(logits.detach(), boxes.detach(), labels, target_boxes)
    queries, targets = linear_sum_assignment(costs.numpy())
    return list(zip(queries.tolist(), targets.tolist()))


def focal_loss(logit, is_object):
    """Sigmoid focal loss of one logit, alpha 0.25 and gamma 2."""
    if is_object:
        return 0.25 * (1 - torch.sigmoid(logit)) ** 2 * -F.logsigmoid(logit)
    return 0.75 * torch.sigmoid(logit) ** 2 * -F.logsigmoid(-logit)


def layer_losses(logits, boxes, targets):
    """Unweighted losses of one layer: logits (B, Q, C), boxes (B, Q, 4).

    targets: a dict an image with ``labels`` (T,) and ``boxes`` (T, 4), normalized cxcywh.
    """
    num_boxes = max(sum(len(target["labels"]) for target in targets), 1)
    loss_ce, loss_bbox, loss_giou = logits.sum() * 0, boxes.sum() * 0, boxes.sum() * 0
    for b, target in enumerate(targets):
        labels, target_boxes = target["labels"], target["boxes"]
        giou = generalized_iou(boxes[b], target_boxes)
        # Every logit is first taken for background, then the matched ones are put right.
        loss_ce = loss_ce + focal_loss(logits[b], False).sum()
        for q, t in match(logits[b], boxes[b], labels, target_boxes):
            logit = logits[b, q, labels[t]]
            loss_ce = loss_ce - focal_loss(logit, False) + focal_loss(logit, True)
            loss_bbox = loss_bbox + (boxes[b, q] - target_boxes[t]).abs().sum()
            loss_giou = loss_giou + 1 - giou[q, t]
    return {
        "loss_ce": loss_ce / num_boxes,
        "loss_bbox": loss_bbox / num_boxes,
        "loss_giou": loss_giou / num_boxes,
    }


def losses(all_logits, all_boxes, targets):
    """Unweighted losses of all layers; the last layer's names have no number."""
    result = {}
    for i, (logits, boxes) in enumerate(zip(all_logits, all_boxes)):
        suffix = f"_{i}" if i < len(all_logits) - 1 else ""
        for name, value in layer_losses(logits, boxes, targets).items():
            result[name + suffix] = value
    return result


def weighted(all_losses):
    """Losses times their weights."""
    return {k: LOSS_WEIGHTS["_".join(k.split("_")[:2])] * v for k, v in all_losses.items()}


def inference(logits, boxes, height, width, top_k):
    """The best detections of one image: scores (k,), labels (k,), xyxy boxes (k, 4) in pixels.

    logits (Q, C), boxes (Q, 4) normalized cxcywh. Boxes are not clipped.
    """
    scores, order = logits.sigmoid().flatten().sort(descending=True, stable=True)
    queries, labels = order[:top_k] // logits.shape[1], order[:top_k] % logits.shape[1]
    pixels = torch.tensor([width, height, width, height])
    return scores[:top_k], labels, corners(boxes[queries]) * pixels


# --------------------------------------------------------------------------------- golden cases


def draw_weight(random, key, shape):
    """One tensor of a golden case's made-up weights, float64."""
    if key.endswith("running_var"):
        return random.uniform(0.5, 1.5, shape)
    if key.endswith("running_mean"):
        return 0.1 * random.standard_normal(shape)
    if len(shape) >= 2:
        if key in ("query_embed.weight", "transformer.level_embed"):
            return random.standard_normal(shape)
        gain = math.sqrt(2) if len(shape) == 4 else 1.0
        return gain / math.sqrt(math.prod(shape[1:])) * random.standard_normal(shape)
    if key.endswith("point3.bias"):
        return random.uniform(0.5, 1.5, shape)
    if key.endswith("weight"):
        return random.uniform(0.8, 1.2, shape)
    return 0.05 * random.standard_normal(shape)


def make_state_dict(case):
    random = np.random.RandomState(case["weight_seed"])
    return {
        key: torch.from_numpy(draw_weight(random, key, tuple(shape)).astype(np.float32))
        for key, shape in case["state_dict"]
    }


def make_images(case):
    """uint8 (H, W, 3) RGB arrays."""
    random = np.random.RandomState(case["image_seed"])
    return [
        random.randint(0, 256, (height, width, 3)).astype(np.uint8)
        for height, width in case["image_sizes"]
    ]


def make_targets(case):
    """A dict an image: ``labels`` (T,), ``boxes`` (T, 4) normalized cxcywh."""
    random = np.random.RandomState(case["target_seed"])
    targets = []
    for n in case["boxes_per_image"]:
        centers = random.uniform(0.2, 0.8, (n, 2))
        sizes = random.uniform(0.05, 0.35, (n, 2))
        labels = random.randint(0, 80, n)
        boxes = torch.from_numpy(np.concatenate([centers, sizes], 1)).float()
        targets.append({"labels": torch.from_numpy(labels).long(), "boxes": boxes})
    return targets
