"""A trained detector as a function of images."""

from .build import WEIGHTS, load_test_dataset, load_weights
from .detections import Detections
from .predictor import Predictor

__all__ = ["WEIGHTS", "Detections", "Predictor", "load_test_dataset", "load_weights"]
