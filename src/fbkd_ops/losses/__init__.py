"""Losses between the feature maps of a student and a teacher, beside FBKD's in ``fbkd_ops/loss.py``."""

from .cwd import CWDLoss
from .fgd import FGDLoss
from .mgd import MGDLoss
from .pkd import PKDLoss
from .score_weighted import ScoreWeightedLoss

__all__ = ["CWDLoss", "FGDLoss", "MGDLoss", "PKDLoss", "ScoreWeightedLoss"]
