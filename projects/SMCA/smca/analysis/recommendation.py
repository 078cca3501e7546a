"""Which settings suit a data set, and why, from the measured study (docs/convergence.md)."""

import math
from dataclasses import dataclass, field
from typing import Any, List, Optional, Tuple

import numpy as np

from smca.analysis.dataset import LARGE, SMALL, Statistics
from smca.modeling.weight_map import PUBLISHED_BETA

__all__ = ["MAX_SIZE", "Advice", "recommend"]

MAX_SIZE = 1333  # of the long side in COCO's recipe, in pixels

# The study's best models see a small object as 3 cells of
# their finest scale (25 and 27 pixels at stride 8), with maps that start at 8 pixels, a third of
# it. Its objects are alike in size, and 40 queries were enough for 30 objects an image.
_CELLS = 3
_START_RADIUS = 1 / 3  # of a small object
_ALIKE = 3  # large by small objects: 2.5 and 1.5 in the study
_QUERIES_BY_OBJECTS, _MIN_QUERIES = 1.4, 40
_SHORT_SIDES = (128, 800)  # pixels: the study's least, and the published one


@dataclass
class Advice:
    """A setting that suits the data.

    Attributes:
        setting: its key, or what it is about.
        value: for a key, what to set; else words.
        reason: one sentence.
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
    """Settings for the data, by what the measured study (docs/convergence.md) found.

    Args:
        statistics: of the training data.
        finest_stride: of the model's scales, in pixels.
        num_scales: of the model.
        max_size: of the config's long sides, in pixels. Where it is less than COCO's, that is
            advised as well.
        map_stride: of the finest scale that the decoder reads, if it is another one.

    Returns:
        One for queries, image size, beta and the model's scales; none without objects.
    """
    if not len(statistics.boxes):
        return []
    is_capped, max_size = max_size < MAX_SIZE, max(max_size, MAX_SIZE)
    map_stride = map_stride or finest_stride
    short_side, cells = _short_side(statistics, finest_stride, max_size)
    small, large = np.percentile(
        statistics.scaled_sizes(short_side, max_size), [SMALL, LARGE]
    ).tolist()
    return [
        _advise_queries(statistics),
        Advice(
            "short_sides",
            short_side,
            f"small objects (the {SMALL}th percentile) become {small:.0f} pixels, {cells:.1f} "
            f"cells of stride {finest_stride}; the study's models saw them as {_CELLS}"
            + ("." if cells >= _CELLS - 0.1 else ", which larger images would cost too much.")
            + _smallest_class(statistics, short_side, max_size, small),
            [
                f"dataloader.train.mapper.augmentations.short_sides=[{short_side}]",
                # Or half of the images keep the sizes of the augmentation with crops.
                "dataloader.train.mapper.augmentations_with_crop=null",
                f"dataloader.test.mapper.augmentations.short_sides={short_side}",
                *(
                    f"dataloader.{split}.mapper.augmentations.max_size={max_size}"
                    for split in ("train", "test")
                    if is_capped
                ),
            ],
        ),
        _advise_beta(small, map_stride, num_scales),
        _advise_scales(small, large, cells, finest_stride, num_scales, map_stride),
    ]


def _advise_queries(statistics: Statistics) -> Advice:
    most = int(statistics.objects_per_image.max())
    queries = max(_MIN_QUERIES, 10 * math.ceil(_QUERIES_BY_OBJECTS * most / 10))
    reason = (
        f"an image has up to {most} objects and a query finds one at most; in the study "
        f"{_MIN_QUERIES} were enough for 30, and fewer are faster"
    )
    if most > 100:
        reason += ". COCO's AP counts the best 100 detections of an image only"
    return Advice("model.num_queries", queries, reason + ".", [f"model.num_queries={queries}"])


def _short_side(statistics: Statistics, stride: int, max_size: int) -> Tuple[int, float]:
    """The least multiple of 32 at which small objects span enough cells, and how many they do."""
    sides = range(_SHORT_SIDES[0], _SHORT_SIDES[1] + 1, 32)
    for side in sides:
        small = np.percentile(statistics.scaled_sizes(side, max_size), SMALL)
        if small >= _CELLS * stride:
            break
    return side, float(small / stride)


def _smallest_class(statistics: Statistics, short_side: int, max_size: int, small: float) -> str:
    """A sentence on the class of the smallest objects, if it is smaller than "small" ones."""
    sizes = statistics.scaled_sizes(short_side, max_size)
    medians = {
        name: float(np.median(sizes[statistics.classes == index]))
        for index, name in enumerate(statistics.class_names)
        if (statistics.classes == index).any()
    }
    name = min(medians, key=lambda name: medians[name])
    if medians[name] >= small:
        return ""
    return (
        f" Objects of the class '{name}' become only {medians[name]:.0f} pixels (median): take "
        "larger images if that class matters."
    )


def _beta(small: float, stride: int, num_scales: int) -> float:
    """Inverts the radius at which a map starts at the finest scale, sqrt(beta / 2) cells, with
    several scales sqrt(16 beta stride) pixels."""
    radius = _START_RADIUS * small
    beta = 2 * (radius / stride) ** 2 if num_scales == 1 else radius**2 / (16 * stride)
    return min(float(f"{beta:.1g}"), PUBLISHED_BETA)


def _advise_beta(small: float, stride: int, num_scales: int) -> Advice:
    beta = _beta(small, stride, num_scales)
    start = stride * math.sqrt(beta / 2) if num_scales == 1 else math.sqrt(16 * beta * stride)
    return Advice(
        "model.decoder.modulation.beta",
        beta,
        f"with {_scales(num_scales)} maps start with a radius of {start:.0f} pixels at stride "
        f"{stride}, about a third of a small object ({small:.0f} pixels); starting so, not twice "
        "as wide, took the study's models from AP 28.9 to 33.2 with one scale and from 16.6 to "
        "21.9 with three.",
        [f"model.decoder.modulation.beta={beta}"],
    )


def _scales(number: int) -> str:
    return "one scale" if number == 1 else f"{number} scales"


def _advise_scales(
    small: float, large: float, cells: float, stride: int, num_scales: int, map_stride: int
) -> Advice:
    ratio = large / small
    alike = f"large objects are {ratio:.1f} times as long as small ones"
    if ratio <= _ALIKE and cells >= _CELLS - 0.1:
        return Advice(
            "scales",
            f"one of stride {stride} is enough",
            f"{alike}; in the study (2.5 and 1.5 times) several scales gained nothing over one, "
            "and took two to three times as long."
            + (
                ""
                if num_scales == 1 or map_stride != stride  # the finest is needed with another
                else " One is: the first of model.in_features alone, model.num_extra_scales=0 and "
                f"model.decoder.modulation.beta={_beta(small, stride, 1)}."
            ),
        )
    if cells < _CELLS - 0.1 and stride > 8:
        return Advice(
            "scales",
            "several, from stride 8",
            f"small objects are {cells:.1f} cells of stride {stride}: the convolutional encoder "
            "(configs/common/models/smca_conv.py) has stride 8.",
        )
    return Advice(
        "scales",
        "several",
        f"{alike}; on COCO several scales are ahead of one (43.7 over 41.0 AP), as in the study of "
        "objects that differ ten times (19.8 over 11.6), where the convolutional encoder "
        "(configs/common/models/smca_conv.py) took two thirds of the attention encoder's time for "
        "as much or more (22.1).",
    )
