"""Squared residuals of the relation term of a pyramid, and all gradients of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import empty_gradient, empty_residual, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from .registry import kernel, register

__all__ = ["RelationLevels", "RelationResidualFunction", "relation_residual"]


class RelationLevels(NamedTuple):
    """Lists of one entry a level. Matrices and offsets are in the level's accumulation dtype."""

    students: list[Tensor]  # S (N, Cs, H, W)
    student_matrices: list[Tensor]  # P (N, Ct, Cs)
    teachers: list[Tensor]  # T (N, Ct, H, W)
    teacher_matrices: list[Tensor]  # U (N, Ct, c), or (N, Ct, Ct) where there is no projection
    teacher_projections: list[Tensor | None]  # W (c, Ct)
    offsets: list[Tensor]  # v (N, Ct)


def relation_residual(backend: str, levels: RelationLevels, memory_efficient: bool = False) -> Tensor:
    """``sum_n sum_i || t + U_n W t - P_n s + v_n ||**2`` of every level, ``(levels,)``.

    Args:
        backend: one that has kernels.
        levels: the arguments; a projection of None stands for the identity.
        memory_efficient: keep nothing for the backward pass, which then repeats the forward pass's products. Else one
            feature map a level is kept: on the CPU the student's gradient up to a factor, on a GPU the residual.
    """
    teachers = [teacher.detach() for teacher in levels.teachers]
    keep = torch.is_grad_enabled() and not memory_efficient
    tensors = [tensor for group in levels._replace(teachers=teachers) for tensor in group]
    return RelationResidualFunction.apply(backend, len(teachers), keep, *tensors)


def _makes_gradient(backend: str, students: list[Tensor], teachers: list[Tensor]) -> bool:
    """Whether the forward pass makes all gradients, up to a factor.

    On the CPU its products then run on blocks that are in cache. A compiled graph cannot hold a gradient that a first
    backward pass uses up; in another dtype than the one it is computed in, it would be rounded twice.
    """
    return (
        backend == "cpu"
        and not torch.compiler.is_compiling()
        and all(s.dtype == accumulation_dtype(s, t) for s, t in zip(students, teachers, strict=True))
    )


class RelationResidualFunction(torch.autograd.Function):
    """The squared residual, and its gradients.

    With ``E = 2 g (t + U r - P s + v)`` and ``r = W t``: ``dS = -P^T E``, ``dP = -sum E s^T``, ``dU = sum E r^T``,
    ``dW = sum U^T E t^T``, ``dv = sum E``.
    """

    @staticmethod
    def forward(ctx, backend, count, keep, *tensors):
        arguments = columns(tensors, count)
        for group in (0, 2):
            arguments[group] = [in_place_layout(x) for x in arguments[group]]
        for group in (1, 3, 4, 5):
            arguments[group] = [x if x is None else x.contiguous() for x in arguments[group]]
        ctx.backend, ctx.count, ctx.ready = backend, count, None
        ctx.student_gradient = any(ctx.needs_input_grad[3 : 3 + count])
        keep, residuals = keep and any(ctx.needs_input_grad), []
        if keep and _makes_gradient(backend, arguments[0], arguments[2]):
            squares, *ctx.ready = kernel("relation_residual_with_gradient", backend)(*arguments, ctx.student_gradient)
        else:
            keep = keep and backend != "cpu"
            squares, *residuals = kernel("relation_residual_forward", backend)(*arguments, keep)
        save(ctx, [*(tensor for group in arguments for tensor in group), *residuals], tensors)
        return squares

    @staticmethod
    @first_order
    def backward(ctx, grad):
        count, saved = ctx.count, ctx.saved_tensors
        ready, ctx.ready = ctx.ready, None  # good for one pass: the student's gradient becomes its own memory
        if ready is None:
            ready = kernel("relation_residual_backward", ctx.backend)(
                *columns(saved[: 6 * count], count), list(saved[6 * count :]), grad.contiguous(), ctx.student_gradient
            )
        else:
            torch._foreach_mul_(ready, list(grad.unbind()) * (len(ready) // count))
        return None, None, None, *_by_argument(ready, count, ctx.student_gradient, ctx.needs_input_grad[3:])


def _by_argument(
    gradients: list[Tensor], count: int, student_gradient: bool, needed: list[bool]
) -> list[Tensor | None]:
    """Gradients in the arguments' order: of the students, P, none for the teachers, of U, W and v."""
    groups: list[Sequence[Tensor | None]]
    groups = [gradients[first : first + count] for first in range(0, len(gradients), count)]
    if not student_gradient:
        groups.insert(0, [None] * count)
    groups.insert(2, [None] * count)
    flat = [gradient for group in groups for gradient in group]
    return [gradient if wanted else None for gradient, wanted in zip(flat, needed, strict=True)]


def _fake_forward(students, student_matrices, teachers, teacher_matrices, teacher_projections, offsets, keep):
    squares = students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))
    return [squares, *(empty_residual(*features) for features in zip(students, teachers, strict=True) if keep)]


def _fake_gradients(students, matrices, student_gradient):
    parameters = [
        offset.new_empty(0) if x is None else torch.empty_like(x)
        for group in matrices
        for x, offset in zip(group, matrices[-1], strict=True)
    ]
    return [*([empty_gradient(x) for x in students] if student_gradient else []), *parameters]


def _fake_backward(
    students,
    student_matrices,
    teachers,
    teacher_matrices,
    teacher_projections,
    offsets,
    residuals,
    grad,
    student_gradient,
):
    return _fake_gradients(
        students, (student_matrices, teacher_matrices, teacher_projections, offsets), student_gradient
    )


def _fake_with_gradient(
    students, student_matrices, teachers, teacher_matrices, teacher_projections, offsets, student_gradient
):
    arguments = (students, student_matrices, teachers, teacher_matrices, teacher_projections, offsets)
    squares = _fake_forward(*arguments, False)
    return [*squares, *_fake_backward(*arguments, [], None, student_gradient)]


_ARGUMENTS = (
    "Tensor[] student, Tensor[] student_matrix, Tensor[] teacher, Tensor[] teacher_matrix, "
    "Tensor?[] teacher_projection, Tensor[] offset"
)
register(
    "relation_residual_forward",
    f"({_ARGUMENTS}, bool keep) -> Tensor[]",
    _fake_forward,
    compiled=("cpu",),
    triton="relation_residual",
)
register(
    "relation_residual_backward",
    f"({_ARGUMENTS}, Tensor[] residual, Tensor grad, bool student_gradient) -> Tensor[]",
    _fake_backward,
    compiled=("cpu",),
    triton="relation_residual",
)
# It also returns the gradients for grad = 1.
register(
    "relation_residual_with_gradient",
    f"({_ARGUMENTS}, bool student_gradient) -> Tensor[]",
    _fake_with_gradient,
    compiled=("cpu",),
)
