"""Squared distances of 3x3-convolved spatial maps of a pyramid to the teacher's, on any backend."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, is_differentiated, save
from .registry import kernel, register

__all__ = ["SpatialL2Function", "SpatialLevels", "spatial_l2_squares"]


# The sum of squares, its derivatives by the nine weights, and by the bias.
SUMS = 11


class SpatialLevels(NamedTuple):
    """Lists of one entry per level."""

    students: list[Tensor]  # (N, H, W)
    weights: list[Tensor]  # (3, 3)
    biases: list[Tensor]  # (1,)
    teachers: list[Tensor]  # (N, H, W)


def spatial_l2_squares(backend: str, levels: SpatialLevels) -> Tensor:
    """Return ``sum((t - conv3x3(s) - b)**2)`` of every level, ``(levels,)``, on a backend that has kernels."""
    levels = levels._replace(teachers=[teacher.detach() for teacher in levels.teachers])
    dtypes = [accumulation_dtype(s, t) for s, t in zip(levels.students, levels.teachers, strict=True)]
    tensors = [x.to(dtype).contiguous() for group in levels for x, dtype in zip(group, dtypes, strict=True)]
    if is_differentiated(tensors):
        return SpatialL2Function.apply(backend, len(dtypes), *tensors)
    (sums,) = kernel("spatial_l2", backend)(*columns(tensors, len(dtypes)), False)
    return sums[:, 0]


class SpatialL2Function(torch.autograd.Function):
    """The forward pass makes the gradients for a grad of 1, beside the residual that both need.

    They are as small as the maps themselves, a channel's worth of a feature: backward multiplies them by the real grad.
    """

    @staticmethod
    def forward(ctx, backend, count, *tensors):
        sums, *student_gradients = kernel("spatial_l2", backend)(*columns(tensors, count), True)
        save(ctx, [sums, *student_gradients], tensors)
        ctx.shapes = [x.shape for x in tensors[count : 3 * count]]
        return sums[:, 0].clone()

    @staticmethod
    @first_order
    def backward(ctx, grad):
        sums, *student_gradients = ctx.saved_tensors
        count = len(student_gradients)
        dtypes = [gradient.dtype for gradient in student_gradients]
        students = [gradient * scale for gradient, scale in zip(student_gradients, grad.unbind(), strict=True)]
        parameters = sums[:, 1:] * grad[:, None]  # (levels, SUMS - 1)
        rows = [row.to(dtype) for row, dtype in zip(parameters.unbind(), dtypes, strict=True)]
        gradients = [row[:9] for row in rows] + [row[9:] for row in rows]
        gradients = [gradient.view(shape) for gradient, shape in zip(gradients, ctx.shapes, strict=True)]
        return None, None, *students, *gradients, *[None] * count


def _fake(students, weights, biases, teachers, gradient):
    sums = students[0].new_empty((len(students), SUMS if gradient else 1), dtype=accumulation_dtype(*students))
    return [sums, *(torch.empty_like(s) for s in students)] if gradient else [sums]


# Sums (levels, 1): squares. With gradient (levels, 11): also their derivatives by the nine weights and the bias for a
# grad of 1, and after the sums the derivative by each level's student.
register(
    "spatial_l2",
    "(Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, bool gradient) -> Tensor[]",
    _fake,
    compiled=("cpu",),
    triton="spatial_l2",
)
