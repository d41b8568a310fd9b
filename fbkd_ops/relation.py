"""The relation term ``|| NL_t(T) - B(NL_s(S)) ||`` of a pyramid, without z, the adapted relation or a pair matrix."""

import contextlib
from typing import NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import linear_non_local
from ._batch_norm import (
    _update_running_statistics,
    refuse_one_value,
    synchronizes,
    uses_batch_statistics,
    without_updates,
)
from ._numerics import accumulation_dtype
from .autograd.affine_residual import affine_residual
from .autograd.cell_relation import CellBlock, CellLevel, cell_relation
from .autograd.relation_residual import RelationLevels, relation_residual
from .collapsed_non_local import CollapsedNonLocal, collapse
from .linear_non_local import Block, pool_cells
from .relation_forms import RelationSizes, cheaper_form

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


def relation_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool = False) -> list[Tensor]:
    """The squared term of every level.

    Args:
        backend: what ``backends.resolve`` says; "torch" is plain PyTorch.
        terms: the levels.
        memory_efficient: keep nothing of a feature map's size for the backward pass, and compute it again there.
    """
    results = [None] * len(terms)
    forms = [relation_form(backend, term) for term in terms]
    for form, form_squares in (("cells", _cell_squares), ("collapsed", _collapsed_squares)):
        chosen = [index for index, name in enumerate(forms) if name == form]
        if chosen:
            squares = form_squares(backend, [terms[index] for index in chosen], memory_efficient)
            for index, value in zip(chosen, squares):
                results[index] = value
    response_squares = _recomputed if memory_efficient else _response_squares
    return [response_squares(backend, term) if value is None else value for term, value in zip(terms, results)]


def _term_dtype(term: RelationTerm) -> torch.dtype:
    """What a level is accumulated in. No property: torch.compile of torch 2.10 reads none of a named tuple."""
    return accumulation_dtype(term.student, term.teacher)


def _collapsed_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool) -> Tensor:
    """``(levels,)``: both blocks of a level are affine maps of its pixels, and so is their difference."""
    dtypes = [_term_dtype(term) for term in terms]
    students = collapse(
        backend,
        [_accumulated_in(dtype, term.student) for dtype, term in zip(dtypes, terms)],
        [term.student_block for term in terms],
        [_known_in(dtype, term.student_mean) for dtype, term in zip(dtypes, terms)],
    )
    teachers = collapse(
        backend,
        [_accumulated_in(dtype, term.teacher) for dtype, term in zip(dtypes, terms)],
        [term.teacher_block for term in terms],
        [_known_in(dtype, term.teacher_mean) for dtype, term in zip(dtypes, terms)],
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
    (s, student_block), (t, teacher_block), dtype = student, teacher, _term_dtype(term)
    adaptation, bias = term.adaptation_weight.to(dtype), term.adaptation_bias.to(dtype)
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
    dtype = _term_dtype(term)
    adaptation, bias = term.adaptation_weight.to(dtype), term.adaptation_bias.to(dtype)
    student, s = linear_non_local.to_affine(backend, term.student.to(dtype), term.student_block)
    teacher, t = linear_non_local.to_affine(backend, term.teacher.to(dtype), term.teacher_block)
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


def relation_form(backend: str, term: RelationTerm) -> str:
    """``"responses"``, or for ``dot_product`` the cheaper one of ``"cells"``, which only the CPU has, and
    ``"collapsed"``."""
    blocks = term.student_block, term.teacher_block
    if backend == "torch" or any(block.settings.mode != "dot_product" for block in blocks):
        return "responses"
    if backend != "cpu" or not len(term.student) or any(synchronizes(block.norm) for block in blocks):
        return "collapsed"
    return cheaper_form(_sizes(term))


def _sizes(term: RelationTerm) -> RelationSizes:
    images, student_channels, height, width = term.student.shape
    rows, cols, _, _ = pool_cells(term.student, term.student_block.settings)
    inner = (block.weights.g_bias.shape[0] for block in (term.student_block, term.teacher_block))
    cells = (height // rows) * (width // cols)
    return RelationSizes(images, height * width, cells, student_channels, term.teacher.shape[1], *inner)


def _cell_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool) -> Tensor:
    """``(levels,)``: a pixel's products with the few pooled cells are all that a block adds to it."""
    norms = [(term, block.norm) for term in terms for block in (term.student_block, term.teacher_block)]
    norms = [(norm, _values_of_a_channel(term)) for term, norm in norms]
    for norm, count in norms:
        if uses_batch_statistics(norm):
            refuse_one_value(count, norm.num_features)
    squares, moments = cell_relation([_cell_level(term) for term in terms], memory_efficient)
    for (norm, count), (mean, variance) in zip(norms, moments):
        if uses_batch_statistics(norm):
            _note_statistics(norm, mean, variance, count)
    return squares


def _values_of_a_channel(term: RelationTerm) -> int:
    images, _, height, width = term.student.shape
    return images * height * width


def _cell_level(term: RelationTerm) -> CellLevel:
    dtype, norms = _term_dtype(term), (term.student_block.norm, term.teacher_block.norm)
    return CellLevel(
        term.student,
        term.teacher,
        term.adaptation_weight.to(dtype),
        term.adaptation_bias.to(dtype),
        _cell_block(dtype, term.student_block),
        _cell_block(dtype, term.teacher_block),
        pool_cells(term.student, term.student_block.settings),
        tuple(None if norm is None else norm.eps for norm in norms),
    )


def _cell_block(dtype: torch.dtype, block: Block) -> CellBlock:
    weights, norm = block.weights, block.norm
    convolutions = [getattr(weights, name) for name in CellBlock._fields if hasattr(weights, name)]
    learned = (None, None) if norm is None else (norm.weight, norm.bias)
    fixed = norm is not None and not uses_batch_statistics(norm)
    statistics = (norm.running_mean, norm.running_var) if fixed else (None, None)
    return CellBlock(*(x if x is None else x.to(dtype) for x in (*convolutions, *learned, *statistics)))


def _note_statistics(norm: nn.Module, mean: Tensor, variance: Tensor, count: int) -> None:
    if norm.training and norm.track_running_stats and norm.running_mean is not None:
        _update_running_statistics(norm, mean, variance, count)
