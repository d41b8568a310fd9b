"""Adapted masked squared distances of a pyramid, and everything that flows back to a student's level in one write."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import empty_gradient, empty_residual, in_place_layout, matrix_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from ..types import AttentionPool, present
from .attention_pool import pools_of
from .masked_l2 import Masks, level_masks
from .registry import kernel, register

__all__ = ["AdaptedLevels", "AdaptedMaskedL2Function", "adapted_masked_l2_squares", "student_pyramid"]


class AdaptedLevels(NamedTuple):
    """Lists of one entry a level."""

    students: list[Tensor]  # (N, Cs, H, W)
    weights: list[Tensor]  # (Ct, Cs)
    biases: list[Tensor]  # (Ct,)
    teachers: list[Tensor]  # (N, Ct, H, W)
    spatial_masks: Masks  # (N, H, W)
    channel_masks: Masks  # (N, Ct)


def adapted_masked_l2_squares(backend: str, levels: AdaptedLevels) -> Tensor:
    """``sum(Ms * Mc * (A S + a - T)**2)`` of every level, ``(levels,)``, on a backend that has kernels."""
    return _apply(backend, levels, [], False)[0]


def student_pyramid(
    backend: str, levels: AdaptedLevels, pools: list[AttentionPool], memory_efficient: bool = False
) -> tuple[Tensor, list[AttentionPool], list[Tensor]]:
    """Return the squares of :func:`adapted_masked_l2_squares`, the means and the students, as outputs of one op.

    What flows back into the means and into the returned students joins the distance's own gradient as that is
    written, instead of being a feature map each that has to be added.

    Args:
        backend: one that has kernels.
        levels: the distance's arguments.
        pools: the students' four means, without gradient.
        memory_efficient: keep nothing for the backward pass, which then repeats the forward pass's product. Else one
            feature map a level is kept: on the CPU the student's gradient up to a factor, on a GPU the difference.

    Returns:
        The squares ``(levels,)``, the means and the students, all with gradient.
    """
    count = len(levels.students)
    squares, *outputs = _apply(backend, levels, [mean for pool in pools for mean in pool], memory_efficient)
    return squares, pools_of(outputs[: 4 * count]), outputs[4 * count :]


def _apply(backend: str, levels: AdaptedLevels, means: list[Tensor], memory_efficient: bool) -> tuple[Tensor, ...]:
    teachers = [teacher.detach() for teacher in levels.teachers]
    masks = level_masks(levels.students, teachers, levels.spatial_masks, levels.channel_masks)
    prepared = levels._replace(teachers=teachers, spatial_masks=masks[0], channel_masks=masks[1])
    tensors = [tensor for group in prepared for tensor in group]
    keep = torch.is_grad_enabled() and not memory_efficient
    return AdaptedMaskedL2Function.apply(backend, len(levels.students), keep, *tensors, *means)


def _makes_gradient(backend: str, arguments: list[list[Tensor | None]], needed: Sequence[bool]) -> bool:
    """Whether the forward pass makes the gradient, up to a factor, instead of repeating a matrix product later.

    On the CPU the product costs more than the memory traffic. A compiled graph cannot hold a gradient that a first
    backward pass uses up; in another dtype than the one it is computed in, the gradient would be rounded twice, and
    could overflow before it is scaled.
    """
    return (
        backend == "cpu"
        and not torch.compiler.is_compiling()
        and all(
            wanted and {s.dtype, weight.dtype, bias.dtype} == {accumulation_dtype(s, t)}
            for s, weight, bias, t, wanted in zip(*arguments[:4], needed, strict=True)
        )
    )


class AdaptedMaskedL2Function(torch.autograd.Function):
    """With ``E = 2 g Ms Mc (A S + a - T)``: ``dS = A^T E``, ``dA = sum E S^T``, ``da = sum E``.

    Gradients of the means and of the returned students are added to dS as it is written.
    """

    @staticmethod
    def forward(ctx, backend, count, keep, *tensors):
        arguments, means = columns(tensors[: 6 * count], count), tensors[6 * count :]
        for maps in (0, 3):
            arguments[maps] = [in_place_layout(x) for x in arguments[maps]]
        for parameters in (1, 2):
            arguments[parameters] = [x.contiguous() for x in arguments[parameters]]
        ctx.set_materialize_grads(False)
        ctx.backend, ctx.count, ctx.means, ctx.ready = backend, count, len(means), None
        needed, residuals = ctx.needs_input_grad[3:], []
        if keep and _makes_gradient(backend, arguments, needed[:count]):
            squares, *ctx.ready = kernel("adapted_masked_l2_with_gradient", backend)(*arguments)
        else:
            keep = keep and backend != "cpu" and any(needed)
            squares, *residuals = kernel("adapted_masked_l2_forward", backend)(*arguments, keep)
        save(ctx, [*(tensor for group in arguments for tensor in group), *residuals], tensors)
        if not means:
            return (squares,)
        return (squares, *(mean.view_as(mean) for mean in means), *(x.view_as(x) for x in tensors[:count]))

    @staticmethod
    @first_order
    def backward(ctx, grad, *grads):
        saved, count = ctx.saved_tensors, ctx.count
        arguments, residuals = columns(saved[: 6 * count], count), list(saved[6 * count :])
        students, teachers = arguments[0], arguments[3]
        pool_grads = list(grads[: ctx.means]) or [None] * (4 * count)
        student_grads = list(grads[ctx.means :]) or [None] * count
        student_grads = [g if g is None else _packed(g, s) for g, s in zip(student_grads, students, strict=True)]
        if grad is None:
            gradients = _without_distance(ctx.backend, students, pool_grads, student_grads) + [None] * (2 * count)
        else:
            dtypes = [accumulation_dtype(s, t) for s, t in zip(students, teachers, strict=True)]
            pool_grads = [g if g is None else g.to(dtypes[i // 4]).contiguous() for i, g in enumerate(pool_grads)]
            # The gradient that the forward pass made becomes the student's own memory: it is good for one pass.
            ready, ctx.ready = ctx.ready, None
            added = grad.contiguous(), pool_grads, student_grads
            gradients = _gradients(ctx.backend, arguments, residuals, added, ready)
        return None, None, None, *gradients, *[None] * (3 * count + ctx.means)


def _gradients(
    backend: str,
    arguments: list[list[Tensor | None]],
    residuals: list[Tensor],
    added: tuple[Tensor, list[Tensor | None], list[Tensor | None]],
    ready: list[Tensor] | None,
) -> list[Tensor]:
    """Gradients of all students, weights and biases: what the forward pass made, finished in place, or anew."""
    if ready is None:
        return kernel("adapted_masked_l2_backward", backend)(*arguments, residuals, *added)
    count, grad = len(arguments[0]), added[0]
    kernel("adapted_masked_l2_finish_", backend)(ready[:count], arguments[0], *added)
    torch._foreach_mul_(ready[count:], [*grad.unbind()] * 2)
    return ready


def _without_distance(
    backend: str, students: list[Tensor], pool_grads: list[Tensor | None], student_grads: list[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the students where nothing flows back into the distance itself."""
    gradients = list(student_grads)
    for level, (student, given) in enumerate(zip(students, columns(tuple(pool_grads), 4), strict=True)):
        if any(grad is not None for grad in given):
            given = [grad if grad is None else grad.contiguous() for grad in given]
            (pooled,) = kernel("attention_pool_backward", backend)([student], given)
            gradients[level] = pooled if gradients[level] is None else gradients[level] + pooled
    return gradients


def _packed(grad: Tensor, student: Tensor) -> Tensor:
    """Return a gradient from elsewhere in the dtype and the layout that the student's own gets."""
    return grad.to(student.dtype).contiguous(memory_format=present(matrix_layout(student)))


def _fake_forward(students, weights, biases, teachers, spatial_masks, channel_masks, keep):
    squares = students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))
    return [squares, *(empty_residual(*features) for features in zip(students, teachers, strict=True) if keep)]


def _fake_backward(students, weights, biases, *_):
    return [empty_gradient(x) for x in students] + [torch.empty_like(x) for x in (*weights, *biases)]


def _fake_with_gradient(students, weights, biases, teachers, spatial_masks, channel_masks):
    arguments = students, weights, biases, teachers, spatial_masks, channel_masks
    return [*_fake_forward(*arguments, False), *_fake_backward(*arguments)]


_ARGUMENTS = (
    "Tensor[] student, Tensor[] weight, Tensor[] bias, Tensor[] teacher, Tensor?[] spatial_mask, Tensor?[] channel_mask"
)
_ADDED = "Tensor grad, Tensor?[] pool_grads, Tensor?[] grad_student"
register(
    "adapted_masked_l2_forward",
    f"({_ARGUMENTS}, bool keep) -> Tensor[]",
    _fake_forward,
    compiled=("cpu",),
    triton="adapted_masked_l2",
)
register(
    "adapted_masked_l2_backward",
    f"({_ARGUMENTS}, Tensor[] residual, {_ADDED}) -> Tensor[]",
    _fake_backward,
    compiled=("cpu",),
    triton="adapted_masked_l2",
)
# `..._with_gradient` also returns the gradients for grad = 1; `..._finish_` turns these into the real ones.
register("adapted_masked_l2_with_gradient", f"({_ARGUMENTS}) -> Tensor[]", _fake_with_gradient, compiled=("cpu",))
register(
    "adapted_masked_l2_finish_",
    f"(Tensor(a!)[] gradient, Tensor[] student, {_ADDED}) -> ()",
    lambda *_: None,
    compiled=("cpu",),
)
