"""Precision rules that every layer of the package shares."""

import torch
from torch import Tensor

__all__ = ["accumulation_dtype", "residual_dtype", "root", "without_autocast"]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor is float64, float32 for everything narrower."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def residual_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of a kept residual of two features: the features' own where both have the same."""
    return student.dtype if student.dtype == teacher.dtype else accumulation_dtype(student, teacher)


def root(squares: Tensor) -> Tensor:
    """``sqrt`` of a sum of squares whose gradient at exactly 0 is 0 instead of infinite.

    Only an exact 0 is special: NaN stays NaN, so that a broken loss shows.
    """
    is_zero = squares == 0
    return torch.where(is_zero, squares, squares.masked_fill(is_zero, 1).sqrt())


def without_autocast(tensor: Tensor) -> torch.autocast:
    """Autocast off on the tensor's device, as a context.

    The package reads the tensors' own dtypes and accumulates in float32 or better; autocast would round the small
    matrices inside the relation term to half precision.
    """
    return torch.autocast(tensor.device.type, enabled=False)
