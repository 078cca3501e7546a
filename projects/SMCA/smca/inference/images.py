"""Images of whatever kind a user has, as RGB arrays."""

import io
import os
import urllib.request
from http.client import HTTPException
from typing import Union

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from smca.data import DatasetError, as_rgb, read_image
from smca.data.mapper import unreadable
from smca.errors import UserError

__all__ = ["ImageSource", "is_url", "rgb_array"]

ImageSource = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor]

_TIMEOUT = 30  # seconds without an answer


def rgb_array(image: ImageSource) -> np.ndarray:
    """An image of any of these kinds as an array.

    Args:
        image: a file's path or URL, which is turned upright as its EXIF says; or pixels, taken as
            they are: a PIL image of any mode, an array (height, width, 3) or a tensor
            (3, height, width), both uint8 RGB.

    Returns:
        (height, width, 3) uint8, RGB.

    Raises:
        UserError: it cannot be read, or is of another kind.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(os.fspath(image))
    if isinstance(image, Image.Image):
        return np.asarray(as_rgb(image))
    if isinstance(image, Tensor):
        if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3 or not image.numel():
            raise UserError(
                "A tensor has to be an image of uint8 (3, height, width), RGB from 0 to 255, not "
                f"{str(image.dtype).removeprefix('torch.')} {tuple(image.shape)}."
            )
        return image.permute(1, 2, 0).cpu().numpy()
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise UserError(
                "An array has to be an image of uint8 (height, width, 3), RGB from 0 to 255, not "
                f"{image.dtype} {image.shape}."
            )
        return image
    raise UserError(
        "An image is a path, a URL, a PIL image, an array or a tensor, or a list of them, not "
        f"{type(image).__name__}."
    )


def is_url(path: str) -> bool:
    """Whether an image is to be downloaded."""
    return path.startswith(("http://", "https://"))


def _read(path: str) -> np.ndarray:
    if is_url(path):
        return _download(path)
    if "://" not in path and not os.path.isfile(path):
        what = "is a folder, no image" if os.path.isdir(path) else "does not exist"
        raise UserError(f"The image {path} {what}.")
    try:
        return read_image(path)
    except DatasetError as error:
        raise UserError(unreadable(path, error.__cause__ or error)) from error


def _download(url: str) -> np.ndarray:
    """Not by Detectron2's PathManager, whose cache takes files of one path on two hosts, or with
    two queries, for the same."""
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            content = response.read()
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"The image {url} cannot be downloaded: {error}.") from error
    try:
        return read_image(io.BytesIO(content))
    except DatasetError as error:
        raise UserError(unreadable(url, error.__cause__ or error)) from error
