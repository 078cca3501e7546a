"""Reading and augmenting images: from a dataset dict to what the model takes."""

import contextlib
import copy
import logging
import os
import warnings
from typing import Any, BinaryIO, Dict, Iterator, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import log_first_n
from PIL import ExifTags, Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from smca.errors import DatasetError

PathLike = Union[str, "os.PathLike[str]"]

# Color profiles of a PNG are often larger than the million bytes for which Pillow refuses it.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# It would warn of images with half as many pixels as it refuses, of each size once.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)

_DEEP_COLOR = "color of 16 bits"
_GRAY_BITS = (8, 10, 12, 14, 16)  # that cameras have


@contextlib.contextmanager
def _open_image(path: PathLike, file: Optional[BinaryIO] = None) -> Iterator[Image.Image]:
    """Open a file with Pillow; whatever goes wrong inside becomes a DatasetError naming it."""
    try:
        with contextlib.ExitStack() as stack:
            file = file or stack.enter_context(PathManager.open(str(path), "rb"))
            image = stack.enter_context(Image.open(file))
            image.info[_DEEP_COLOR] = _has_deep_color(image)
            yield image
    except DatasetError:
        raise
    except FileNotFoundError:
        raise DatasetError(
            f"Image {path} does not exist: restore it, correct the image folder, or remove it "
            "from the annotation file."
        ) from None
    except Exception as error:  # Pillow's decoders raise nearly every type there is
        raise DatasetError(f"Image {path} {_why_unreadable(error)}") from error


def _why_unreadable(error: Exception) -> str:
    advice = ": replace it or leave it out."
    if isinstance(error, (Image.DecompressionBombError, Image.DecompressionBombWarning)):
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        return (
            f"has more than {limit:,} pixels, the most that are read, lest one file fill the "
            "memory: cut it into tiles or make it smaller."
        )
    if isinstance(error, UnidentifiedImageError):
        return (
            "is empty, no image (perhaps a pointer of Git LFS), or of a kind that Pillow cannot "
            f"read{advice}"
        )
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be opened ({error.strerror}){advice}"
    return f"cannot be decoded, perhaps it was cut short ({error}){advice}"


def _upright_size(image: Image.Image) -> Tuple[int, int]:
    """Height and width as the EXIF orientation turns the image upright."""
    if image.format == "TIFF":
        image.load()  # which turns it
    orientation = None
    with contextlib.suppress(Exception):  # a malformed EXIF block says nothing about it
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    size = image.height, image.width
    return size[::-1] if orientation in (5, 6, 7, 8) else size


def _is_upright(
    image: Image.Image, path: object, height: Optional[int], width: Optional[int]
) -> bool:
    """Whether the image is height x width pixels as it is turned upright, or only as stored."""
    upright, stored = _upright_size(image), (image.height, image.width)
    if height is None or width is None or upright == (height, width):
        return True
    if stored == (height, width):
        return False
    raise DatasetError(
        f"Image {path} is {upright[1]} x {upright[0]} pixels (width x height), but its "
        f"annotations say {width} x {height}: correct the annotation file or replace the image."
    )


def _warn_once(message: str) -> None:
    worker = torch.utils.data.get_worker_info()
    if worker is None or worker.id == 0:  # once for all loader processes
        log_first_n(logging.WARNING, message, key="message", name=__name__)


def _to_8_bit(pixels: np.ndarray) -> np.ndarray:
    """Levels of more than 8 bits, of any shape and type of number, to uint8 without clipping.
    Cameras of 10, 12 or 14 bits write these into 16: the greatest level says how many there are."""
    values = np.nan_to_num(pixels.astype(np.float64), posinf=0.0, neginf=0.0)
    low, high = values.min(), values.max()
    rule = "the image's own least and greatest"
    if pixels.dtype.kind == "f" and 0 <= low and high <= 1:
        rule, low, high = "0 to 1", 0, 1
    elif pixels.dtype.kind in "iu" and 0 <= low and high < 65536:
        bits = next(bits for bits in _GRAY_BITS if high < 2**bits)
        rule, low, high = f"0 to {2**bits - 1} ({bits} bits)", 0, 2**bits - 1
    if "16 bits" not in rule:
        _warn_once(
            f"There are images of more than 8 bits whose levels from {rule} are read as 0 to 255: "
            "if others have other levels and their brightness should be comparable, scale all "
            "files to 16 bits."
        )
    return np.rint((values - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def _has_deep_color(image: Image.Image) -> bool:
    """Whether an image that is not loaded yet has colors of 16 bits, of which Pillow reads 8."""
    return image.mode in ("RGB", "RGBA", "LA") and ";16" in str(getattr(image, "tile", ""))


def has_more_than_8_bits(path: PathLike) -> bool:
    """Whether the levels of an image file are scaled to 8 bits; False if it cannot be read."""
    with contextlib.suppress(DatasetError), _open_image(path) as image:
        return image.mode.startswith("I") or image.mode == "F" or image.info[_DEEP_COLOR]
    return False


def as_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode (gray, palette, RGBA, CMYK, 1, 16 or 32 bits) in RGB. Transparency is
    dropped, as in Detectron2."""
    if image.mode.startswith("I") or image.mode == "F":
        image = Image.fromarray(_to_8_bit(np.asarray(image)))
    elif image.info.get(_DEEP_COLOR) or _has_deep_color(image):
        pixels = np.asarray(image.convert("RGB")).astype(np.uint16) * 257
        image = Image.fromarray(_to_8_bit(pixels))
    if image.mode in ("P", "PA"):  # a palette with transparency converts cleanly only to RGBA
        image = image.convert("RGBA")
    return image.convert("RGB")


def read_image(
    path: PathLike,
    height: Optional[int] = None,
    width: Optional[int] = None,
    *,
    file: Optional[BinaryIO] = None,
) -> np.ndarray:
    """Read an image of any mode that Pillow knows, of several frames or pages the first. EXIF
    orientation is applied, unless only the stored orientation has the expected size: annotation
    tools disagree on which of the two they mean.

    Args:
        path: of the image file.
        height, width: expected size in pixels; None accepts any size.
        file: the content, which messages call `path`; None opens that.

    Returns:
        (height, width, 3) uint8, RGB. A file that is missing, cannot be decoded, or has another
        size is a DatasetError.
    """
    with _open_image(path, file) as image:
        is_upright = _is_upright(image, path, height, width)
        # The second image in the file of a phone's photo (MPO) is not meant to be seen.
        if image.format != "MPO" and getattr(image, "is_animated", False):
            _warn_once(f"Only the first frame or page of {image.format} files is read.")
        image.load()
        with contextlib.suppress(Exception):  # of a malformed EXIF block
            if is_upright:
                ImageOps.exif_transpose(image, in_place=True)
        return np.asarray(as_rgb(image))


def check_image(path: PathLike, height: int, width: int) -> None:
    """Decode an image and compare its size, in either EXIF orientation, with the expected one;
    errors are those of `read_image`."""
    with _open_image(path) as image:
        _is_upright(image, path, height, width)
        # Lets the JPEG decoder skip most of the inverse transform; it still reads every byte.
        image.draft("RGB", (1, 1))
        image.load()


def upright_size(path: PathLike) -> Tuple[int, int]:
    """Height and width of an image in pixels, as its EXIF orientation turns it upright; errors are
    those of `read_image`."""
    with _open_image(path) as image:
        return _upright_size(image)


class _ResizeShortSide(T.ResizeShortestEdge):
    """Detectron2's, but a very long and thin image keeps at least one pixel a side."""

    def __init__(self, short_sides: Union[int, Sequence[int]], max_size: int):
        sides = np.atleast_1d(short_sides).tolist()
        if min(sides, default=0) < 1:
            raise ValueError(f"short_sides={sides} must be sizes of at least 1 pixel.")
        if max_size < 1:
            raise ValueError(f"max_size={max_size} must be at least 1 pixel.")
        super().__init__(sides, max_size, sample_style="choice")

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Of an (H, W, 3) image."""
        transform = super().get_transform(image)
        transform.new_h, transform.new_w = max(1, transform.new_h), max(1, transform.new_w)
        return transform


def detr_augmentations(
    short_sides: Union[int, Sequence[int]] = tuple(range(480, 801, 32)),
    max_size: int = 1333,
    *,
    flip: bool = True,
    crop_range: Optional[Tuple[int, int]] = None,
    crop_short_sides: Union[int, Sequence[int]] = (400, 500, 600),
    color_jitter: float = 0.0,
) -> List[T.Augmentation]:
    """One branch of DETR's augmentation: flip, [resize, crop,] resize. All sizes are in pixels.

    In training, `DetrDatasetMapper` takes the branch without the crop and the one with it
    (``crop_range=(384, 600)`` on COCO) with equal chances.

    Args:
        short_sides: the short side becomes one of these.
        max_size: the long side becomes no longer than this, whatever the short one.
        flip: flip horizontally with probability 1/2.
        crop_range: least and greatest side of the crop; of an image smaller than that, the whole
            side is kept. None: no crop.
        crop_short_sides: the short side before the crop becomes one of these.
        color_jitter: brightness, contrast and saturation are multiplied by random factors that
            differ from 1 by up to this much.

    Raises:
        ValueError: a size or `color_jitter` is out of range.
    """
    augmentations = [T.RandomFlip()] if flip else []
    if crop_range is not None:
        if len(crop_range) != 2 or not 0 < crop_range[0] <= crop_range[1]:
            raise ValueError(f"crop_range={crop_range} must be a least and a greatest side.")
        # The recipe sets no limit to the long side here. This one is out of reach of
        # photographs; it keeps 1 x 10000 pixels from being enlarged to gigabytes.
        max_size_before_crop = 16 * int(np.max(crop_short_sides))
        augmentations.append(_ResizeShortSide(crop_short_sides, max_size_before_crop))
        augmentations.append(T.RandomCrop("absolute_range", tuple(crop_range)))
    augmentations.append(_ResizeShortSide(short_sides, max_size))
    if not 0 <= color_jitter <= 1:
        raise ValueError(f"color_jitter={color_jitter} must be from 0 to 1.")
    if color_jitter:  # of the resized image, which has fewer pixels
        factors = (1 - color_jitter, 1 + color_jitter)
        augmentations += [
            change(*factors)
            for change in (T.RandomBrightness, T.RandomContrast, T.RandomSaturation)
        ]
    return augmentations


class DetrDatasetMapper:
    """Maps a dataset dict in Detectron2's format to the model's input.

    The result keeps the dict's keys (``file_name``, ``image_id``, ...) except ``annotations``,
    and has
      - ``image``: uint8 tensor (3, H, W), augmented;
      - ``height``, ``width``: the original size in pixels;
      - in training ``instances``: ``gt_boxes`` (XYXY in pixels of the augmented image, clipped
        to it) and ``gt_classes``. Crowds are left out, and boxes that a crop emptied.

    Args:
        is_train: whether to return ``instances``.
        augmentations: applied in this order.
        augmentations_with_crop: if given, applied instead of `augmentations` with probability 1/2
            (in training).
        image_format: "RGB" or "BGR", the order of the channels of ``image``.
    """

    def __init__(
        self,
        is_train: bool,
        augmentations: Sequence[T.Augmentation],
        augmentations_with_crop: Optional[Sequence[T.Augmentation]] = None,
        image_format: str = "RGB",
    ):
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be 'RGB' or 'BGR', not {image_format!r}.")
        if augmentations_with_crop is not None and not is_train:
            raise ValueError("augmentations_with_crop is for training: leave it out or None.")
        branches = [augmentations]
        if augmentations_with_crop is not None:
            branches.append(augmentations_with_crop)
        self.is_train = is_train
        self.branches = [T.AugmentationList(list(branch)) for branch in branches]
        self.image_format = image_format

    def __call__(self, dataset_dict: Dict[str, Any]) -> Dict[str, Any]:
        """Read and augment the image of a dataset dict, which stays as it is; errors are those of
        `read_image`."""
        result = copy.deepcopy(dataset_dict)
        annotations = result.pop("annotations", [])
        image = read_image(result["file_name"], result.get("height"), result.get("width"))
        result["height"], result["width"] = image.shape[:2]
        if self.image_format == "BGR":
            image = image[:, :, ::-1]

        aug_input, count = T.AugInput(image), len(self.branches)
        branch = self.branches[np.random.randint(count) if count > 1 else 0]
        transforms = branch(aug_input)
        image = aug_input.image
        result["image"] = torch.from_numpy(image.transpose(2, 0, 1).copy())
        if self.is_train:
            result["instances"] = _to_instances(annotations, transforms, image.shape[:2])
        return result


def _to_instances(
    annotations: List[Dict[str, Any]], transforms: T.TransformList, image_size: Tuple[int, int]
) -> Instances:
    """Boxes and classes of the annotations that are no crowds and still have an area."""
    transformed = [
        detection_utils.transform_instance_annotations(
            # Masks and keypoints are of no use here, and slow to transform.
            {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")},
            transforms,
            image_size,
        )
        for annotation in annotations
        if not annotation.get("iscrowd", 0)
    ]
    instances = detection_utils.annotations_to_instances(transformed, image_size)
    return detection_utils.filter_empty_instances(instances, by_mask=False)
