"""Where the queries of known objects look, how far, and on which scales.

Queries are matched to the true objects as in training, so that a detector which detects nothing
yet can be looked at as well. There are M objects, H' heads (1 if they share their map) and L
scales. Pixels are those of the original images.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Dict, Iterable, List, Optional, Sequence, Tuple, cast

import numpy as np
import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert

from smca.analysis.detections import truth_of
from smca.analysis.recorder import LayerRecord, Recorder
from smca.analysis.weight_maps import DetectionMaps, maps_of
from smca.data import read_image
from smca.errors import UserError
from smca.modeling import SMCA
from smca.modeling.criterion import SetCriterion
from smca.modeling.matcher import Targets

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Predictor

__all__ = [
    "ModulationStatistics",
    "collect",
    "collect_examples",
    "summarize",
]

SIZES = ("small", "medium", "large")  # thirds of the objects


@dataclass
class ModulationStatistics:
    """True objects and where the queries matched to them look, in one decoder layer.

    Heads' centers and 1 / radius^2 (the precision of a Gaussian) are means over the scales,
    weighted with the query's scale weights.

    Attributes:
        strides: L pixels (of the model's input) a cell.
        boxes: (M, 4) the objects' true boxes, XYXY in pixels.
        head_centers: (M, H', 2) in pixels.
        head_radii: (M, H', 2) distances along x and y, in pixels, at which a head's log-weight is
            -1/2: the standard deviation of a Gaussian.
        scale_weights: (M, L), which add up to 1; None where the model does not select scales.
    """

    strides: List[int]
    boxes: np.ndarray
    head_centers: np.ndarray
    head_radii: np.ndarray
    scale_weights: Optional[np.ndarray] = None

    @classmethod
    def of_image(
        cls, record: LayerRecord, queries: Tensor, boxes: Tensor, size: Tuple[int, int]
    ) -> "ModulationStatistics":
        """The statistics of one image.

        Args:
            record: of the model's call for that image.
            queries: (M,) indices.
            boxes: (M, 4), XYXY in pixels.
            size: (height, width) of the image in pixels.
        """
        weights = record.scale_shares(queries)
        shares = weights[..., None, None]  # (M, L, 1, 1)
        head_centers = (shares * record.head_centers_in_pixels(queries, size)).sum(dim=1)
        precisions = (shares * record.radii_in_pixels(queries, size).pow(-2)).sum(dim=1)
        arrays = [x.cpu().numpy() for x in (boxes, head_centers, precisions.rsqrt(), weights)]
        if record.scale_weights is None:
            arrays.pop()
        return cls(record.strides, *arrays)

    @classmethod
    def join(cls, parts: Sequence["ModulationStatistics"]) -> "ModulationStatistics":
        """Those of several images (at least one) as one."""
        columns = zip(*(list(vars(part).values())[1:] for part in parts))
        arrays = (None if column[0] is None else np.concatenate(column) for column in columns)
        return cls(parts[0].strides, *arrays)  # type: ignore[arg-type]

    @property
    def half_sizes(self) -> np.ndarray:
        """(M, 2) half width and half height of the boxes in pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]) / 2

    @property
    def sqrt_areas(self) -> np.ndarray:
        """(M,) in pixels."""
        return 2 * np.sqrt(self.half_sizes.prod(axis=1))

    @property
    def head_distances(self) -> np.ndarray:
        """(M, H') distances of the heads' centers from the box's, in half boxes along the axis
        where they are greater: inside the box they are less than 1."""
        offsets = self.head_centers - (self.boxes[:, None, :2] + self.boxes[:, None, 2:]) / 2
        return np.abs(offsets / self.half_sizes[:, None]).max(axis=2)

    @property
    def head_deviations(self) -> np.ndarray:
        """(M,) root mean square distance of the heads' centers from their mean, in widths and
        heights of the box."""
        offsets = self.head_centers - self.head_centers.mean(axis=1, keepdims=True)
        relative = offsets / (2 * self.half_sizes[:, None])
        return np.sqrt(np.square(relative).sum(axis=2).mean(axis=1))


def collect(
    predictor: "Predictor", dataset_dicts: Iterable[Dict[str, Any]], layer: int = -1
) -> ModulationStatistics:
    """The statistics of all objects of some images that have a query.

    Args:
        predictor: a detector with an `SMCA`.
        dataset_dicts: in Detectron2's format. Crowds and boxes without area are not objects.
        layer: index of the decoder's layer. The predictions of the last layer decide which query
            an object has.

    Raises:
        NoModulationError: the model has no modulation.
        UserError: it has no such layer or class, there are no objects, or an image cannot be read.
    """
    parts = []
    for item in dataset_dicts:
        if len(_objects_of(item)):
            matched, record, _ = _match(predictor, item, layer)
            found = (matched.query_indices, matched.pred_boxes.tensor, matched.image_size)
            parts.append(ModulationStatistics.of_image(record, *found))
    if not parts:
        raise UserError("There are no objects in the images to look at.")
    return ModulationStatistics.join(parts)


def collect_examples(
    predictor: "Predictor",
    dataset_dicts: Sequence[Dict[str, Any]],
    layer: int = -1,
    num_objects: int = 3,
) -> List[DetectionMaps]:
    """Where the queries of an image's largest objects look. The image is the first one that has
    `num_objects`, else the one that has most.

    Args:
        predictor, dataset_dicts, layer: see `collect`.
        num_objects: how many objects to take.

    Returns:
        The maps of each object, with its true box and class, and the score that the query gives it.
    """
    item = max(dataset_dicts, key=lambda item: min(len(_objects_of(item)), num_objects))
    matched, record, image = _match(predictor, item, layer)
    largest = matched.pred_boxes.area().argsort(descending=True, stable=True)[:num_objects]
    return maps_of(matched[largest], record, image)


def _objects_of(item: Dict[str, Any]) -> Instances:
    """The true objects, without crowds and boxes without area."""
    truth = truth_of(item)
    return truth[truth.gt_boxes.nonempty() & ~truth.gt_crowd]


@torch.no_grad()
def _match(
    predictor: "Predictor", item: Dict[str, Any], layer: int
) -> Tuple[Instances, LayerRecord, np.ndarray]:
    """An image's objects in the fields of detections (their scores are those of their classes),
    with ``query_indices``; where queries look; and the image."""
    model, truth = cast(SMCA, predictor.model), _objects_of(item)
    image = read_image(item["file_name"], item["height"], item["width"])
    with Recorder(model) as recorder:
        predictor(image, threshold=0)
    record = recorder.layer(layer)
    logits, boxes_cxcywh = model.forward_head(recorder.output)
    if truth.gt_classes.max() >= logits.shape[-1]:
        raise UserError(
            f"The data have a class {truth.gt_classes.max()}, the model has {logits.shape[-1]}: "
            "these data are not the ones that it was trained for."
        )
    height, width = truth.image_size
    boxes = truth.gt_boxes.tensor / torch.tensor([width, height] * 2)
    targets = Targets(truth.gt_classes, box_convert(boxes, "xyxy", "cxcywh"))
    matcher = cast(SetCriterion, model.criterion or SetCriterion()).matcher
    logits = logits.cpu()
    matching = matcher(logits, boxes_cxcywh.cpu(), [targets])
    truth = truth[matching.targets]
    matched = Instances(
        truth.image_size,
        pred_boxes=truth.gt_boxes,
        pred_classes=truth.gt_classes,
        scores=logits[-1, 0, matching.queries, truth.gt_classes].sigmoid(),
        query_indices=matching.queries,
    )
    return matched, record, image


def summarize(statistics: ModulationStatistics) -> Dict[str, Any]:
    """The numbers that `smca.analysis.draw_training` draws.

    Distances are in half boxes, deviations in boxes, other lengths in pixels. Three numbers are
    the first quartile, the median and the third quartile.

    Returns:
        A dict for JSON, without ``head_deviation`` where heads share their map, and without
        ``scale_weights`` (means by stride) where the model does not select scales. A number that
        is not finite is None.
    """
    summary: Dict[str, Any] = {
        "num_objects": len(statistics.boxes),
        "head_center_distance": _quartiles(statistics.head_distances),
        "head_centers_inside": _number((statistics.head_distances < 1).mean()),
        "sizes": {},
    }
    if statistics.head_centers.shape[1] > 1:
        summary["head_deviation"] = _quartiles(statistics.head_deviations)
    thirds = np.array_split(statistics.sqrt_areas.argsort(kind="stable"), len(SIZES))
    for name, third in zip(SIZES, thirds):
        if len(third):
            summary["sizes"][name] = _summarize_size(statistics, third)
    return summary


def _summarize_size(statistics: ModulationStatistics, third: np.ndarray) -> Dict[str, Any]:
    """The numbers of the objects with these indices."""
    sqrt_areas = statistics.sqrt_areas[third]
    summary: Dict[str, Any] = {
        "sqrt_area": [_number(sqrt_areas.min()), _number(sqrt_areas.max())],
        "half_size": _number(np.median(statistics.half_sizes[third])),
        "radius": _number(np.median(statistics.head_radii[third])),
    }
    if statistics.scale_weights is not None:
        weights = statistics.scale_weights[third].mean(axis=0)
        summary["scale_weights"] = dict(zip(map(str, statistics.strides), map(_number, weights)))
    return summary


def _quartiles(values: np.ndarray) -> List[Optional[float]]:
    return [_number(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def _number(value: float) -> Optional[float]:
    return round(float(value), 4) if np.isfinite(value) else None
