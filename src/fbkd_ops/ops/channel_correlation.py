"""The correlation loss of a pyramid's channels and its gradient, on any backend."""

import torch
from torch import Tensor

from .._layout import empty_gradient, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from .registry import kernel, register

__all__ = ["COEFFICIENTS", "ChannelCorrelationFunction", "channel_correlation_losses"]

# What forward returns of a channel: the means of both maps, the factors of the centred maps in the gradient, and the
# sums of the squares of both centred maps, which the gradient does not need.
COEFFICIENTS = 6


def channel_correlation_losses(backend: str, students: list[Tensor], teachers: list[Tensor], eps: float) -> Tensor:
    """Half the mean square of the difference of the standardised maps, of every level, ``(levels,)``."""
    teachers = [teacher.detach() for teacher in teachers]
    return ChannelCorrelationFunction.apply(backend, eps, *students, *teachers)


class ChannelCorrelationFunction(torch.autograd.Function):
    """``dS = g * (a * s + b * t)`` of the centred maps s and t, with a and b of each channel."""

    @staticmethod
    def forward(ctx, backend, eps, *features):
        maps = [in_place_layout(x) for x in features]
        students, teachers = columns(maps, len(maps) // 2)
        losses, *coefficients = kernel("channel_correlation_forward", backend)(students, teachers, eps)
        save(ctx, [*maps, *coefficients], features)
        ctx.backend = backend
        return losses

    @staticmethod
    @first_order
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        count = len(saved) // 3
        gradients = kernel("channel_correlation_backward", ctx.backend)(*columns(saved, count), grad.contiguous())
        return None, None, *gradients, *[None] * count


def _fake_forward(students, teachers, eps):
    losses = students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))
    return [losses, *(student.new_empty((COEFFICIENTS, student.shape[1]), dtype=torch.float64) for student in students)]


def _fake_backward(students, teachers, coefficients, grad):
    return [empty_gradient(student) for student in students]


register(
    "channel_correlation_forward",
    "(Tensor[] student, Tensor[] teacher, float eps) -> Tensor[]",
    _fake_forward,
    compiled=("cpu",),
    triton="channel_correlation",
)
register(
    "channel_correlation_backward",
    "(Tensor[] student, Tensor[] teacher, Tensor[] coefficients, Tensor grad) -> Tensor[]",
    _fake_backward,
    compiled=("cpu",),
    triton="channel_correlation",
)
