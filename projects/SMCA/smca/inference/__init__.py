"""A trained detector as a function of images."""

from .predictor import Predictor, load_predictor, load_test_dataset

__all__ = ["Predictor", "load_predictor", "load_test_dataset"]
