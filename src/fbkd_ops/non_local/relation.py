"""The relation term ``|| NL_t(T) - B(NL_s(S)) ||`` of a pyramid, without z, the adapted relation or a pair matrix."""

import itertools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._numerics import accumulation_dtype
from ..ops.attention_pool import attention_pools
from ..ops.cell_relation import CellBlock, CellLevel, cell_relation
from ..ops.relation_residual import RelationLevels, relation_residual
from ..types import present
from . import responses
from .affine_residual import affine_residual
from .batch_norm import (
    RunningUpdate,
    check_count,
    fixed_statistics,
    synchronizes,
    update_running_statistics,
    uses_batch_statistics,
)
from .collapsed import BlockTensors, CollapsedRelationFunction, LevelOutputs
from .forms import RelationSizes, cheaper_form
from .isolated import isolated
from .modes import MODES
from .parameters import Block, block_tensors, with_tensors
from .plan import Plan, count_blocks, make_plan
from .pooling import pool_cells

__all__ = ["RelationTerm", "collapsed_levels", "relation_squares"]


class RelationTerm(NamedTuple):
    """One level."""

    student: Tensor  # (N, Cs, H, W)
    teacher: Tensor  # (N, Ct, H, W), without gradient
    student_block: Block
    teacher_block: Block
    adaptation_weight: Tensor  # B (Ct, Cs), or (Ct, Cs, 1, 1) as a layer holds it
    adaptation_bias: Tensor  # (Ct,)
    student_mean: Tensor | None = None  # (N, Cs) over pixels, where it is known already
    teacher_mean: Tensor | None = None  # (N, Ct)


def relation_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool = False) -> list[Tensor]:
    """Return the squared term of every level.

    Args:
        backend: what ``backends.resolve`` says; "torch" is plain PyTorch.
        terms: the levels.
        memory_efficient: keep nothing of a feature map's size for the backward pass, and compute it again there.
    """
    results: dict[int, Tensor] = {}
    forms = [relation_form(backend, term) for term in terms]
    for form, form_squares in (("cells", _cell_squares), ("collapsed", _collapsed_squares)):
        chosen = [index for index, name in enumerate(forms) if name == form]
        if chosen:
            squares = form_squares(backend, [terms[index] for index in chosen], memory_efficient)
            for index, value in zip(chosen, squares, strict=True):
                results[index] = value
    for index, (form, term) in enumerate(zip(forms, terms, strict=True)):
        if form == "responses":
            results[index] = _isolated_response_squares(backend, term, memory_efficient)
    return [results[index] for index in range(len(terms))]


def _term_dtype(term: RelationTerm) -> torch.dtype:
    """Return the accumulation dtype. No property: torch.compile of torch 2.10 reads none of a named tuple."""
    return accumulation_dtype(term.student, term.teacher)


def _collapsed_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool) -> Tensor:
    """``(levels,)``: both blocks of a level are affine maps of its pixels, and so is their difference."""
    return relation_residual(backend, collapsed_levels(backend, terms), memory_efficient)


def collapsed_levels(backend: str, terms: list[RelationTerm]) -> RelationLevels:
    """Return the inputs of the terms' residuals. Update the norms' running statistics.

    What flows back into the students is added to in place: it must come from an op that keeps no hold of it.
    """
    dtypes = [_term_dtype(term) for term in terms for _ in range(2)]
    blocks = [block for term in terms for block in (term.student_block, term.teacher_block)]
    maps = [x for term in terms for x in (term.student, term.teacher.detach())]
    maps = [_accumulated_in(dtype, x) for dtype, x in zip(dtypes, maps, strict=True)]
    plan = make_plan(backend, maps, blocks, dtypes)
    for x, block in zip(maps, blocks, strict=True):
        if uses_batch_statistics(block.norm) and not synchronizes(block.norm):
            check_count(_values_of(x), x.shape[1])
    means = _means(backend, plan, maps, [mean for term in terms for mean in (term.student_mean, term.teacher_mean)])
    tensors = [x for row in map(_block_tensors, maps, means, blocks) for x in row]
    tensors += [x for term in terms for x in (term.adaptation_weight, term.adaptation_bias)]
    process_groups = [getattr(block.norm, "process_group", None) for block in blocks]
    outputs = CollapsedRelationFunction.apply(backend, plan, process_groups, *tensors)
    end = len(LevelOutputs._fields) * len(terms)
    columns = LevelOutputs(*(list(outputs[first : first + len(terms)]) for first in range(0, end, len(terms))))
    _update_statistics(plan, maps, blocks, outputs[end:])
    students = [through if x.requires_grad else x for through, x in zip(columns.students, maps[::2], strict=True)]
    projections = [w if w.numel() else None for w in columns.projections]
    return RelationLevels(
        students, columns.student_matrices, maps[1::2], columns.teacher_matrices, projections, columns.offsets
    )


def _accumulated_in(dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return x itself, or beside a float64 map a copy in ``dtype``, which its statistics accumulate in."""
    return x if accumulation_dtype(x) == dtype else x.to(dtype)


def _values_of(x: Tensor) -> int:
    """How many values a channel has."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def _means(backend: str, plan: Plan, maps: list[Tensor], known: list[Tensor | None]) -> list[Tensor | None]:
    """``(N, C)`` over the pixels of each map whose block needs it; one that is known in too few bits is made anew."""
    needed = [block for group in plan.groups if group.takes_moments for block in group.blocks]
    means: list[Tensor | None] = [None] * count_blocks(plan)
    for block in needed:
        mean = known[block]
        means[block] = mean.detach() if mean is not None and mean.dtype == accumulation_dtype(maps[block]) else None
    absent = [block for block in needed if means[block] is None]
    if absent:
        pools = attention_pools(backend, [maps[block].detach() for block in absent])
        for block, pool in zip(absent, pools, strict=True):
            means[block] = pool.channel_mean
    return [mean if mean is None else mean.contiguous() for mean in means]


def _block_tensors(x: Tensor, mean: Tensor | None, block: Block) -> BlockTensors:
    weights, norm = block.weights, block.norm
    return BlockTensors(
        x,
        mean,
        present(weights.theta_weight),  # a mode that collapses has theta and phi
        present(weights.theta_bias),
        present(weights.phi_weight),
        present(weights.phi_bias),
        weights.g_weight,
        weights.g_bias,
        weights.out_weight,
        weights.out_bias,
        None if norm is None else norm.weight,
        None if norm is None else norm.bias,
        *(fixed_statistics(norm) or (None, None)),
    )


def _update_statistics(plan: Plan, maps: list[Tensor], blocks: list[Block], statistics: tuple[Tensor, ...]) -> None:
    """Tell each block's norm the batch's moments, which ``statistics`` has family by family."""
    found, updates = iter(statistics), {}
    for family in plan.families:
        if family.norm != "batch":
            continue
        order, widths = plan.order(family), plan.widths(family)
        means, variances = (next(found).split(widths) for _ in range(2))
        counts = [_values_of(maps[block]) for block in order]
        if family.synchronizes:
            counts = [int(count[0]) for count in next(found).split(widths)]
        for block, width, mean, variance, count in zip(order, widths, means, variances, counts, strict=True):
            check_count(count, width)
            norm = blocks[block].norm
            if uses_batch_statistics(norm):  # as all of such a family do
                updates[block] = RunningUpdate(norm, mean, variance, count)
    # Students before teachers, should they share a norm.
    update_running_statistics([updates[block] for block in sorted(updates, key=lambda block: (block % 2, block))])


def _isolated_response_squares(backend: str, term: RelationTerm, memory_efficient: bool) -> Tensor:
    sides = term.student_block, term.teacher_block
    own: list[Tensor | None] = [term.student, term.teacher, term.adaptation_weight, term.adaptation_bias]
    tensors = [own, *map(block_tensors, sides)]
    ends = list(itertools.accumulate(len(group) for group in tensors))

    def squares(is_first: bool, *given: Tensor | None) -> Tensor:
        student, teacher, weight, bias = map(present, given[: ends[0]])
        student_block, teacher_block = (
            with_tensors(side, given[first:end], is_first)
            for side, (first, end) in zip(sides, itertools.pairwise(ends), strict=True)
        )
        return _response_squares(backend, RelationTerm(student, teacher, student_block, teacher_block, weight, bias))

    return isolated(squares, [x for group in tensors for x in group], memory_efficient)


def _response_squares(backend: str, term: RelationTerm) -> Tensor:
    """Return the residual ``t + U_t r_t - B s - B U_s r_s + v`` of both sides' responses r, in plain PyTorch."""
    dtype = _term_dtype(term)
    adaptation, bias = term.adaptation_weight.to(dtype).flatten(1), term.adaptation_bias.to(dtype)
    student, s = responses.to_affine(backend, term.student.to(dtype), term.student_block)
    teacher, t = responses.to_affine(backend, term.teacher.to(dtype), term.teacher_block)
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
    """Return ``"responses"``, or for modes that collapse the cheaper one of ``"cells"`` and ``"collapsed"``.

    Only the CPU has ``"cells"``.
    """
    blocks = term.student_block, term.teacher_block
    if backend == "torch" or not all(MODES[block.settings.mode].collapses for block in blocks):
        return "responses"
    if backend != "cpu" or not len(term.student) or any(synchronizes(block.norm) for block in blocks):
        return "collapsed"
    return cheaper_form(_sizes(term))


def _sizes(term: RelationTerm) -> RelationSizes:
    images, student_channels, height, width = term.student.shape
    rows, cols, _, _ = pool_cells(term.student, term.student_block.settings)
    inner, teacher_inner = (block.weights.g_bias.shape[0] for block in (term.student_block, term.teacher_block))
    cells = (height // rows) * (width // cols)
    repeats = term.student.dtype != _term_dtype(term)
    channels = student_channels, term.teacher.shape[1]
    return RelationSizes(images, height * width, cells, *channels, inner, teacher_inner, repeats)


def _cell_squares(backend: str, terms: list[RelationTerm], memory_efficient: bool) -> Tensor:
    """``(levels,)``: a pixel's products with the few pooled cells are all that a block adds to it."""
    norms = [(block.norm, term.student) for term in terms for block in (term.student_block, term.teacher_block)]
    for norm, x in norms:
        if uses_batch_statistics(norm):
            check_count(_values_of(x), norm.num_features)
    squares, moments = cell_relation([_cell_level(term) for term in terms], memory_efficient)
    updates = [
        RunningUpdate(norm, mean, variance, _values_of(x))
        for (norm, x), (mean, variance) in zip(norms, moments, strict=True)
        if uses_batch_statistics(norm)
    ]
    update_running_statistics(updates[::2] + updates[1::2])  # students before teachers, should they share a norm
    return squares


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
        (None if norms[0] is None else norms[0].eps, None if norms[1] is None else norms[1].eps),
    )


def _cell_block(dtype: torch.dtype, block: Block) -> CellBlock:
    weights, norm = block.weights, block.norm
    convolutions = [getattr(weights, name) for name in CellBlock._fields if hasattr(weights, name)]
    learned = (None, None) if norm is None else (norm.weight, norm.bias)
    statistics = fixed_statistics(norm) or (None, None)
    tensors: list[Any]  # of each field's type
    tensors = [x if x is None else x.to(dtype) for x in (*convolutions, *learned, *statistics)]
    return CellBlock(*tensors)
