"""Means and variances of a pyramid's channels over the batch, by the op of the channel correlation."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import in_place_layout
from .._numerics import accumulation_dtype
from ..ops.registry import kernel
from .columns import columns
from .first_order import first_order, save

__all__ = ["ChannelMoments", "ChannelMomentsFunction", "channel_moments"]


class ChannelMoments(NamedTuple):
    """Mean and variance of each channel of a level over all images and pixels, in float64."""

    student: Tensor  # (2, Cs)
    teacher: Tensor  # (2, Ct)


def channel_moments(
    backend: str, students: list[Tensor], teachers: list[Tensor]
) -> tuple[list[Tensor], list[ChannelMoments]]:
    """Return the students and the moments of every level, on a backend that has kernels.

    What flows back into the moments joins the gradient of the returned students: one read of both and one write.
    """
    outputs = columns(ChannelMomentsFunction.apply(backend, *students, *teachers), len(students))
    return outputs[0], [ChannelMoments(*level) for level in zip(*outputs[1:], strict=True)]


class ChannelMomentsFunction(torch.autograd.Function):
    """``dS = g + (g_mean + 2 g_variance (S - mean)) / n`` with n values a channel, and g of the returned student."""

    @staticmethod
    def forward(ctx, backend, *features):
        students, teachers = columns([in_place_layout(x) for x in features], len(features) // 2)
        of_students, of_teachers = _moments(backend, students, teachers)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*of_teachers)
        save(ctx, [*students, *of_students], features)
        ctx.backend = backend
        return (*(x.view_as(x) for x in features[: len(students)]), *of_students, *of_teachers)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        count = len(grads) // 3
        students, moments = columns(ctx.saved_tensors, count)
        gradients, of_moments = list(grads[:count]), grads[count : 2 * count]
        used = [level for level, grad in enumerate(of_moments) if grad is not None]
        if used:
            levels = [(students[level], moments[level], gradients[level], of_moments[level]) for level in used]
            for level, gradient in zip(used, _joined(ctx.backend, levels), strict=True):
                gradients[level] = gradient
        return None, *gradients, *[None] * count


def _moments(backend: str, students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Return both sides' moments. Maps of one shape are read together, others each with itself."""
    pairs = list(zip(students, teachers, strict=True))
    alone = [t for s, t in pairs if s.shape != t.shape]
    firsts, seconds = [*students, *alone], [*(t if s.shape == t.shape else s for s, t in pairs), *alone]
    # The correlation itself, and with it the eps, is of no use here.
    _, *found = kernel("channel_correlation_forward", backend)(firsts, seconds, 1.0)
    rest = iter(found[len(pairs) :])
    of_teachers = [both if s.shape == t.shape else next(rest) for (s, t), both in zip(pairs, found, strict=False)]
    return (
        [_rows(both, 0, s) for s, both in zip(students, found, strict=False)],
        [_rows(both, 1, t) for t, both in zip(teachers, of_teachers, strict=True)],
    )


def _rows(coefficients: Tensor, side: int, x: Tensor) -> Tensor:
    """Return the moments ``(2, C)`` of one side of a pair: 0 for the student's, 1 for the teacher's."""
    return torch.stack([coefficients[side], coefficients[4 + side] / _values(x)])


def _joined(backend: str, levels: list[tuple[Tensor, Tensor, Tensor | None, Tensor]]) -> list[Tensor]:
    """Return the students' gradients, by the kernel that adds two maps, each with a shift and a factor a channel.

    Args:
        backend: one that has kernels.
        levels: student ``(N, C, H, W)``, its moments ``(2, C)``, the gradients of the returned student and the moments.
    """
    students = [student for student, *_ in levels]
    given = [torch.zeros_like(student) if grad is None else grad for student, _, grad, _ in levels]
    coefficients = []
    for student, moments, _, of_moments in levels:
        of_mean, of_variance = of_moments / _values(student)
        zero = torch.zeros_like(of_mean)
        coefficients.append(torch.stack([moments[0], -of_mean, 2 * of_variance, zero + 1, zero, zero]))
    ones = students[0].new_ones(len(students), dtype=accumulation_dtype(*students, *given))
    maps = students, [in_place_layout(grad) for grad in given]
    return kernel("channel_correlation_backward", backend)(*maps, coefficients, ones)


def _values(x: Tensor) -> int:
    """Return how many values a channel has, at least 1."""
    return max(x.shape[0] * x.shape[2] * x.shape[3], 1)
