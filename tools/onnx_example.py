#!/usr/bin/env python
"""Detect objects with an exported model; needs onnxruntime, NumPy and Pillow alone:

    onnx_example.py model.onnx photo.jpg another.png

It prints a line for each detection: image, class, score and the box x0 y0 x1 y1 in pixels.
"""

import argparse
import json
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


def read_images(paths: List[str], short_side: Optional[int], max_size: int) -> List[Image.Image]:
    """Upright RGB images, resized."""
    images = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]
    sizes = [resized_size(*image.size, short_side, max_size) for image in images]
    return [image.resize(size, Image.Resampling.BILINEAR) for image, size in zip(images, sizes)]


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
    parser.add_argument("model", help="an ONNX file of tools/export.py")
    parser.add_argument("images", nargs="+")
    args = parser.parse_args()
    session = onnxruntime.InferenceSession(args.model)
    metadata = session.get_modelmeta().custom_metadata_map
    info = {name: json.loads(value) for name, value in metadata.items()}
    images, image_sizes = as_batch(read_images(args.images, info["short_side"], info["max_size"]))
    outputs = session.run(None, {"images": images, "image_sizes": image_sizes})
    for path, boxes, scores, labels, (height, width) in zip(args.images, *outputs, image_sizes):
        original = ImageOps.exif_transpose(Image.open(path))
        boxes = boxes * np.tile([original.width / width, original.height / height], 2)
        for box, score, label in zip(boxes, scores, labels):
            if score >= info["threshold"]:
                name = info["class_names"][label] if info["class_names"] else label
                print(path, name, f"{score:.3f}", *(f"{side:.1f}" for side in box))


if __name__ == "__main__":
    main()
