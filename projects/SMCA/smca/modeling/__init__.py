"""The model, one concept a file."""

from .backbone import build_resnet
from .conv_encoder import ConvEncoder
from .criterion import SetCriterion
from .decoder import Decoder
from .detector import SMCA
from .encoder import TransformerEncoder
from .matcher import HungarianMatcher
from .neck import ScaleProjection

__all__ = [
    "SMCA",
    "ConvEncoder",
    "Decoder",
    "HungarianMatcher",
    "ScaleProjection",
    "SetCriterion",
    "TransformerEncoder",
    "build_resnet",
]
