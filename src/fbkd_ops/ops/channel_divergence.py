"""The divergence of a pyramid's channels as distributions over pixels, and its gradient, on any backend."""

import torch
from torch import Tensor

from .._layout import empty_gradient, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from .registry import kernel, register

__all__ = ["NORMALISERS", "ChannelDivergenceFunction", "channel_divergence_losses"]

# What forward keeps of an image's channel for backward: the maximum of each map and one over the softmax's denominator.
NORMALISERS = 4


def channel_divergence_losses(
    backend: str, students: list[Tensor], teachers: list[Tensor], temperature: float
) -> Tensor:
    """``tau**2`` times the mean divergence of the channels, of every level, ``(levels,)``."""
    teachers = [teacher.detach() for teacher in teachers]
    return ChannelDivergenceFunction.apply(backend, temperature, *students, *teachers)


class ChannelDivergenceFunction(torch.autograd.Function):
    """``dS = g * tau / (N C) * (softmax(S / tau) - softmax(T / tau))``."""

    @staticmethod
    def forward(ctx, backend, temperature, *features):
        maps = [in_place_layout(x) for x in features]
        students, teachers = columns(maps, len(maps) // 2)
        losses, *normalisers = kernel("channel_divergence_forward", backend)(students, teachers, temperature)
        save(ctx, [*maps, *normalisers], features)
        ctx.backend, ctx.temperature = backend, temperature
        return losses

    @staticmethod
    @first_order
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        count = len(saved) // 3
        backward = kernel("channel_divergence_backward", ctx.backend)
        gradients = backward(*columns(saved, count), ctx.temperature, grad.contiguous())
        return None, None, *gradients, *[None] * count


def _fake_forward(students, teachers, temperature):
    losses = students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))
    normalisers = [
        student.new_empty((student.shape[0], NORMALISERS, student.shape[1]), dtype=accumulation_dtype(student, teacher))
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return [losses, *normalisers]


def _fake_backward(students, teachers, normalisers, temperature, grad):
    return [empty_gradient(student) for student in students]


register(
    "channel_divergence_forward",
    "(Tensor[] student, Tensor[] teacher, float temperature) -> Tensor[]",
    _fake_forward,
    compiled=("cpu",),
    triton="channel_divergence",
)
register(
    "channel_divergence_backward",
    "(Tensor[] student, Tensor[] teacher, Tensor[] normalisers, float temperature, Tensor grad) -> Tensor[]",
    _fake_backward,
    compiled=("cpu",),
    triton="channel_divergence",
)
