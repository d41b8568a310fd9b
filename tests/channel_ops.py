"""The ops that compare each channel of two maps, and how their tests call and judge them."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from op_cases import (
    PYRAMID,
    accumulation_of,
    assert_as_good,
    correlation_terms,
    divergence_terms,
    draw,
    truncation,
    units_of_sum,
)

import fbkd_ops
from fbkd_ops import functional
from fbkd_ops.ops.channel_correlation import channel_correlation_losses
from fbkd_ops.ops.channel_divergence import channel_divergence_losses


class ChannelOp(NamedTuple):
    name: str
    loss: Callable  # of student and teacher
    losses: Callable  # of a backend, students and teachers
    constant: float  # eps or temperature
    backward_arguments: Callable  # of students, teachers, what forward keeps and grad
    kept: Callable  # of a student: zeros of the shape of what forward keeps
    terms: Callable  # how large what cancels is in the loss and in each element of its gradient


def _correlation_terms(student, teacher, accumulation):
    """Sums are in float64 whatever the accumulation dtype."""
    rounding = torch.finfo(torch.float64).eps / torch.finfo(accumulation).eps
    return [rounding * terms for terms in correlation_terms(student, teacher)]


def _divergence_terms(student, teacher, accumulation):
    return divergence_terms(student, teacher, TEMPERATURE)


EPS, TEMPERATURE = 1e-6, 0.5
CORRELATION = ChannelOp(
    "channel_correlation",
    functional.channel_correlation_loss,
    lambda *levels: channel_correlation_losses(*levels, EPS),
    EPS,
    lambda students, teachers, kept, grad: (students, teachers, kept, grad),
    lambda student: torch.zeros(6, student.shape[1], dtype=torch.float64),
    _correlation_terms,
)
DIVERGENCE = ChannelOp(
    "channel_divergence",
    partial(functional.channel_divergence_loss, temperature=TEMPERATURE),
    lambda *levels: channel_divergence_losses(*levels, TEMPERATURE),
    TEMPERATURE,
    lambda students, teachers, kept, grad: (students, teachers, kept, TEMPERATURE, grad),
    lambda student: torch.zeros(student.shape[0], 4, student.shape[1]),
    _divergence_terms,
)
OPS = [CORRELATION, DIVERGENCE]


def draw_pair(shape, dtypes, device="cpu"):
    """A student, and a teacher that agrees with it in part, with a mean far from 0."""
    student = draw(shape, torch.float64, device)
    teacher = 2 * student + draw(shape, torch.float64, device) + 5
    return student.to(dtypes[0]), teacher.to(dtypes[1])


def run(op, student, teacher, backend):
    """The loss on a backend and the gradient of the student."""
    leaf = student.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = op.loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def check(op, student, teacher, backend):
    """As good as eager, up to the rounding of what cancels."""
    accumulation = accumulation_of(student.dtype, teacher.dtype)
    ours, eager = run(op, student, teacher, backend), run(op, student, teacher, "reference")
    exact = run(op, student.double(), teacher.double(), "reference")
    assert ours[0].dtype == accumulation and ours[1].dtype == student.dtype
    units = units_of_sum(student.numel() // student.shape[1])
    # The gradient's elements are rounded once more, to the student's dtype.
    extras = 0.0, 4 * torch.finfo(accumulation).eps + truncation(backend, student.device.type, student.dtype)
    sizes = op.terms(student, teacher, accumulation)
    for mine, theirs, true, size, extra in zip(ours, eager, exact, sizes, extras, strict=True):
        terms = true.abs() + size.reshape(true.shape)
        assert_as_good(mine, theirs, true, extra, accumulation, units, terms)
    return ours


def pyramid(device, of_levels=PYRAMID):
    """Students and teachers of dtypes and layouts of their own."""
    students, teachers = [], []
    for index, (dtype, layout, shape) in enumerate(of_levels):
        other, of_teacher, _ = of_levels[index - 1]
        students.append(layout(draw(shape, dtype, device)))
        teachers.append(of_teacher(draw(shape, other, device)))
    return students, teachers
