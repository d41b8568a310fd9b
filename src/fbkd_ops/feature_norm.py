"""Features standardised per channel over the batch, with no standardised map.

With mean m, deviation d and a layer (A, a), ``A (S - m_s) / d_s + a - (T - m_t) / d_t`` is ``(A' S + a' - T) / d_t``
with ``A' = diag(d_t) A diag(1 / d_s)`` and ``a' = d_t a + m_t - A' m_s``: the difference of the raw maps under another
layer, and a channel mask divided by ``d_t**2``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import dispatch
from ._numerics import accumulation_dtype
from .autograd.channel_moments import ChannelMoments
from .ops.adapted_masked_l2 import AdaptedLevels
from .types import present

__all__ = ["standardised", "standardised_students"]

EPS = 1e-5  # BatchNorm's


def standardised(levels: AdaptedLevels, chosen: list[bool]) -> AdaptedLevels:
    """Return the arguments with which the distance of the chosen levels is that of their standardised maps."""
    indices = [index for index, is_chosen in enumerate(chosen) if is_chosen]
    if not indices:
        return levels
    students, moments = dispatch.channel_moments(
        [levels.students[index] for index in indices], [levels.teachers[index] for index in indices]
    )
    adapted, weights, biases, masks = levels.students[:], levels.weights[:], levels.biases[:], levels.channel_masks[:]
    for index, student, of_level in zip(indices, students, moments, strict=True):
        adapted[index] = student  # the op's own, into which the gradient of the moments flows
        weight, bias = _folded(of_level, weights[index], biases[index])
        dtype = accumulation_dtype(student, levels.teachers[index])
        weights[index], biases[index] = weight.to(dtype), bias.to(dtype)
        masks[index] = _weights(of_level, masks[index], levels.teachers[index])
    return levels._replace(students=adapted, weights=weights, biases=biases, channel_masks=masks)


def standardised_students(
    students: list[Tensor], layers: list[nn.Module], teachers: list[Tensor], channel_masks: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each ``d_t layer((S - m_s) / d_s) + m_t`` ``(N, Ct, H, W)``, by PyTorch, and the channel masks.

    The masked distance of these maps to the raw teachers is that of the standardised maps.

    Args:
        students: ``(N, Cs, H, W)``.
        layers: 1x1 convolutions; another module is the identity.
        teachers: ``(N, Ct, H, W)``.
        channel_masks: ``(N, Ct)``.
    """
    with torch.no_grad():
        _, moments = dispatch.channel_moments(teachers, teachers)
        masks = [_weights(*level) for level in zip(moments, channel_masks, teachers, strict=True)]
    maps = zip(students, layers, (level.teacher for level in moments), strict=True)
    return [_in_teachers_scale(*level) for level in maps], masks


def _in_teachers_scale(student: Tensor, layer: nn.Module, moments: Tensor) -> Tensor:
    scale, shift = (row.to(accumulation_dtype(student)) for row in (_deviations(moments), moments[0]))
    if not isinstance(layer, nn.Conv2d):
        return _batch_norm(student, scale, shift)
    weight, bias = scale[:, None, None, None] * layer.weight, scale * present(layer.bias) + shift
    return F.conv2d(_batch_norm(student), weight.to(student.dtype), bias.to(student.dtype))


def _batch_norm(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """F.batch_norm with the batch's statistics, which are defined for one value a channel too."""
    return torch.batch_norm(x, scale, shift, None, None, True, 0.0, EPS, torch.backends.cudnn.enabled)


def _folded(moments: ChannelMoments, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A' (Ct, Cs)`` and ``a' (Ct,)``."""
    of_student, of_teacher = _deviations(moments.student), _deviations(moments.teacher)
    folded = of_teacher[:, None] * weight / of_student
    return folded, of_teacher * bias + moments.teacher[0] - folded @ moments.student[0]


def _deviations(moments: Tensor) -> Tensor:
    """Return what each channel is divided by ``(C,)``, from its mean and variance ``(2, C)``."""
    return (moments[1] + EPS).sqrt()


def _weights(moments: ChannelMoments, channel_mask: Tensor | None, teacher: Tensor) -> Tensor:
    """Return the channel mask ``(N, Ct)`` divided by the squares of the teacher's deviations."""
    weights = 1 / (moments.teacher[1] + EPS)  # (Ct,)
    if channel_mask is not None:
        weights = channel_mask * weights
    return weights.to(accumulation_dtype(teacher)).expand(teacher.shape[:2])
