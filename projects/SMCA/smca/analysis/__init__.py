"""Looking into a model, a training, and data: pictures of detections, weight maps and curves."""

from .curves import draw_curves, read_metrics
from .detections import (
    draw_contact_sheet,
    draw_instances,
    draw_truth_and_detections,
    evenly,
    truth_of,
)
from .weight_maps import (
    DetectionMaps,
    LayerRecord,
    detect_and_record,
    draw_gaussians,
    maps_of,
    modulation_maps,
    record_of,
)
