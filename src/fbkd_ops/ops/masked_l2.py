"""Masked squared distances of a pyramid and their gradient, on any backend."""

import torch
from torch import Tensor

from .._layout import empty_gradient, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from .registry import kernel, register

__all__ = ["MaskedL2Function", "level_masks", "masked_l2_squares"]

Masks = list[Tensor | None]


def masked_l2_squares(
    backend: str, students: list[Tensor], teachers: list[Tensor], spatial_masks: Masks, channel_masks: Masks
) -> Tensor:
    """``sum(Ms * Mc * (S - T)**2)`` of every level, ``(levels,)``, on a backend that has kernels."""
    teachers = [teacher.detach() for teacher in teachers]
    spatial_masks, channel_masks = level_masks(students, teachers, spatial_masks, channel_masks)
    return MaskedL2Function.apply(backend, *students, *teachers, *spatial_masks, *channel_masks)


def level_masks(
    students: list[Tensor], teachers: list[Tensor], spatial_masks: Masks, channel_masks: Masks
) -> tuple[Masks, Masks]:
    """Return the masks as the ops take them: contiguous, in the level's accumulation dtype, without gradient."""
    dtypes = [accumulation_dtype(s, t) for s, t in zip(students, teachers, strict=True)]

    def prepared(masks):
        return [
            None if m is None else m.detach().to(dtype).contiguous() for m, dtype in zip(masks, dtypes, strict=True)
        ]

    return prepared(spatial_masks), prepared(channel_masks)


class MaskedL2Function(torch.autograd.Function):
    """``dS = 2 g Ms Mc (S - T)``."""

    @staticmethod
    def forward(ctx, backend, *tensors):
        count = len(tensors) // 4
        maps, masks = [in_place_layout(x) for x in tensors[: 2 * count]], tensors[2 * count :]
        save(ctx, [*maps, *masks], tensors)
        ctx.backend = backend
        return kernel("masked_l2_forward", backend)(*columns([*maps, *masks], count))

    @staticmethod
    @first_order
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        count = len(saved) // 4
        gradients = kernel("masked_l2_backward", ctx.backend)(*columns(saved, count), grad.contiguous())
        return None, *gradients, *[None] * (3 * count)


def _fake_forward(students, teachers, spatial_masks, channel_masks):
    return students[0].new_empty((len(students),), dtype=accumulation_dtype(*students, *teachers))


def _fake_backward(students, teachers, spatial_masks, channel_masks, grad):
    return [empty_gradient(student) for student in students]


_ARGUMENTS = "Tensor[] student, Tensor[] teacher, Tensor?[] spatial_mask, Tensor?[] channel_mask"
register("masked_l2_forward", f"({_ARGUMENTS}) -> Tensor", _fake_forward, compiled=("cpu", "cuda"), triton="masked_l2")
register(
    "masked_l2_backward",
    f"({_ARGUMENTS}, Tensor grad) -> Tensor[]",
    _fake_backward,
    compiled=("cpu", "cuda"),
    triton="masked_l2",
)
