"""Settings that follow from the training data, for configs such as ``custom_small.py``.

A config names them as calls, ``model.num_queries = L(fit_num_queries)(names=...)``. When a training
starts, :func:`smca.config.fit_to_data` replaces each by its value and says it in the log.
"""

import functools
import math
from typing import Any, List, Optional, Sequence, Tuple, Union

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

from .coco import as_list

Names = Union[str, Sequence[str]]  # of registered data sets that train together

_SMALL = 10  # percentile of objects' lengths
_SMALL_CELLS = 3  # that a small object should span
_SMALL_SIDE = 32  # pixels; COCO calls smaller objects small
_LARGE = 0.3  # of an image; crops would cut most objects of this length
MIN_QUERIES, MAX_QUERIES = 40, 300
_SHORT_SIDES = (160, 320)  # pixels; a CPU takes too long for more
_EPOCHS = 30
_NUM_ITERATIONS = (1000, 5000)


def fit_num_queries(names: Names) -> int:
    """Half as many queries again as the fullest image has objects, 40 at least and 300 at most."""
    counts, _ = _objects(names)
    most = max(counts, default=0)
    return int(np.clip(10 * math.ceil(1.5 * most / 10), MIN_QUERIES, MAX_QUERIES))


def fit_short_sides(names: Names, stride: int, factors: Sequence[float] = (1.0,)) -> List[int]:
    """The short side at which a small object spans three cells of the finest scale's stride, a
    multiple of 32 from 160 to 320 pixels; times each factor, for training at several."""
    pixels = _SMALL_CELLS * stride / _length(names)
    side = int(np.clip(32 * math.ceil(pixels / 32), *_SHORT_SIDES))
    return [round(factor * side) for factor in factors]


def fit_max_size(names: Names, stride: int, factor: float = 1.0) -> int:
    """The longest that the other side may become: 1.6 times what :func:`fit_short_sides` gives for
    the factor."""
    return round(1.6 * fit_short_sides(names, stride, [factor])[0])


def fit_in_features(names: Names) -> List[str]:
    """The backbone's features: from stride 4 where objects are small (under 32 pixels in images of
    160), else from stride 8, whose cells are fewer and see more of an object."""
    is_small = _length(names) * _SHORT_SIDES[0] < _SMALL_SIDE
    return ["res2", "res3", "res4"] if is_small else ["res3", "res4"]


def fit_num_extra_scales(in_features: Sequence[str]) -> int:
    """As many as make three scales of the features, which :func:`fit_in_features` may give."""
    return max(0, 3 - len(in_features))


def fit_scales_to_read(in_features: Sequence[str]) -> Optional[List[int]]:
    """All but stride 4, whose cells are too many to attend to; None where that is no scale."""
    return list(range(1, max(3, len(in_features)))) if "res2" in in_features else None


def fit_crop_range(names: Names, stride: int, factors: Tuple[float, float]) -> Optional[List[int]]:
    """The sides of crops in pixels, relative to what :func:`fit_short_sides` gives; None where half
    of the objects are longer than 0.3 of their images, since crops would cut them."""
    if _length(names, 50) > _LARGE:
        return None
    return fit_short_sides(names, stride, factors)


def fit_num_iterations(names: Names, batch_size: int, share: float = 1.0) -> int:
    """Thirty epochs in batches of all processes together, but 1,000 iterations at least and 5,000
    at most; of these a share, for periods."""
    counts, _ = _objects(names)
    num_iterations = round(_EPOCHS * len(counts) / max(batch_size, 1))  # 0 is refused elsewhere
    return round(share * np.clip(num_iterations, *_NUM_ITERATIONS))


def _length(names: Names, percentile: float = _SMALL) -> float:
    """Of objects, relative to the short sides of their images; 1 without objects."""
    _, lengths = _objects(names)
    return max(np.percentile(lengths, percentile), 1e-3) if lengths else 1.0


def _objects(names: Names) -> Tuple[List[int], List[float]]:
    """The numbers of objects of all images, and the objects' lengths relative to the short sides of
    their images, without crowds, which no query has to find."""
    parts = [_objects_of(name, DatasetCatalog.data.get(name)) for name in as_list(names)]
    counts, lengths = ([x for part in column for x in part] for column in zip(*parts))
    return counts, lengths


# Several settings follow from the same data, which may take seconds to go through.
@functools.lru_cache(maxsize=16)
def _objects_of(name: str, registered: Any) -> Tuple[List[int], List[float]]:
    """`registered`, the catalog's function, makes data that are registered anew another key."""
    counts: List[int] = []
    lengths: List[float] = []
    for image in DatasetCatalog.get(name):
        side = min(image["width"], image["height"])
        items = [item for item in image["annotations"] if not item.get("iscrowd")]
        counts.append(len(items))
        for item in items:
            _, _, w, h = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS)
            lengths.append(math.sqrt(w * h) / side)
    return counts, lengths
