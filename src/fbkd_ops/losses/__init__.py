"""Losses between the feature maps of a student and a teacher, beside FBKD's in ``fbkd_ops/loss.py``."""

from .pkd import PKDLoss

__all__ = ["PKDLoss"]
