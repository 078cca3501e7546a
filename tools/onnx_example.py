#!/usr/bin/env python
"""Detect objects with an exported model; needs onnxruntime, NumPy and Pillow alone:

    onnx_example.py model.onnx photo.jpg another.png

It prints a line for each detection: image, class, score and the box x0 y0 x1 y1 in pixels.
"""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import List, Optional, Tuple

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def resized_size(width: int, height: int, short_side: Optional[int], max_size: int) -> List[int]:
    """Width and height with the given short side, but the long side at most max_size."""
    if short_side is None:
        return [width, height]
    scale = short_side / min(width, height)
    scale = min(scale, max_size / max(width, height))
    return [max(1, int(scale * side + 0.5)) for side in (width, height)]


def to_8_bit(levels: np.ndarray) -> np.ndarray:
    """Levels of more than 8 bits in 8. The greatest says how many bits they have; floats beyond 0
    to 1 and other integers are stretched between the least and the greatest."""
    values = np.nan_to_num(levels.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    if levels.dtype.kind == "f" and 0 <= low and high <= 1:
        low, high = 0, 1
    elif levels.dtype.kind in "iu" and 0 <= low and high < 65536:
        low, high = 0, next(2**bits - 1 for bits in (8, 10, 12, 14, 16) if high < 2**bits)
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def read_image(path: str) -> Image.Image:
    """An upright RGB image, read as in training."""
    try:
        # By its path, Pillow would mix up the pixels of some TIFFs that have an orientation.
        image: Image.Image = Image.open(io.BytesIO(Path(path).read_bytes()))
        # Of colors with 16 bits, Pillow reads the upper 8.
        is_deep = image.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(image, "tile", ""))
        image = ImageOps.exif_transpose(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        sys.exit(f"{path} cannot be read: {error}")
    if is_deep:
        return Image.fromarray(to_8_bit(np.asarray(image.convert("RGB")).astype(np.uint16) * 257))
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(to_8_bit(np.asarray(image)))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def resized(image: Image.Image, short_side: Optional[int], max_size: int) -> Image.Image:
    """An image in the size that the model takes."""
    size = resized_size(*image.size, short_side, max_size)
    return image.resize(size, Image.Resampling.BILINEAR)


def as_batch(images: List[Image.Image]) -> Tuple[np.ndarray, np.ndarray]:
    """Images in one array, padded at the right and bottom, and their (height, width)."""
    sizes = np.array([(image.height, image.width) for image in images], dtype=np.int64)
    batch = np.zeros((len(images), 3, *sizes.max(axis=0)), dtype=np.float32)
    for pixels, image in zip(batch, images):
        pixels[:, : image.height, : image.width] = np.asarray(image).transpose(2, 0, 1)
    return batch, sizes


def main() -> None:
    """Detect objects in the images, as one batch."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an ONNX file of smca-export")
    parser.add_argument("images", nargs="+")
    parser.add_argument("--threshold", type=float, help="least score; default: the file's")
    args = parser.parse_args()
    try:
        session = onnxruntime.InferenceSession(args.model)
    except Exception as error:  # onnxruntime's own types
        sys.exit(f"{args.model} cannot be read as an ONNX file of smca-export: {error}")
    metadata = session.get_modelmeta().custom_metadata_map
    info = {name: json.loads(value) for name, value in metadata.items()}
    originals = [read_image(path) for path in args.images]
    images, image_sizes = as_batch(
        [resized(image, info["short_side"], info["max_size"]) for image in originals]
    )
    outputs = session.run(None, {"images": images, "image_sizes": image_sizes})
    threshold = info["threshold"] if args.threshold is None else args.threshold
    rows = zip(args.images, originals, *outputs, image_sizes)
    for path, original, boxes, scores, labels, (height, width) in rows:
        boxes = boxes * np.tile([original.width / width, original.height / height], 2)
        kept = scores >= threshold
        if not kept.any():
            print(f"{path}: no score is {threshold:g} or more.", file=sys.stderr)
        for box, score, label in zip(boxes[kept], scores[kept], labels[kept]):
            name = info["class_names"][label] if info["class_names"] else label
            print(path, name, f"{score:.3f}", *(f"{side:.1f}" for side in box))


if __name__ == "__main__":
    main()
