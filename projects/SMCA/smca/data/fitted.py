"""Settings that follow from the training data, for configs such as ``custom_small.py``.

A config names them as calls, ``model.num_queries = L(fit_num_queries)(names=...)``. When a training
starts, :func:`smca.config.fit_to_data` replaces each by its value and says it in the log.
"""

import math
from typing import Any, Dict, List, Sequence, Tuple, Union

import numpy as np
from detectron2.data import DatasetCatalog
from detectron2.structures import BoxMode

__all__ = ["fit_max_size", "fit_num_iterations", "fit_num_queries", "fit_short_sides"]

Names = Union[str, Sequence[str]]  # of registered data sets that train together

_SMALL = 10  # percentile of objects' lengths
_SMALL_CELLS = 3  # that a small object should span
_NUM_QUERIES = (40, 300)
_SHORT_SIDES = (160, 320)  # pixels; a CPU takes too long for more
_EPOCHS = 30
_NUM_ITERATIONS = (1000, 5000)


def fit_num_queries(names: Names) -> int:
    """Half as many queries again as the fullest image has objects, 40 at least and 300 at most."""
    most = max((len(image["annotations"]) for image in _images(names)), default=0)
    return _between(10 * math.ceil(1.5 * most / 10), _NUM_QUERIES)


def fit_short_sides(names: Names, stride: int, factors: Sequence[float] = (1.0,)) -> List[int]:
    """The short side at which a small object spans three cells, a multiple of 32 from 160 to 320
    pixels.

    Args:
        names: data sets.
        stride: of the model's finest scale, in pixels.
        factors: of the short side, for training at several.
    """
    lengths = []  # of objects, relative to the short sides of their images
    for image in _images(names):
        side = min(image["width"], image["height"])
        for item in image["annotations"]:
            _, _, w, h = BoxMode.convert(item["bbox"], item["bbox_mode"], BoxMode.XYWH_ABS)
            lengths.append(math.sqrt(w * h) / side)
    small = max(np.percentile(lengths, _SMALL), 1e-3) if lengths else 1.0
    side = _between(32 * math.ceil(_SMALL_CELLS * stride / small / 32), _SHORT_SIDES)
    return [round(factor * side) for factor in factors]


def fit_max_size(names: Names, stride: int, factor: float = 1.0) -> int:
    """The longest that the other side may become: 1.6 times what :func:`fit_short_sides` gives for
    the factor."""
    return round(1.6 * fit_short_sides(names, stride, [factor])[0])


def fit_num_iterations(names: Names, batch_size: int, share: float = 1.0) -> int:
    """Thirty epochs, but 1,000 iterations at least and 5,000 at most.

    Args:
        names: data sets.
        batch_size: images of an iteration, in all processes together.
        share: of the whole training, for periods.
    """
    iterations = round(_EPOCHS * len(_images(names)) / batch_size)
    return round(share * _between(iterations, _NUM_ITERATIONS))


def _images(names: Names) -> List[Dict[str, Any]]:
    """Images with their objects, crowds left out, which no query has to find."""
    return [
        {**image, "annotations": [a for a in image["annotations"] if not a.get("iscrowd")]}
        for name in ([names] if isinstance(names, str) else names)
        for image in DatasetCatalog.get(name)
    ]


def _between(value: int, bounds: Tuple[int, int]) -> int:
    return max(bounds[0], min(bounds[1], value))
