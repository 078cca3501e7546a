"""The embedded data set: textured shapes on noisy, cluttered backgrounds, drawn by this file.

It is small enough to train on without a GPU and still a detection problem: three classes, one
to six objects an image, up to 100 pixels long, rotated, stretched and overlapping. Each class has a
typical texture, but not every object has it.
"""

import functools
import json
import math
from pathlib import Path
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image, ImageDraw, ImageFilter

from .cache import cache_dir, create_once

SHAPE_CLASSES = ("ellipse", "rectangle", "triangle")
_TEXTURES = ("ramp", "stripes", "checkerboard", "plain", "noise")
# The first three are typical of the classes, in their order; this share of objects has its own
# class's texture, the others any.
_TYPICAL_TEXTURE_SHARE = 0.75

# Part of the cache's folder name: raise it whenever the pictures change.
_VERSION = 6

_IMAGE_SIDES = (128, 160)  # pixels
_NUM_OBJECTS = (1, 6)
LENGTHS = (28, 100)  # long side of a shape before it is rotated, in pixels
_ASPECT_RATIOS = (0.5, 1.0)  # short side by long side
_MAX_ROTATION = 20  # degrees, either way
_CONTRASTS = (140, 260)  # distance in RGB between a shape's color and what it covers
_MIN_VISIBLE_FRACTION = 0.6
_MIN_BOX_SIDE = 2 / 7  # of the shortest long side
_SUPERSAMPLING = 3


class Scene(NamedTuple):
    """A picture and what is on it."""

    image: np.ndarray  # (H, W, 3) uint8, RGB
    masks: List[np.ndarray]  # for each object (H, W) bool, its visible pixels
    classes: List[int]  # for each object the index in SHAPE_CLASSES


def register_shapes(
    num_train: int = 2000,
    num_val: int = 200,
    seed: int = 0,
    prefix: str = "smca_shapes",
    lengths: Tuple[int, int] = LENGTHS,
) -> Tuple[str, str]:
    """Register ``{prefix}_train`` and ``{prefix}_val`` in Detectron2's catalogs.

    The files are made when the data set is first used (``DatasetCatalog.get`` or
    ``smca.data.require_dataset``), in the cache folder, and kept there.

    Args:
        num_train, num_val: images of the two splits.
        seed: of the pictures, not negative.
        prefix: of the names, which are returned.
        lengths: shortest and longest object, in pixels.

    Raises:
        AssertionError: a name is registered already.
    """
    key = f"shapes_v{_VERSION}_{num_train}_{num_val}_seed{seed}"
    if lengths != LENGTHS:
        key += f"_{lengths[0]}to{lengths[1]}"
    folder = cache_dir() / key

    def make_files() -> None:
        create_once(folder, lambda path: write_shapes(path, num_train, num_val, seed, lengths))

    def load(split: str) -> List[Dict[str, Any]]:
        make_files()
        return load_coco_json(f"{folder}/{split}.json", f"{folder}/{split}", f"{prefix}_{split}")

    for split in ("train", "val"):
        DatasetCatalog.register(f"{prefix}_{split}", functools.partial(load, split))
        MetadataCatalog.get(f"{prefix}_{split}").set(
            json_file=f"{folder}/{split}.json",
            image_root=f"{folder}/{split}",
            evaluator_type="coco",
            thing_classes=list(SHAPE_CLASSES),
            thing_dataset_id_to_contiguous_id={i + 1: i for i in range(len(SHAPE_CLASSES))},
            make_files=make_files,
        )
    return f"{prefix}_train", f"{prefix}_val"


def write_shapes(
    folder: Path,
    num_train: int = 2000,
    num_val: int = 200,
    seed: int = 0,
    lengths: Tuple[int, int] = LENGTHS,
) -> None:
    """Write the data set into a new folder: JPEG images in ``train/`` and ``val/``, annotations in
    COCO's format in ``train.json`` and ``val.json``. The arguments are those of `register_shapes`.

    Image i of a split depends only on the lengths, the seed, the split and i. Boxes are tight
    around an object's visible pixels, whose number is ``area``.
    """
    for split_index, (split, num_images) in enumerate((("train", num_train), ("val", num_val))):
        (folder / split).mkdir(parents=True)
        images: List[Dict[str, Any]] = []
        annotations: List[Dict[str, Any]] = []
        for i in range(num_images):
            scene = draw_scene(np.random.default_rng((seed, split_index, i)), lengths)
            height, width = scene.image.shape[:2]
            name = f"{i:06d}.jpg"
            images.append({"id": i + 1, "file_name": name, "height": height, "width": width})
            Image.fromarray(scene.image).save(folder / split / name, quality=95, subsampling=0)
            for mask, class_index in zip(scene.masks, scene.classes):
                number, category_id = len(annotations) + 1, class_index + 1
                annotation = {"id": number, "image_id": i + 1, "category_id": category_id}
                area = {"area": int(mask.sum()), "iscrowd": 0}
                annotations.append({**annotation, "bbox": _box_of(mask), **area})
        coco = {
            "info": {"description": f"SMCA shapes, version {_VERSION}, seed {seed}"},
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i + 1, "name": name} for i, name in enumerate(SHAPE_CLASSES)],
        }
        (folder / f"{split}.json").write_text(json.dumps(coco))


def _box_of(mask: np.ndarray) -> List[int]:
    """Tight box [x, y, width, height] around the True pixels of a mask, in pixels."""
    left, top, right, bottom = Image.fromarray(mask).getbbox() or (0, 0, 0, 0)
    return [left, top, right - left, bottom - top]


def draw_scene(rng: np.random.Generator, lengths: Tuple[int, int] = LENGTHS) -> Scene:
    """Draw one picture with at least one object, the shortest and longest of which have these
    `lengths` in pixels."""
    height, width = rng.integers(_IMAGE_SIDES[0], _IMAGE_SIDES[1], size=2, endpoint=True)
    canvas = _background(rng, height, width)
    objects: List[Tuple[np.ndarray, float, int]] = []  # visible pixels, full area and class
    num_objects = rng.integers(*_NUM_OBJECTS, endpoint=True)
    for _ in range(8 * num_objects):  # attempts: some places are taken
        if len(objects) == num_objects:
            break
        class_index = int(rng.integers(len(SHAPE_CLASSES)))
        name = SHAPE_CLASSES[class_index]
        alpha, full_area, outline = _random_shape(rng, name, lengths, height, width)
        mask = alpha > 0.5
        visible = [(earlier & ~mask, area, index) for earlier, area, index in objects]
        visible.append((mask, full_area, class_index))
        if all(
            each.sum() >= max(_MIN_VISIBLE_FRACTION * area, 1)
            and min(_box_of(each)[2:]) >= lengths[0] * _MIN_BOX_SIDE
            for each, area, _ in visible
        ):
            objects = visible
            is_typical = rng.random() < _TYPICAL_TEXTURE_SHARE
            texture = _TEXTURES[class_index] if is_typical else str(rng.choice(_TEXTURES))
            _paint(rng, canvas, alpha, outline, texture)
    noise = rng.normal(0, rng.uniform(2, 9), canvas.shape)
    image = Image.fromarray(np.clip(canvas + noise, 0, 255).astype(np.uint8))
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 0.7)))
    masks, _, classes = map(list, zip(*objects))
    return Scene(np.asarray(image), masks, classes)


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(H, W, 3) float: a color gradient, coarse and fine noise, and clutter strokes."""
    direction = rng.uniform(0, 2 * math.pi)
    y, x = np.mgrid[:height, :width]
    ramp = math.cos(direction) * x / width + math.sin(direction) * y / height
    ramp = (ramp - ramp.min()) / np.ptp(ramp)
    first, second = rng.uniform(30, 225, (2, 3))
    canvas = first + (second - first) * ramp[..., None]
    canvas += _noise(rng, height, width, rng.uniform(8, 28))
    return _strokes(rng, np.clip(canvas, 0, 255))


def _noise(rng: np.random.Generator, height: int, width: int, amplitude: float) -> np.ndarray:
    """(H, W, 3) float: random grids of 4 to 64 cells a side, enlarged; finer ones are weaker."""
    noise = np.zeros((height, width, 3))
    tint = rng.uniform(0.2, 1.0, 3)  # the channels vary together, but not equally
    for cells in (4, 8, 16, 32, 64):
        grid = Image.fromarray(rng.normal(0, 1, (cells, cells)).astype(np.float32))
        enlarged = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC))
        noise += enlarged[..., None] * tint * amplitude * rng.uniform(0.2, 1) * (4 / cells) ** 0.4
    return noise


def _strokes(rng: np.random.Generator, canvas: np.ndarray) -> np.ndarray:
    """Lines, arcs and blotches that are no objects, half transparent."""
    image = Image.fromarray(canvas.astype(np.uint8))
    clutter = image.copy()
    draw = ImageDraw.Draw(clutter)
    for _ in range(rng.integers(1, 8)):
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        length, stroke = rng.uniform(8, 70), int(rng.integers(1, 4))
        angle = rng.uniform(0, 2 * math.pi)
        end = (x + length * math.cos(angle), y + length * math.sin(angle))
        kind = rng.integers(3)
        if kind == 0:
            draw.line([(x, y), end], fill=color, width=stroke)
        elif kind == 1:
            start = math.degrees(angle)
            box = [x, y, x + length, y + length]
            draw.arc(box, start, start + rng.uniform(40, 150), fill=color, width=stroke)
        else:
            steps = rng.normal(0, 3, (12, 2)).cumsum(axis=0) + (x, y)
            draw.line([tuple(point) for point in steps], fill=color, width=stroke)
    return np.asarray(Image.blend(image, clutter, rng.uniform(0.4, 0.9))).astype(np.float64)


def _random_shape(
    rng: np.random.Generator, name: str, lengths: Tuple[int, int], height: int, width: int
) -> Tuple[np.ndarray, float, np.ndarray]:
    """Draw a shape of the class `name` somewhere on an image.

    Returns:
        (H, W) float in [0, 1], how much of each pixel the shape covers; its area in pixels, with
        what lies beyond the image's border; and as the first, the inside of the shape's border.
    """
    length = math.exp(rng.uniform(*np.log(lengths)))
    aspect_ratio = math.exp(rng.uniform(*np.log(_ASPECT_RATIOS)))
    corners = _unit_polygon(rng, name) * rng.permutation((length / 2, length / 2 * aspect_ratio))
    angle = math.radians(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    rotation = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    corners = corners @ rotation
    center = rng.uniform(0.08, 0.92, 2) * (width, height)
    border = max(1.0, 0.06 * length)  # pixels
    inner = corners * max(0.0, 1 - 2 * border / (length * aspect_ratio))
    alpha = _coverage(corners + center, height, width)
    x, y = corners.T
    full_area = abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2
    return alpha, full_area, alpha - _coverage(inner + center, height, width)


def _unit_polygon(rng: np.random.Generator, name: str) -> np.ndarray:
    """(N, 2) corners of a shape inside [-1, 1] x [-1, 1]."""
    if name == "ellipse":
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if name == "rectangle":
        return np.array([(-1.0, -1.0), (1.0, -1.0), (1.0, 1.0), (-1.0, 1.0)])
    return np.array([(-1.0, 1.0), (1.0, 1.0), (rng.uniform(-0.5, 0.5), -1.0)])


def _coverage(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """(H, W) float: the share of each pixel inside the polygon, by supersampling."""
    factor = _SUPERSAMPLING
    fine = Image.new("L", (int(width) * factor, int(height) * factor))
    # Pillow's coordinates are pixel centers.
    ImageDraw.Draw(fine).polygon([tuple(point) for point in corners * factor - 0.5], fill=255)
    return np.asarray(fine.reduce(factor)) / 255.0


def _paint(
    rng: np.random.Generator, canvas: np.ndarray, alpha: np.ndarray, outline: np.ndarray, name: str
) -> None:
    """Blend a textured, perhaps outlined, slightly transparent shape into the canvas, in place."""
    covered = canvas[alpha > 0.5].mean(axis=0)
    # One that differs from what it covers about as much as one of _CONTRASTS.
    contrast, candidates = rng.uniform(*_CONTRASTS), rng.uniform(0, 255, (64, 3))
    distances = np.linalg.norm(candidates - covered, axis=1)
    color = candidates[np.abs(distances - contrast).argmin()]
    fill = color + _texture(rng, name, *alpha.shape)
    if rng.random() < 0.5:
        edge_color = color * rng.uniform(0.3, 0.7) if rng.random() < 0.5 else (color + 255) / 2
        fill = fill + outline[..., None] * (edge_color - fill)
    canvas += (alpha * rng.uniform(0.85, 1.0))[..., None] * (fill - canvas)


def _texture(rng: np.random.Generator, name: str, height: int, width: int) -> np.ndarray:
    """(H, W, 3 or 1) float, about 0: the pattern that is added to a shape's color."""
    amplitude = rng.uniform(10, 30)
    y, x = np.mgrid[:height, :width]
    angle, period = rng.uniform(0, math.pi), rng.uniform(5, 12)
    along = math.cos(angle) * x + math.sin(angle) * y
    across = math.cos(angle) * y - math.sin(angle) * x
    if name == "noise":
        return _noise(rng, height, width, amplitude)
    if name == "plain":
        pattern = np.zeros((height, width))
    elif name == "ramp":
        pattern = (along - along.mean()) / 40
    elif name == "stripes":
        pattern = np.sin(2 * math.pi * along / period)
    else:
        pattern = np.sign(np.sin(math.pi * along / period) * np.sin(math.pi * across / period))
    return amplitude * pattern[..., None]
