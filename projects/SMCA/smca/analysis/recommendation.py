"""Settings that suit a data set: rules of thumb from docs/convergence.md."""

import math
from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

import numpy as np

from smca.analysis.dataset import LARGE, SMALL, Statistics
from smca.modeling.weight_map import PUBLISHED_BETA

__all__ = ["MAX_SIZE", "Advice", "recommend"]

MAX_SIZE = 1333  # of the long side in COCO's recipe, in pixels

_CELLS = 3  # of the finest scale, that a small object should span
_START_RADIUS = 1 / 3  # of a map before training, by the size of a small object
_ALIKE = 3  # up to this ratio of large and small objects, one scale is enough
_QUERIES_BY_OBJECTS, _MIN_QUERIES = 1.4, 40
_SHORT_SIDES = (128, 800)  # pixels


@dataclass
class Advice:
    """A setting that suits the data.

    Attributes:
        setting: its key, or what it is about.
        value: for a key, what to set; else words.
        reason: one or two sentences.
        overrides: of a config with the augmentations of ``configs/common/coco.py``.
    """

    setting: str
    value: Any
    reason: str
    overrides: List[str] = field(default_factory=list)


def recommend(
    statistics: Statistics,
    finest_stride: int,
    num_scales: int,
    max_size: int = MAX_SIZE,
    map_stride: Optional[int] = None,
) -> List[Advice]:
    """Settings for the data.

    Args:
        statistics: of the training data.
        finest_stride: of the model's scales, in pixels.
        num_scales: of the model.
        max_size: of the config's long sides, in pixels. If it is less than COCO's, COCO's is
            advised.
        map_stride: of the finest scale that the decoder reads, if it is another one.

    Returns:
        Advice on queries, image size, beta and scales; none without objects.
    """
    if not len(statistics.boxes):
        return []
    sizes, short_side = _short_side(statistics, finest_stride, max(max_size, MAX_SIZE))
    small, large = np.percentile(sizes, [SMALL, LARGE]).tolist()
    cells = small / finest_stride
    map_stride = map_stride or finest_stride
    most = int(statistics.objects_per_image.max())
    queries = max(_MIN_QUERIES, 10 * math.ceil(_QUERIES_BY_OBJECTS * most / 10))
    beta = _beta(small, map_stride, num_scales)
    return [
        Advice(
            "model.num_queries",
            queries,
            f"an image has up to {most} objects; at least {_MIN_QUERIES} queries, and "
            f"{_QUERIES_BY_OBJECTS} times as many as objects.",
            [f"model.num_queries={queries}"],
        ),
        Advice(
            "short_sides",
            short_side,
            f"small objects (percentile {SMALL}) become {small:.0f} pixels, {cells:.1f} cells of "
            f"stride {finest_stride}; they should span {_CELLS}"
            + ("." if _is_fine(cells) else ", but larger images cost too much.")
            + _smallest_class(statistics, sizes, small),
            _size_overrides(short_side, max_size),
        ),
        Advice(
            "model.decoder.modulation.beta",
            beta,
            f"maps then start at stride {map_stride} with a third of a small object's size.",
            [f"model.decoder.modulation.beta={beta}"],
        ),
        _advise_scales(large / small, cells, small, finest_stride, num_scales, map_stride),
    ]


def _short_side(statistics: Statistics, stride: int, max_size: int) -> Tuple[np.ndarray, int]:
    """The objects' sizes at the least short side (a multiple of 32) at which small objects span
    enough cells, and that short side."""
    for side in range(_SHORT_SIDES[0], _SHORT_SIDES[1] + 1, 32):
        sizes = statistics.scaled_sizes(side, max_size)
        if np.percentile(sizes, SMALL) >= _CELLS * stride:
            break
    return sizes, side


def _is_fine(cells: float) -> bool:
    return cells >= _CELLS - 0.1


def _size_overrides(short_side: int, max_size: int) -> List[str]:
    overrides = [
        f"dataloader.train.mapper.augmentations.short_sides=[{short_side}]",
        # Or half of the images keep the sizes of the augmentation with crops.
        "dataloader.train.mapper.augmentations_with_crop=null",
        f"dataloader.test.mapper.augmentations.short_sides={short_side}",
    ]
    if max_size < MAX_SIZE:
        overrides += [
            f"dataloader.{split}.mapper.augmentations.max_size={MAX_SIZE}"
            for split in ("train", "test")
        ]
    return overrides


def _smallest_class(statistics: Statistics, sizes: np.ndarray, small: float) -> str:
    """A sentence on the class of the smallest objects, if it is smaller than "small" ones."""
    median, name = min(
        (float(np.median(sizes[statistics.classes == index])), name)
        for index, name in enumerate(statistics.class_names)
        if (statistics.classes == index).any()
    )
    if median >= small:
        return ""
    return (
        f" Objects of the class '{name}' become only {median:.0f} pixels (median): take larger "
        "images if that class matters."
    )


def _beta(small: float, stride: int, num_scales: int) -> float:
    """Inverts the radius at which a map starts at the finest scale: sqrt(beta / 2) cells with one
    scale, sqrt(16 beta stride) pixels with several."""
    radius = _START_RADIUS * small
    beta = 2 * (radius / stride) ** 2 if num_scales == 1 else radius**2 / (16 * stride)
    return min(float(f"{beta:.1g}"), PUBLISHED_BETA)


def _advise_scales(
    ratio: float, cells: float, small: float, stride: int, num_scales: int, map_stride: int
) -> Advice:
    alike = f"large objects are {ratio:.1f} times as long as small ones"
    if ratio <= _ALIKE and _is_fine(cells):
        reason = f"{alike}; up to {_ALIKE} times, more scales only cost time."
        if num_scales > 1 and map_stride == stride:  # else the decoder needs the finest and another
            reason += (
                " One is: the first of model.in_features alone, model.num_extra_scales=0 and "
                f"model.decoder.modulation.beta={_beta(small, stride, 1)}."
            )
        return Advice("scales", f"one of stride {stride} is enough", reason)
    encoder = "the convolutional encoder (configs/common/models/smca_conv.py)"
    if not _is_fine(cells) and stride > 8:
        reason = f"small objects are {cells:.1f} cells of stride {stride}; {encoder} has stride 8."
        return Advice("scales", "several, from stride 8", reason)
    return Advice("scales", "several", f"{alike}; {encoder} is the fastest with several scales.")
