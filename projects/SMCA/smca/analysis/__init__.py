"""Looking into a model and a training: pictures of detections, weight maps, curves, statistics."""

from .curves import draw_curves, read_metrics
from .detections import draw_contact_sheet, draw_instances, draw_truth_and_detections, truth_of
from .pictures import draw_pictures, evenly, write_pictures
from .recorder import LayerRecord, NoModulationError, Recorder
from .statistics import ModulationStatistics, collect, collect_examples, summarize
from .training import draw_examples, draw_training
from .weight_maps import DetectionMaps, draw_gaussians, maps_of, modulation_maps

__all__ = [
    "DetectionMaps",
    "LayerRecord",
    "ModulationStatistics",
    "NoModulationError",
    "Recorder",
    "collect",
    "collect_examples",
    "draw_contact_sheet",
    "draw_curves",
    "draw_examples",
    "draw_gaussians",
    "draw_instances",
    "draw_pictures",
    "draw_training",
    "draw_truth_and_detections",
    "evenly",
    "maps_of",
    "modulation_maps",
    "read_metrics",
    "summarize",
    "truth_of",
    "write_pictures",
]
