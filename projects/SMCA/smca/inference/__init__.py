"""A trained detector as a function of an image."""

from .predictor import Predictor, load_predictor, load_test_dataset

__all__ = ["Predictor", "load_predictor", "load_test_dataset"]
