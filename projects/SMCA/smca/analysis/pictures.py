"""All pictures of a trained model: detections, weight maps and curves, in one folder."""

import os
from typing import TYPE_CHECKING, Any, Callable, Dict, Iterable, List, Optional, Sequence

import numpy as np

from smca.analysis.curves import draw_curves, read_metrics
from smca.analysis.detections import draw_contact_sheet, draw_truth_and_detections, truth_of
from smca.analysis.recorder import detect_and_record, record_of
from smca.analysis.weight_maps import DetectionMaps, draw_gaussians, maps_of
from smca.data import read_image

if TYPE_CHECKING:  # it imports this package
    from smca.inference import Predictor


def write_pictures(
    predictor: "Predictor",
    dataset_dicts: Sequence[Dict[str, Any]],
    output_dir: str,
    metrics_file: Optional[str] = None,
    *,
    num_images: int = 8,
    num_detections: int = 4,
    confidence_threshold: float = 0.3,
    layer: int = -1,
    scale: Optional[int] = None,
    progress: Callable[[Sequence[Any]], Iterable[Any]] = iter,
) -> List[str]:
    """Draw what a detector finds: ``validation.png`` (truth and detections), ``gaussians.png``
    (maps of the best detections of different images; not for a model without modulation), and
    ``curves.png``. Gives their paths.

    Args:
        dataset_dicts: in Detectron2's format; images are taken evenly from it.
        output_dir: is made if it does not exist.
        metrics_file: a training's ``metrics.json``; None draws no curves.
        num_images, confidence_threshold: of ``validation.png``, the least score.
        num_detections, layer, scale: of ``gaussians.png``, see `draw_gaussians`.
        progress: wraps the images, as `tqdm.tqdm` does.

    Raises:
        UserError: an image cannot be read, or the model has no such layer or scale.
    """
    pictures: List[np.ndarray] = []
    captions: List[str] = []
    best: List[DetectionMaps] = []
    for item in progress(evenly(dataset_dicts, num_images)):
        image = read_image(item["file_name"], item["height"], item["width"])
        truth, (found, records) = truth_of(item), detect_and_record(predictor, image)
        detections = found[found.scores >= confidence_threshold]
        pictures.append(draw_truth_and_detections(image, truth, detections, predictor.class_names))
        captions.append(
            f"{os.path.basename(item['file_name'])}: truth ({len(truth)})  |  "
            f"detections from {100 * confidence_threshold:.0f}% ({len(detections)})"
        )
        if records:
            best += maps_of(found[[0]], record_of(records, layer), image)
    figures = {"validation.png": draw_contact_sheet(pictures, captions)}
    if best:
        best.sort(key=lambda detection: -detection.score)
        drawn = draw_gaussians(best[:num_detections], predictor.class_names, scale)
        figures["gaussians.png"] = drawn
    if metrics_file is not None:
        figures["curves.png"] = draw_curves(read_metrics(metrics_file))
    os.makedirs(output_dir, exist_ok=True)
    paths = []
    for name, figure in figures.items():
        paths.append(os.path.join(output_dir, name))
        figure.savefig(paths[-1])
    return paths


def evenly(items: Sequence[Any], count: int) -> List[Any]:
    """`count` items (or all, if there are fewer) at equal distances."""
    count = min(count, len(items))
    return [items[index * len(items) // count] for index in range(count)]
