"""Fused kernels for FBKD, the feature-based knowledge-distillation loss for object detectors."""

__version__ = "0.1.0"

from . import distributed, functional, integrations, reference, visualize
from .backends import use_backend
from .distiller import Distiller
from .feature_tap import FeatureTap, Layer
from .loss import FBKDLoss
from .non_local_block import NonLocalBlock2d
from .presets import PRESETS, LevelSettings
from .types import AttentionPool, NonLocalWeights

__all__ = [
    "AttentionPool",
    "Distiller",
    "FBKDLoss",
    "FeatureTap",
    "Layer",
    "LevelSettings",
    "NonLocalBlock2d",
    "NonLocalWeights",
    "PRESETS",
    "distributed",
    "functional",
    "integrations",
    "reference",
    "use_backend",
    "visualize",
]
