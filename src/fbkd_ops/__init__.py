"""Fused kernels for FBKD, the feature-based knowledge-distillation loss for object detectors."""

__version__ = "0.1.0"

from . import functional, integrations, reference, visualize
from ._earlier_paths import register_earlier_paths
from ._warnings import TeacherImagesWarning, UntrainedTeacherWarning
from .backends import use_backend
from .loss import FBKDLoss
from .losses.cwd import CWDLoss
from .losses.fgd import FGDLoss
from .losses.mgd import MGDLoss
from .losses.pkd import PKDLoss
from .losses.score_weighted import ScoreWeightedLoss
from .non_local.batch_norm import FrozenBatchNorm2d
from .non_local.block import NonLocalBlock2d
from .presets import PRESETS, LevelSettings, size_free_weights
from .training import data_parallel as distributed
from .training.balance import BalanceReport
from .training.distiller import Distiller
from .training.feature_tap import FeatureTap, Layer
from .training.inherit import inherit
from .training.student_losses import sum_losses
from .training.teacher_input import Renormalize
from .training.token_maps import TokenMaps
from .types import AttentionPool, NonLocalWeights

register_earlier_paths()

__all__ = [
    "AttentionPool",
    "BalanceReport",
    "CWDLoss",
    "Distiller",
    "FBKDLoss",
    "FGDLoss",
    "FeatureTap",
    "FrozenBatchNorm2d",
    "Layer",
    "LevelSettings",
    "MGDLoss",
    "NonLocalBlock2d",
    "NonLocalWeights",
    "PKDLoss",
    "PRESETS",
    "Renormalize",
    "ScoreWeightedLoss",
    "TeacherImagesWarning",
    "TokenMaps",
    "UntrainedTeacherWarning",
    "distributed",
    "functional",
    "inherit",
    "integrations",
    "reference",
    "size_free_weights",
    "sum_losses",
    "use_backend",
    "visualize",
]
