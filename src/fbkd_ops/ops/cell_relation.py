"""Squared relation terms of levels with few pooled cells, and all their gradients."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import empty_gradient, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from .registry import kernel, register

__all__ = ["CellBlock", "CellLevel", "CellRelationFunction", "Moments", "cell_relation", "level_parameters"]


class CellBlock(NamedTuple):
    """One side's non-local block. All tensors are in the level's accumulation dtype."""

    g_weight: Tensor  # (c, C)
    g_bias: Tensor  # (c,)
    out_weight: Tensor  # (C, c)
    out_bias: Tensor | None  # (C,)
    theta_weight: Tensor  # (c, C)
    theta_bias: Tensor  # (c,)
    phi_weight: Tensor  # (c, C)
    phi_bias: Tensor  # (c,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None  # (C,)
    norm_mean: Tensor | None  # (C,), None: the batch's own
    norm_variance: Tensor | None  # (C,)


class CellLevel(NamedTuple):
    """One level."""

    student: Tensor  # (N, Cs, H, W), N > 0
    teacher: Tensor  # (N, Ct, H, W), without gradient
    adaptation_weight: Tensor  # B (Ct, Cs)
    adaptation_bias: Tensor  # (Ct,)
    student_block: CellBlock
    teacher_block: CellBlock
    pool: tuple[int, int, int, int]  # cell height and width, and those of the first pool in a nested order
    eps: tuple[float | None, float | None]  # of the student's and the teacher's norm; None without a norm


class Moments(NamedTuple):
    """Of what a norm of batch statistics normalizes; empty for any other."""

    mean: Tensor  # (C,)
    variance: Tensor  # (C,), biased


def level_parameters(level: CellLevel) -> list[Tensor | None]:
    """In the op's order. No method: torch.compile of torch 2.10 calls none of a named tuple."""
    return [level.adaptation_weight, level.adaptation_bias, *level.student_block, *level.teacher_block]


_LEVEL_TENSORS = 2 + 2 * len(CellBlock._fields)
_BATCH_MEAN = CellBlock._fields.index("norm_mean")


def cell_relation(levels: list[CellLevel], memory_efficient: bool = False) -> tuple[Tensor, list[Moments]]:
    """``|| NL_t(T) - B(NL_s(S)) ||**2`` of every level ``(levels,)``, and the moments of every level's two norms.

    Args:
        levels: the arguments.
        memory_efficient: keep nothing for the backward pass, which then computes everything again. Else the student's
            gradient is kept up to a factor.
    """
    pools = [side for level in levels for side in level.pool]
    eps = [-1.0 if value is None else value for level in levels for value in level.eps]
    keep = torch.is_grad_enabled() and not (memory_efficient or torch.compiler.is_compiling())
    tensors = [parameter for level in levels for parameter in level_parameters(level)]
    students, teachers = [level.student for level in levels], [level.teacher.detach() for level in levels]
    squares, *moments = CellRelationFunction.apply(pools, eps, keep, len(levels), *students, *teachers, *tensors)
    return squares, [Moments(*moments[first : first + 2]) for first in range(0, len(moments), 2)]


class CellRelationFunction(torch.autograd.Function):
    """All gradients of a level are multiples of its sum's, so that the forward pass can make them up to that factor."""

    @staticmethod
    def forward(ctx, pools, eps, keep, count, *tensors):
        students, teachers = columns([in_place_layout(x) for x in tensors[: 2 * count]], count)
        parameters = [x if x is None else x.contiguous() for x in tensors[2 * count :]]
        ctx.student_gradient = any(ctx.needs_input_grad[4 : 4 + count])
        ctx.pools, ctx.eps, ctx.count, ctx.ready = pools, eps, count, None
        outputs = 1 + 4 * count
        if keep and any(ctx.needs_input_grad):
            made = kernel("cell_relation_with_gradient", "cpu")(
                students, teachers, parameters, pools, eps, ctx.student_gradient
            )
            results, ctx.ready = made[:outputs], made[outputs:]
        else:
            results = kernel("cell_relation_forward", "cpu")(students, teachers, parameters, pools, eps)
        save(ctx, [*students, *teachers, *parameters], tensors)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @first_order
    def backward(ctx, grad, *_):
        count, saved = ctx.count, ctx.saved_tensors
        if grad is None:
            return None, None, None, None, *[None] * len(saved)
        (students, teachers), parameters = columns(saved[: 2 * count], count), list(saved[2 * count :])
        ready, ctx.ready = ctx.ready, None  # good for one pass: its memory becomes the gradients'
        if ready is None:
            gradients = kernel("cell_relation_backward", "cpu")(
                students, teachers, parameters, ctx.pools, ctx.eps, grad.contiguous(), ctx.student_gradient
            )
        else:
            gradients = _scaled(ready, students if ctx.student_gradient else [], grad)
        by_student = gradients[:count] if ctx.student_gradient else [None] * count
        by_parameter = gradients[len(gradients) - len(parameters) :]
        flat = [*by_student, *[None] * count, *by_parameter]
        return (
            None,
            None,
            None,
            None,
            *[g if wanted else None for g, wanted in zip(flat, ctx.needs_input_grad[4:], strict=True)],
        )


def _scaled(ready: list[Tensor], students: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Multiply the gradients for grad = 1 with their level's ``grad``; round a student's to its dtype once."""
    levels = [*range(len(students)), *(index // _LEVEL_TENSORS for index in range(len(ready) - len(students)))]
    factors = grad.unbind()
    torch._foreach_mul_(
        ready, [factors[level].to(gradient.dtype) for level, gradient in zip(levels, ready, strict=True)]
    )
    count = len(students)
    return [x.to(student.dtype) for x, student in zip(ready[:count], students, strict=True)] + ready[count:]


def _fake_forward(students, teachers, parameters, pools, eps):
    squares = students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))
    moments = []
    for level, pair in enumerate(zip(students, teachers, strict=True)):
        for side, x in enumerate(pair):
            batch_mean = parameters[level * _LEVEL_TENSORS + 2 + side * len(CellBlock._fields) + _BATCH_MEAN]
            uses_batch = eps[2 * level + side] >= 0 and batch_mean is None
            shape = (x.shape[1] if uses_batch else 0,)
            moments += [x.new_empty(shape, dtype=accumulation_dtype(*pair)) for _ in range(2)]
    return [squares, *moments]


def _fake_parameter_gradients(students, teachers, parameters):
    gradients = []
    for index, parameter in enumerate(parameters):
        level, place = divmod(index, _LEVEL_TENSORS)
        learns = parameter is not None and (place < 2 or (place - 2) % len(CellBlock._fields) < _BATCH_MEAN)
        dtype = accumulation_dtype(students[level], teachers[level])
        gradients.append(students[level].new_empty(parameter.shape if learns else (0,), dtype=dtype))
    return gradients


def _fake_backward(students, teachers, parameters, pools, eps, grad, student_gradient):
    by_student = [empty_gradient(x) for x in students] if student_gradient else []
    return [*by_student, *_fake_parameter_gradients(students, teachers, parameters)]


def _fake_with_gradient(students, teachers, parameters, pools, eps, student_gradient):
    by_student = []
    if student_gradient:
        by_student = [
            torch.empty_like(empty_gradient(x), dtype=accumulation_dtype(x, t))
            for x, t in zip(students, teachers, strict=True)
        ]
    forward = _fake_forward(students, teachers, parameters, pools, eps)
    return [*forward, *by_student, *_fake_parameter_gradients(students, teachers, parameters)]


_ARGUMENTS = "Tensor[] student, Tensor[] teacher, Tensor?[] parameters, int[] pools, float[] eps"
register("cell_relation_forward", f"({_ARGUMENTS}) -> Tensor[]", _fake_forward, compiled=("cpu",))
register(
    "cell_relation_backward",
    f"({_ARGUMENTS}, Tensor grad, bool student_gradient) -> Tensor[]",
    _fake_backward,
    compiled=("cpu",),
)
# It also returns the gradients for grad = 1.
register(
    "cell_relation_with_gradient",
    f"({_ARGUMENTS}, bool student_gradient) -> Tensor[]",
    _fake_with_gradient,
    compiled=("cpu",),
)
