"""Classes of other frameworks that distil with this package.

Each module imports its framework, so it is imported by its own name: ``ultralytics`` (``FBKDTrainer``), ``mmdet``
(``FBKDDetector``) and ``mmrazor_loss`` (``FBKDOpsLoss``, for MMRazor's configs). Weights of other implementations are
read by :mod:`fbkd_ops.weights`.
"""
