"""The relation term ``|| NL_t(T) - B(NL_s(S)) ||`` of a pyramid, without z, the adapted relation or a pair matrix."""

import contextlib
from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from . import linear_non_local
from ._batch_norm import without_updates
from ._numerics import accumulation_dtype
from .autograd.affine_residual import affine_residual
from .autograd.relation_residual import RelationLevels, relation_residual
from .collapsed_non_local import CollapsedNonLocal, collapse
from .linear_non_local import Block

__all__ = ["RelationTerm", "relation_squares"]


class RelationTerm(NamedTuple):
    """One level."""

    student: Tensor  # (N, Cs, H, W)
    teacher: Tensor  # (N, Ct, H, W), without gradient
    student_block: Block
    teacher_block: Block
    adaptation_weight: Tensor  # B (Ct, Cs)
    adaptation_bias: Tensor  # (Ct,)
    student_mean: Optional[Tensor] = None  # (N, Cs) over pixels, where it is known already
    teacher_mean: Optional[Tensor] = None  # (N, Ct)

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.student, self.teacher)


def relation_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool = False) -> list[Tensor]:
    """The squared term of every level.

    Args:
        backend: what ``backends.resolve`` says; "torch" is plain PyTorch.
        terms: the levels.
        memory_efficient: keep nothing of a feature map's size for the backward pass, and compute it again there.
    """
    results = [None] * len(terms)
    collapsed = [index for index, term in enumerate(terms) if backend != "torch" and _collapses(term)]
    if collapsed:
        squares = _collapsed_squares(backend, [terms[index] for index in collapsed], memory_efficient)
        for index, value in zip(collapsed, squares):
            results[index] = value
    response_squares = _recomputed if memory_efficient else _response_squares
    return [response_squares(backend, term) if value is None else value for term, value in zip(terms, results)]


def _collapses(term: RelationTerm) -> bool:
    return term.student_block.settings.mode == term.teacher_block.settings.mode == "dot_product"


def _collapsed_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool) -> Tensor:
    """``(levels,)``: both blocks of a level are affine maps of its pixels, and so is their difference."""
    students = collapse(
        backend,
        [_accumulated_in(term.dtype, term.student) for term in terms],
        [term.student_block for term in terms],
        [_known_in(term.dtype, term.student_mean) for term in terms],
    )
    teachers = collapse(
        backend,
        [_accumulated_in(term.dtype, term.teacher) for term in terms],
        [term.teacher_block for term in terms],
        [_known_in(term.dtype, term.teacher_mean) for term in terms],
    )
    levels = [_affine_level(*level) for level in zip(terms, students, teachers)]
    return relation_residual(backend, RelationLevels(*map(list, zip(*levels))), memory_efficient)


def _accumulated_in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """A map whose statistics are made in ``dtype``: x itself, except beside a float64 map."""
    return x if accumulation_dtype(x) == dtype else x.to(dtype)


def _known_in(dtype: torch.dtype, mean: Optional[Tensor]) -> Optional[Tensor]:
    """A mean that is known already, unless it is less precise than ``dtype``."""
    return mean if mean is not None and mean.dtype == dtype else None


def _affine_level(
    term: RelationTerm, student: tuple[Tensor, CollapsedNonLocal], teacher: tuple[Tensor, CollapsedNonLocal]
) -> tuple[Optional[Tensor], ...]:
    """A level's entries of :class:`RelationLevels`."""
    (s, student_block), (t, teacher_block) = student, teacher
    adaptation, bias = term.adaptation_weight.to(term.dtype), term.adaptation_bias.to(term.dtype)
    relation = torch.matmul(adaptation, student_block.matrix)  # (N, Ct, cs)
    student_matrix = adaptation + torch.matmul(relation, student_block.projection)  # (N, Ct, Cs)
    offset = teacher_block.offset - torch.matmul(student_block.offset, adaptation.mT) - bias
    matrix, projection = teacher_block.matrix, teacher_block.projection
    if 2 * projection.shape[0] >= projection.shape[1]:  # as many products, or more, in two steps as in one
        matrix, projection = torch.matmul(matrix, projection), None
    return s, student_matrix, t, matrix, projection, offset


def _recomputed(backend: str, term: RelationTerm) -> Tensor:
    """:func:`_response_squares`, all of which the backward pass computes again. A compiler decides that by itself."""
    if torch.compiler.is_compiling():
        return _response_squares(backend, term)
    contexts = lambda: (contextlib.nullcontext(), without_updates())  # noqa: E731
    return checkpoint(
        _response_squares, backend, term, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
    )


def _response_squares(backend: str, term: RelationTerm) -> Tensor:
    """The residual ``t + U_t r_t - B s - B U_s r_s + v`` from the responses r of both sides, in plain PyTorch."""
    adaptation, bias = term.adaptation_weight.to(term.dtype), term.adaptation_bias.to(term.dtype)
    student, s = linear_non_local.to_affine(backend, term.student.to(term.dtype), term.student_block)
    teacher, t = linear_non_local.to_affine(backend, term.teacher.to(term.dtype), term.teacher_block)
    return affine_residual(
        student.flatten(2),
        adaptation,
        s.vectors,
        torch.matmul(adaptation, s.matrix),  # (N, Ct, cs)
        teacher.flatten(2),
        t.vectors,
        t.matrix,
        t.offset - torch.matmul(s.offset, adaptation.mT) - bias,  # (N, Ct)
    )
