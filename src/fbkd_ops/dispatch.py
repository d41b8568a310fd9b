"""The one place where the code that runs a call is chosen: kernels, plain PyTorch, or the literal formula.

Whoever computes something calls a function of this module; :mod:`fbkd_ops.backends` has the rule.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import backends, ops, reference
from ._numerics import without_autocast
from .autograd import channel_moments as moments
from .autograd.channel_moments import ChannelMoments
from .non_local import relation, responses
from .non_local.parameters import Block
from .non_local.relation import RelationTerm
from .ops.adapted_masked_l2 import AdaptedLevels
from .ops.attention_masks import MaskRequest
from .ops.masked_l2 import Masks
from .ops.spatial_l2 import SpatialLevels
from .types import AttentionPool

if TYPE_CHECKING:
    from .level import FBKDLevel

__all__ = [
    "adapted_masked_l2_squares",
    "attention_masks",
    "attention_pools",
    "channel_correlation_losses",
    "channel_divergence_losses",
    "channel_moments",
    "is_literal",
    "literal_terms",
    "masked_l2_squares",
    "non_local",
    "relation_squares",
    "spatial_l2_squares",
    "student_pyramid",
]


def is_literal(x: Tensor) -> bool:
    """Whether the literal formulas run for everything, also what has no kernels.

    Raises:
        RuntimeError: the backend that was chosen cannot run on x.
    """
    return backends.resolve("relation_loss", x) == "reference"


def literal_terms(student: Tensor, teacher: Tensor, level: "FBKDLevel") -> dict[str, Tensor]:
    """Return the unweighted terms of one level; see :func:`fbkd_ops.reference.level_terms`."""
    return reference.level_terms(student, teacher, level)


def attention_pools(features: list[Tensor]) -> list[AttentionPool]:
    """Both attention maps and both plain means of every ``(N, C, H, W)``."""
    backend = backends.resolve("attention_pool", features[0])
    if backend == "reference":
        return [reference.attention_pool(x) for x in features]
    return ops.attention_pool.attention_pools(backend, features)


def attention_masks(requests: list[MaskRequest]) -> list[Tensor]:
    """Return the mask of each request, in its teacher's shape."""
    if not requests:
        return []
    backend = backends.resolve("attention_masks", requests[0].teacher)
    if backend == "reference":
        return [reference.attention_mask(s, t, temperature=tau, mask_rule=rule) for s, t, tau, rule in requests]
    return ops.attention_masks.attention_masks(backend, requests)


def masked_l2_squares(
    students: list[Tensor], teachers: list[Tensor], spatial_masks: Masks, channel_masks: Masks
) -> Tensor:
    """``sum(Ms * Mc * (S - T)**2)`` of every level, ``(levels,)``."""
    backend = backends.resolve("masked_l2_loss", students[0])
    levels = students, teachers, spatial_masks, channel_masks
    if backend == "reference":
        return torch.stack([reference.masked_l2_square(*level) for level in zip(*levels, strict=True)])
    return ops.masked_l2.masked_l2_squares(backend, *levels)


def adapted_masked_l2_squares(levels: AdaptedLevels) -> Tensor:
    """``sum(Ms * Mc * (A S + a - T)**2)`` of every level, ``(levels,)``."""
    backend = backends.resolve("adapted_masked_l2_loss", levels.students[0])
    if backend == "reference":
        return _literal_adapted_squares(levels)
    return ops.adapted_masked_l2.adapted_masked_l2_squares(backend, levels)


def student_pyramid(
    levels: AdaptedLevels, pools: list[AttentionPool], memory_efficient: bool
) -> tuple[Tensor, list[AttentionPool], list[Tensor]]:
    """Return the squares, the students' means and the students, as outputs of one op where kernels run.

    See :func:`fbkd_ops.ops.adapted_masked_l2.student_pyramid`.
    """
    backend = backends.resolve("adapted_masked_l2_loss", levels.students[0])
    if backend == "reference":
        return _literal_adapted_squares(levels), attention_pools(levels.students), levels.students
    return ops.adapted_masked_l2.student_pyramid(backend, levels, pools, memory_efficient)


def _literal_adapted_squares(levels: AdaptedLevels) -> Tensor:
    with without_autocast(levels.students[0]):
        return torch.stack([reference.adapted_masked_l2_square(*level) for level in zip(*levels, strict=True)])


def spatial_l2_squares(levels: SpatialLevels) -> Tensor:
    """``sum((t - conv3x3(s) - b)**2)`` of every level, ``(levels,)``."""
    backend = backends.resolve("spatial_l2_loss", levels.students[0])
    if backend == "reference":
        with without_autocast(levels.students[0]):
            return torch.stack([reference.spatial_l2_square(*level) for level in zip(*levels, strict=True)])
    return ops.spatial_l2.spatial_l2_squares(backend, levels)


def channel_correlation_losses(students: list[Tensor], teachers: list[Tensor], eps: float) -> Tensor:
    """Half the mean square of the difference of the standardised maps, of every level, ``(levels,)``."""
    backend = backends.resolve("channel_correlation_loss", students[0])
    if backend == "reference":
        pairs = zip(students, teachers, strict=True)
        return torch.stack([reference.channel_correlation_loss(*pair, eps=eps) for pair in pairs])
    return ops.channel_correlation.channel_correlation_losses(backend, students, teachers, eps)


def channel_moments(students: list[Tensor], teachers: list[Tensor]) -> tuple[list[Tensor], list[ChannelMoments]]:
    """Return the students and the moments of every level; see :mod:`fbkd_ops.autograd.channel_moments`."""
    backend = backends.resolve("channel_correlation_loss", students[0])
    if backend == "reference":
        pairs = zip(students, teachers, strict=True)
        return students, [ChannelMoments(reference.channel_moments(s), reference.channel_moments(t)) for s, t in pairs]
    return moments.channel_moments(backend, students, teachers)


def channel_divergence_losses(students: list[Tensor], teachers: list[Tensor], temperature: float) -> Tensor:
    """``tau**2`` times the mean divergence of the channels, of every level, ``(levels,)``."""
    backend = backends.resolve("channel_divergence_loss", students[0])
    if backend == "reference":
        pairs = zip(students, teachers, strict=True)
        return torch.stack([reference.channel_divergence_loss(*pair, temperature=temperature) for pair in pairs])
    return ops.channel_divergence.channel_divergence_losses(backend, students, teachers, temperature)


def non_local(x: Tensor, block: Block) -> Tensor:
    """``z (N, C, H, W)`` of the block."""
    backend = backends.resolve("non_local", x)
    with without_autocast(x):
        if backend == "reference":
            return reference.non_local(x, block.weights, norm=block.norm, **vars(block.settings))
        return responses.non_local(backend, x, block)


def relation_squares(terms: list[RelationTerm], memory_efficient: bool) -> list[Tensor]:
    """Return the squared relation term of every level."""
    backend = backends.resolve("relation_loss", terms[0].student)
    with without_autocast(terms[0].student):
        if backend == "reference":
            return [_literal_relation_square(term) for term in terms]
        return relation.relation_squares(backend, terms, memory_efficient)


def _literal_relation_square(term: RelationTerm) -> Tensor:
    student, teacher = term.student_block, term.teacher_block
    return reference.relation_square(
        term.student,
        term.teacher,
        student.weights,
        teacher.weights,
        term.adaptation_weight,
        term.adaptation_bias,
        student_norm=student.norm,
        teacher_norm=teacher.norm,
        **vars(student.settings),
    )
