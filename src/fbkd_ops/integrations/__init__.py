"""Bridges to other frameworks.

``mmrazor`` and ``non_local`` read weights and need no framework. Three modules are classes of a framework's and import
it, so they are imported by their own names: ``ultralytics`` (``FBKDTrainer``), ``mmdet`` (``FBKDDetector``) and
``mmrazor_loss`` (``FBKDOpsLoss``, for MMRazor's configs).
"""

from . import mmrazor, non_local

__all__ = ["mmrazor", "non_local"]
