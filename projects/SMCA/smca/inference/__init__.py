"""A trained detector as a function of images."""

from .command_line import (
    add_predictor_arguments,
    add_threshold,
    add_weights_kind,
    make_folder,
    predictor_of,
)
from .detections import Detections
from .predictor import Predictor, load_test_dataset, load_weights
