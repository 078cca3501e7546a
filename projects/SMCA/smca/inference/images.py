"""Images of whatever kind a user has, as RGB arrays."""

import io
import os
import urllib.request
from http.client import HTTPException
from typing import Union

import numpy as np
from PIL import Image
from torch import Tensor

from smca.data import as_rgb, read_image
from smca.errors import UserError

ImageSource = Union[str, "os.PathLike[str]", Image.Image, np.ndarray, Tensor]

_TIMEOUT = 30  # seconds without an answer


def rgb_array(image: ImageSource) -> np.ndarray:
    """An image as (height, width, 3) uint8 RGB. A file is turned upright as its EXIF says; pixels
    are taken as they are: a PIL image of any mode, an array (height, width, 3) or a tensor
    (3, height, width), both uint8 RGB. What cannot be read, or is of another kind, is a UserError.
    """
    if isinstance(image, (str, os.PathLike)):
        return _read(os.fspath(image))
    if isinstance(image, Image.Image):
        return np.asarray(as_rgb(image))
    if not isinstance(image, (Tensor, np.ndarray)):
        raise UserError(
            "An image is a path, a URL, a PIL image, an array or a tensor, or a list of them, not "
            f"{type(image).__name__}."
        )
    is_tensor = isinstance(image, Tensor)
    shape, dtype = tuple(image.shape), str(image.dtype).removeprefix("torch.")
    if dtype != "uint8" or len(shape) != 3 or shape[0 if is_tensor else 2] != 3 or 0 in shape:
        kind = "A tensor" if is_tensor else "An array"
        form = "(3, height, width)" if is_tensor else "(height, width, 3)"
        raise UserError(f"{kind} has to be RGB of uint8 {form}, not {dtype} {shape}.")
    return image.permute(1, 2, 0).cpu().numpy() if isinstance(image, Tensor) else image


def is_url(path: str) -> bool:
    """Whether an image is not named by its path."""
    return path.startswith(("http://", "https://", "file://"))


def _read(path: str) -> np.ndarray:
    file = None
    if is_url(path):
        # Detectron2's PathManager takes files of one path on two hosts for the same.
        try:
            with urllib.request.urlopen(path, timeout=_TIMEOUT) as response:
                file = io.BytesIO(response.read())
        except (OSError, ValueError, HTTPException) as error:
            raise UserError(f"The image {path} cannot be loaded: {error}.") from error
    elif "://" not in path and not os.path.isfile(path):
        what = "is a folder, no image" if os.path.isdir(path) else "does not exist"
        raise UserError(f"The image {path} {what}.")
    return read_image(path, file=file)
