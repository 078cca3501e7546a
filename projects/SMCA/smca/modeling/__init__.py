"""The model, one concept a file."""

from .backbone import build_resnet, fold_frozen_norms
from .class_loss import FocalLoss, VarifocalLoss
from .conv_encoder import ConvEncoder
from .criterion import SetCriterion
from .decoder import Decoder
from .denoising import Denoising
from .dense_head import DenseHead
from .detector import SMCA
from .encoder import TransformerEncoder
from .matcher import HungarianMatcher
from .neck import ScaleProjection
from .pyramid_encoder import PyramidEncoder
from .queries import LearnedQueries, ProposedQueries, Queries
from .scales import count_scales
from .timm_backbone import TimmBackbone
from .weight_map import (
    CovarianceGaussian,
    FixedGaussian,
    Gaussian,
    Modulation,
    SingleGaussian,
    WeightMap,
)
