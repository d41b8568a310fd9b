"""Squared distances of linearly adapted channel means of a pyramid to the teacher's, in plain PyTorch.

The products of a level are matrix products as small as a batch; what surrounds them is shared by levels of one width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .._numerics import accumulation_dtype, without_autocast
from .columns import columns
from .first_order import first_order, save

__all__ = ["ChannelL2Function", "ChannelLevels", "channel_l2_squares"]


class ChannelLevels(NamedTuple):
    """Lists of one entry per level."""

    students: list[Tensor]  # (N, Cs)
    weights: list[Tensor]  # (Ct, Cs)
    biases: list[Tensor]  # (Ct,)
    teachers: list[Tensor]  # (N, Ct)


def channel_l2_squares(levels: ChannelLevels) -> Tensor:
    """Return ``sum((W s + b - t)**2)`` of every level, ``(levels,)``."""
    levels = levels._replace(teachers=[teacher.detach() for teacher in levels.teachers])
    dtypes = [accumulation_dtype(s, t) for s, t in zip(levels.students, levels.teachers, strict=True)]
    tensors = [x.to(dtype) for group in levels for x, dtype in zip(group, dtypes, strict=True)]
    return ChannelL2Function.apply(len(dtypes), *tensors)


class ChannelL2Function(torch.autograd.Function):
    """With ``e = W s + b - t``: ``dW = 2 g e^T s``, ``db = 2 g sum e``, ``ds = 2 g e W``."""

    @staticmethod
    def forward(ctx, count, *tensors):
        students, weights, biases, teachers = columns(tensors, count)
        groups = _alike(teachers)
        errors, squares = [], [None] * count
        for group in groups:
            adapted = [torch.addmm(biases[index], students[index], weights[index].mT) for index in group]
            errors.append(_stacked(adapted) - _stacked([teachers[index] for index in group]))  # (levels, N, Ct)
            for index, square in zip(group, errors[-1].square().sum((1, 2)).unbind(), strict=True):
                squares[index] = square
        save(ctx, [*students, *weights, *errors], tensors)
        ctx.count, ctx.groups = count, groups
        dtype = accumulation_dtype(*teachers)
        return torch.stack([square.to(dtype) for square in squares])

    @staticmethod
    @first_order
    def backward(ctx, grad):
        count, saved = ctx.count, ctx.saved_tensors
        (students, weights), errors = columns(saved[: 2 * count], count), saved[2 * count :]
        scales = (2 * grad).unbind()
        student_gradients, weight_gradients, bias_gradients = ([None] * count for _ in range(3))
        for group, error in zip(ctx.groups, errors, strict=True):
            scale = _stacked([scales[index] for index in group]).to(error.dtype)
            error = error * scale[:, None, None]
            with without_autocast(error):
                for index, e, total in zip(group, error.unbind(), error.sum(1).unbind(), strict=True):
                    student_gradients[index] = torch.mm(e, weights[index])
                    weight_gradients[index] = torch.mm(e.mT, students[index])
                    bias_gradients[index] = total
        return None, *student_gradients, *weight_gradients, *bias_gradients, *[None] * count


def _alike(tensors: tuple[Tensor, ...]) -> list[list[int]]:
    """Group the indices of tensors of one shape and dtype. Sizes are compared: symbols have no hash."""
    groups: list[list[int]] = []
    for index, tensor in enumerate(tensors):
        for group in groups:
            if tensors[group[0]].dtype == tensor.dtype and tensors[group[0]].shape == tensor.shape:
                group.append(index)
                break
        else:
            groups.append([index])
    return groups


def _stacked(tensors: list[Tensor]) -> Tensor:
    """``torch.stack`` that copies nothing for a single tensor."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(tensors)
