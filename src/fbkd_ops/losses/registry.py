"""The losses by the names of their classes, as configurations have them."""

from ..loss import FBKDLoss
from .cwd import CWDLoss
from .feature_loss import FeatureLoss
from .fgd import FGDLoss
from .mgd import MGDLoss
from .pkd import PKDLoss
from .score_weighted import ScoreWeightedLoss

__all__ = ["LOSSES"]

_KINDS: list[type[FeatureLoss]] = [FBKDLoss, PKDLoss, CWDLoss, MGDLoss, FGDLoss, ScoreWeightedLoss]
LOSSES = {kind.__name__: kind for kind in _KINDS}
