"""Backward pass of the collapsed relation, by hand."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.non_local_statistics import own_memory
from ..ops.registry import kernel
from ..types import present
from . import batch_norm as norms
from . import collapsed_algebra as algebra
from .collapsed_state import (
    FamilyState,
    GroupState,
    LevelGradients,
    LevelState,
    State,
    by_group,
    cells_of,
    fold_of,
    found_by_group,
    kernel_parameters,
    level_side,
    over_processes,
    side_by_side,
    stacked,
)
from .plan import LevelGroup, Plan, count_blocks, moment_rank


class _SideGradients(NamedTuple):
    """One side of a group of levels."""

    matrices: Tensor  # of V (levels, N, C, c)
    theta: Tensor  # of theta's weight, where it is a factor beside V (levels, c, C)
    offsets: Tensor  # (levels, N, C)


class _GroupGradients(NamedTuple):
    projections: Tensor  # (B, r, C): of the pooled convolutions only where the kernel does not give them
    out_weights: Tensor  # (B, C, c)
    probes: Tensor  # (B, N, rows, r)
    pooled: Tensor | None  # (B, N, 2c, K)


class _FamilyGradients(NamedTuple):
    out_bias: Tensor  # (C,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor  # (C,)
    values: list[Tensor]  # (N, C), of the values of theta's bias and, beside moments, of theta's mean
    variances: Tensor | None = None  # (C,), twice that of an image's variance


def collapsed_gradients(
    backend: str,
    plan: Plan,
    process_groups: list[Any],
    state: State,
    grads: LevelGradients,
    maps: list[Tensor | None],  # see own_map_gradients
) -> list[Tensor | None]:
    """Gradients in the order of the function's tensors."""
    offsets = by_group(plan, [family.offsets for family in state.families])
    sides: list[list[_SideGradients]] = [[] for _ in plan.groups]
    adaptations = []
    for chosen, level, stacks in zip(plan.levels, state.levels, _stacked_gradients(plan, grads), strict=True):
        student, teacher, weights = _level_gradients(chosen, level, state.groups, offsets, *stacks)
        sides[chosen.student.group].append(student)
        sides[chosen.teacher.group].append(teacher)
        adaptations.append(weights)
    matrices = [stacked([side.matrices for side in of_group]) for of_group in sides]
    families = _family_gradients(plan, process_groups, state, sides, matrices)
    groups = _group_gradients(plan, state, sides, matrices, families)
    pooled_weights = _finish_map_gradients(backend, plan, state, groups, maps)
    blocks = _block_gradients(plan, groups, families, maps, pooled_weights)
    return [*(x for block in blocks for x in block), *_adaptation_gradients(plan, adaptations, families)]


def _stacked_gradients(plan: Plan, grads: LevelGradients) -> list[tuple[Tensor, Tensor, Tensor | None, Tensor]]:
    """Those of P, U, W and v of each group of levels, ``(levels, ...)``, with one copy for all that are not alone."""
    stacks = []
    slots: list[Tensor] = []
    values: list[Tensor] = []
    for chosen in plan.levels:
        columns: list[list[Any]]  # of tensors; the projections may be None
        columns = [[column[level] for level in chosen.levels] for column in grads[1:]]
        stack: list[Any] = []
        for column in columns:
            if column[0] is None or len(column) == 1:
                stack.append(None if column[0] is None else column[0][None])
                continue
            stack.append(column[0].new_empty(len(column), *column[0].shape))
            slots += stack[-1].unbind()
            values += column
        of_student, of_teacher, of_projection, of_offset = stack
        stacks.append((of_student, of_teacher, of_projection, of_offset))
    if slots:
        torch._foreach_copy_(slots, values)
    return stacks


def _level_gradients(
    chosen: LevelGroup,
    level: LevelState,
    groups: list[GroupState],
    offsets: list[Tensor],
    student_matrix: Tensor,  # of P (levels, N, Ct, Cs)
    teacher_matrix: Tensor,  # of U (levels, N, Ct, c), or of U W (levels, N, Ct, Ct)
    projection: Tensor | None,  # of W (levels, c, Ct)
    offset: Tensor,  # of v (levels, N, Ct)
) -> tuple[_SideGradients, _SideGradients, Tensor]:
    """Of the student's side, of the teacher's and of B ``(levels, Ct, Cs)``."""
    (s, o_s), (t, _) = (level_side(chosen, place, groups, offsets) for place in (chosen.student, chosen.teacher))
    relations = torch.bmm(student_matrix.flatten(1, 2), s.theta.mT).unflatten(1, student_matrix.shape[1:3])
    theta = torch.bmm(level.relations.flatten(1, 2).mT, student_matrix.flatten(1, 2))
    of_images = torch.baddbmm(student_matrix.flatten(0, 1), relations.flatten(0, 1), s.matrices.flatten(0, 1).mT)
    weights = of_images.unflatten(0, student_matrix.shape[:2]).sum(dim=1)
    weights.baddbmm_(offset.mT, o_s, alpha=-1)
    student = _SideGradients(
        torch.matmul(level.adaptations.mT[:, None], relations),
        theta,
        torch.empty_like(o_s).baddbmm_(offset, level.adaptations, beta=0, alpha=-1),
    )
    if chosen.low_rank:
        return student, _SideGradients(teacher_matrix, present(projection), offset), weights
    rows = teacher_matrix.flatten(1, 2)
    matrices = torch.bmm(rows, t.theta.mT).unflatten(1, teacher_matrix.shape[1:3])
    return student, _SideGradients(matrices, torch.bmm(t.matrices.flatten(1, 2).mT, rows), offset), weights


def _family_gradients(
    plan: Plan, process_groups: list[Any], state: State, sides: list[list[_SideGradients]], matrices: list[Tensor]
) -> list[_FamilyGradients]:
    rows, shifts = [], []
    weights: list[Tensor | None] = []
    moments: list[tuple[Tensor, Tensor] | None] = []
    for family, own in zip(plan.families, state.families, strict=True):
        of_blocks = [row for index in family.groups for side in sides[index] for row in side.offsets.unbind()]
        rows.append(side_by_side(of_blocks))  # (N, C)
        shifts.append(rows[-1].sum(dim=0))
        weights.append(None)
        moments.append(None)
        folded = fold_of(own)
        if folded is None:
            continue
        # Each image's part of the scales' gradient.
        parts = torch._foreach_mul(
            [matrices[index] for index in family.groups], [state.groups[index].unscaled.mT for index in family.groups]
        )
        of_images = side_by_side([row for part in parts for row in part.sum(dim=3).unbind()])
        scale = torch.addcmul(of_images, rows[-1], own.values).sum(dim=0)
        weight = weights[-1] = norms.weight_gradient(folded, scale, shifts[-1])
        if family.norm == "batch":
            moments[-1] = norms.moment_gradients(folded, weight, shifts[-1], rows[-1].shape[0])
    moments = _shared_gradients(plan, process_groups, state.families, moments)
    columns = zip(state.families, rows, shifts, weights, moments, strict=True)
    return [_channel_gradients(own, row, shift, weight, moment) for own, row, shift, weight, moment in columns]


def _shared_gradients(
    plan: Plan, process_groups: list[Any], families: list[FamilyState], moments: list[tuple[Tensor, Tensor] | None]
) -> list[tuple[Tensor, Tensor] | None]:
    """Return the gradients of the moments, after those of moments that several processes share have been added up."""
    joint = [family.synchronizes for family in plan.families]
    if not any(joint):
        return moments
    images = [max(family.values.shape[0], 1) for family in families]
    vectors = [
        (own[0] * count, own[1] * (count / 2), present(family.shared_deviations), present(family.shares))
        if own is not None and shares
        else None
        for own, family, count, shares in zip(moments, families, images, joint, strict=True)
    ]
    found = over_processes(plan, process_groups, vectors, norms.shared_moment_gradients)
    return [
        own if new is None else (new[0] / count, new[1] * (2 / count))
        for own, new, count in zip(moments, found, images, strict=True)
    ]


def _channel_gradients(
    own: FamilyState,
    row: Tensor,  # of the offsets (N, C)
    shift: Tensor,  # (C,)
    weight: Tensor | None,  # (C,)
    moments: tuple[Tensor, Tensor] | None,  # see norms.moment_gradients
) -> _FamilyGradients:
    if own.scale is None:
        return _FamilyGradients(shift, None, shift, [row])
    values, out_bias = row * own.scale, shift * own.scale
    if moments is None:
        return _FamilyGradients(out_bias, weight, shift, [values])
    mean, variance = moments
    images = torch.addcmul(mean, variance, present(own.deviations))  # (N, C)
    # A constant is subtracted again by the norm: what is left is what other processes' losses ask for.
    out_bias = torch.add(out_bias, mean, alpha=row.shape[0])
    return _FamilyGradients(out_bias, weight, shift, [values, images], variance)


def _group_gradients(
    plan: Plan,
    state: State,
    sides: list[list[_SideGradients]],
    matrices: list[Tensor],
    families: list[_FamilyGradients],
) -> list[_GroupGradients]:
    scales = found_by_group(plan, [family.scale for family in state.families])
    variances = found_by_group(plan, [family.variances for family in families])
    constants = by_group(plan, [family.values[0] for family in families])
    means = found_by_group(plan, [family.values[1] if len(family.values) > 1 else None for family in families])
    through = _products([matrix.mT for matrix in matrices], scales)
    weighted = _products([group.unscaled for group in state.groups], variances)
    results = []
    for index, (member, group) in enumerate(zip(plan.groups, state.groups, strict=True)):
        rows = [row[:, :, None] for row in (constants[index], means[index]) if row is not None]
        if variances[index] is not None:
            rows.append(weighted[index])
        of_theta = algebra.theta_probes(group.probes, member.inner, len(rows) > 1)
        found = algebra.unscaled_gradients(
            through[index], rows, group.unscaled, of_theta, group.pairs, group.out_weights
        )
        probes, projections = found.probes, stacked([side.theta for side in sides[index]])
        if not member.pools:
            probes = algebra.all_pairs_gradient(probes, found.pairs, group.probes, member.inner)
        if group.moments is not None:
            projections = algebra.projection_gradients(projections, probes, group.moments)
        pooled = None
        if group.pooled is not None:
            pooled = algebra.pooled_gradients(found.pairs, group.pooled, cells_of(member, state.maps))
        results.append(_GroupGradients(projections, found.out_weights, probes, pooled))
    return results


def _products(stacks: list[Tensor], scales: list[Tensor | None]) -> list[Tensor]:
    """Scale the channels of each ``(B, N, c, C)`` by ``(B, C)``; where that is None, return it as it is."""
    factors = [(index, scale[:, None, None]) for index, scale in enumerate(scales) if scale is not None]
    results = list(stacks)
    if factors:
        found = torch._foreach_mul([stacks[index] for index, _ in factors], [factor for _, factor in factors])
        for (index, _), product in zip(factors, found, strict=True):
            results[index] = product
    return results


def own_map_gradients(state: State, students: list[Tensor | None], wanted: list[bool]) -> list[Tensor | None]:
    """Return each map's gradient from elsewhere, in memory that may be changed; None where nobody wants it."""
    incoming = [grad for student in students for grad in (student, None)]
    return [
        own_memory(grad, map.x) if want else None for grad, map, want in zip(incoming, state.maps, wanted, strict=True)
    ]


def _finish_map_gradients(
    backend: str, plan: Plan, state: State, groups: list[_GroupGradients], gradients: list[Tensor | None]
) -> list[Tensor]:
    """Add to each map's gradient in place; return that of the pooled weights ``(2c, C)``. One read of each map."""
    maps, means, winners = map(list, zip(*state.maps, strict=True))
    projections, weights, _ = kernel_parameters(plan, state.groups)
    inner: list[Tensor | None] = [None] * count_blocks(plan)
    shifts, pooled = list(inner), list(inner)
    for member, group, found in zip(plan.groups, state.groups, groups, strict=True):
        for slot, block in enumerate(member.blocks if member.takes_moments else ()):
            if gradients[block] is not None:
                inner[block], shifts[block] = algebra.map_gradient(
                    found.probes[slot],
                    group.projections[slot, : moment_rank(member)],
                    maps[block].shape[2] * maps[block].shape[3],
                    member.projects,
                )
        if found.pooled is not None:
            for slot, block in enumerate(member.blocks):
                pooled[block] = found.pooled[slot, :, :, : winners[block].shape[2]].contiguous()
    if backend == "cpu":  # whose op takes no strides
        inner, shifts = ([x if x is None else x.contiguous() for x in column] for column in (inner, shifts))
    own = [x.new_empty(0) if grad is None else grad for grad, x in zip(gradients, maps, strict=True)]
    own = own if any(grad is not None for grad in gradients) else []
    # Outputs that the op fills: torch.compile takes no op that changes some arguments and returns others.
    filled = [
        x.new_empty(0) if weight is None else torch.empty_like(weight) for x, weight in zip(maps, weights, strict=True)
    ]
    arguments = maps, means, projections, inner, shifts, weights, winners, pooled, list(plan.pools)
    kernel("non_local_statistics_backward_", backend)(own, filled, *arguments)
    return filled


def _block_gradients(
    plan: Plan,
    groups: list[_GroupGradients],
    families: list[_FamilyGradients],
    maps: list[Tensor | None],
    weights: list[Tensor],  # of what is pooled (2c, C)
) -> list[tuple[Tensor | None, ...]]:
    """Of each block's :class:`collapsed_state.BlockTensors`."""
    biases = _bias_gradients(plan, groups)
    vectors = zip(
        *(found_by_group(plan, list(column)) for column in zip(*(family[:3] for family in families), strict=True)),
        strict=True,
    )
    blocks: dict[int, tuple[Tensor | None, ...]] = {}
    for member, group, columns in zip(plan.groups, groups, vectors, strict=True):
        stacks, outs = group.projections.unbind(), group.out_weights.unbind()
        norms_of_blocks = zip(
            *([None] * len(stacks) if column is None else column.unbind() for column in columns), strict=True
        )
        pooled = None if group.pooled is None else group.pooled.sum((1, 3)).unbind()  # (2c,) each
        for slot, (block, norm) in enumerate(zip(member.blocks, norms_of_blocks, strict=True)):
            if pooled is not None:  # theta apart from phi and g
                weight = stacks[slot], *weights[block].split(member.inner)
                bias = biases[block], *pooled[slot].split(member.inner)
            else:
                weight, bias = stacks[slot].split(member.inner), biases[block].split(member.inner)
            layers = [x for layer in zip(weight, bias, strict=True) for x in layer]
            blocks[block] = maps[block], None, *layers, outs[slot], *norm, None, None
    return [blocks[block] for block in range(count_blocks(plan))]


def _bias_gradients(plan: Plan, groups: list[_GroupGradients]) -> list[Tensor]:
    """Of the projections' biases, ``(r,)`` of each block."""
    biases: dict[int, Tensor] = {}
    for family in plan.families:
        members = [
            (slot, block, index) for index in family.groups for slot, block in enumerate(plan.groups[index].blocks)
        ]
        total = side_by_side([groups[index].probes[slot, :, :2] for slot, _, index in members]).sum((0, 1))
        ranks = [groups[index].probes.shape[3] for _, _, index in members]
        for (_, block, _), bias in zip(members, total.split(ranks), strict=True):
            biases[block] = bias
    return [biases[block] for block in range(count_blocks(plan))]


def _adaptation_gradients(plan: Plan, weights: list[Tensor], families: list[_FamilyGradients]) -> list[Tensor]:
    """Of weight and bias of each level in turn."""
    shifts = by_group(plan, [family.norm_bias.neg() for family in families])
    gradients: dict[int, tuple[Tensor, Tensor]] = {}
    for chosen, weight in zip(plan.levels, weights, strict=True):
        for slot, level in enumerate(chosen.levels):
            bias = shifts[chosen.teacher.group][chosen.teacher.first + slot]
            gradients[level] = weight[slot], bias
    return [x for level in range(count_blocks(plan) // 2) for x in gradients[level]]
