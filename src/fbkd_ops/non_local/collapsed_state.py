"""What the two passes of the collapsed relation share.

Its tensors, what forward leaves for backward, and how blocks of a group and channels of a family are joined and taken
apart.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import batch_norm as norms
from .plan import Family, Group, LevelGroup, Place, Plan, count_blocks, moment_rank


class BlockTensors(NamedTuple):
    """One map and its block."""

    x: Tensor  # (N, C, H, W)
    mean: Tensor | None  # (N, C) over pixels, without gradient, in the accumulation dtype; None: not needed
    theta_weight: Tensor  # (c, C)
    theta_bias: Tensor  # (c,)
    phi_weight: Tensor
    phi_bias: Tensor
    g_weight: Tensor
    g_bias: Tensor
    out_weight: Tensor  # (C, c)
    out_bias: Tensor | None  # (C,)
    norm_weight: Tensor | None  # (C,)
    norm_bias: Tensor | None
    running_mean: Tensor | None  # of a norm that does not take the batch's moments
    running_variance: Tensor | None


class LevelOutputs(NamedTuple):
    """What the levels' residuals ``t + U W t - P s + v`` are made of, in lists of one entry a level."""

    students: list[Tensor]  # S, for whatever else reads it
    student_matrices: list[Tensor]  # P (N, Ct, Cs)
    teacher_matrices: list[Tensor]  # U (N, Ct, c), or (N, Ct, Ct)
    projections: list[Tensor]  # W (c, Ct), or empty
    offsets: list[Tensor]  # v (N, Ct)


class LevelGradients(NamedTuple):
    """Of the :class:`LevelOutputs`."""

    students: list[Tensor | None]
    student_matrices: list[Tensor]
    teacher_matrices: list[Tensor]
    projections: list[Tensor | None]  # None for an empty one
    offsets: list[Tensor]


class MapState(NamedTuple):
    """A map, and what its statistics leave."""

    x: Tensor  # (N, C, H, W)
    mean: Tensor | None  # (N, C)
    winners: Tensor  # (N, 2c, K), empty where nothing is pooled


class GroupParameters(NamedTuple):
    """Parameters of the blocks of a group, along a first dimension."""

    projections: Tensor  # (B, 3c, C), of theta, phi and g
    biases: Tensor  # (B, 3c)
    out_weights: Tensor  # (B, C, c)


class GroupState(NamedTuple):
    """Tensors of the blocks of a group, along a first dimension: their :class:`GroupParameters` first."""

    projections: Tensor
    biases: Tensor
    out_weights: Tensor
    pooled: Tensor | None  # (B, N, 2c, K), see algebra.pooled_pairs; None without pools
    moments: Tensor | None  # (B, N, 2 + r, C); None where they are not needed
    probes: Tensor  # (B, N, 2 + r, r), or (B, N, 1, c) without moments
    pairs: Tensor  # (B, N, c, c)
    unscaled: Tensor  # (B, N, c, C)
    matrices: Tensor  # V (B, N, C, c)


class FamilyState(NamedTuple):
    """All channels of a family's blocks, side by side."""

    values: Tensor  # (N, C), what the block adds to x = 0, before the norm
    offsets: Tensor  # (N, C), the same after the norm
    mean: Tensor | None = None  # (C,), see norms.Fold
    inverse_deviation: Tensor | None = None
    scale: Tensor | None = None
    deviations: Tensor | None = None  # (N, C), of each image's mean from all images'
    shared_deviations: Tensor | None = None  # (C,), of this process' mean from all processes'
    shares: Tensor | None = None  # (C,)


class LevelState(NamedTuple):
    """Tensors of levels of one shape, along a first dimension."""

    adaptations: Tensor  # B (levels, Ct, Cs)
    relations: Tensor  # B V_s (levels, N, Ct, cs)


class State(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    maps: list[MapState]  # by block
    groups: list[GroupState]
    families: list[FamilyState]
    levels: list[LevelState]  # by group of levels


class Side(NamedTuple):
    """One side of a group of levels."""

    matrices: Tensor  # V (levels, N, C, c)
    theta: Tensor  # (levels, c, C)


def level_side(
    chosen: LevelGroup, place: Place, groups: list[GroupState], offsets: list[Tensor]
) -> tuple[Side, Tensor]:
    """Also the blocks' offsets ``(levels, N, C)``."""
    blocks = slice(place.first, place.first + len(chosen.levels))
    group = groups[place.group]
    return Side(group.matrices[blocks], theta_of(group)[blocks]), offsets[place.group][blocks]


def theta_of(group: GroupState) -> Tensor:
    """``(B, c, C)``."""
    return group.projections[:, : group.out_weights.shape[2]]


def fold_of(family: FamilyState) -> norms.Fold | None:
    """Return the norm of a family, if it has one."""
    if family.mean is None or family.inverse_deviation is None or family.scale is None:
        return None
    return norms.Fold(family.mean, family.inverse_deviation, family.scale)


def cells_of(member: Group, maps: list[MapState]) -> list[int]:
    """K of each block."""
    return [maps[block].winners.shape[2] for block in member.blocks]


def kernel_parameters(
    plan: Plan, groups: Sequence[GroupParameters | GroupState]
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Return each block's arguments of the statistics' kernels: covariance's projection, pool's weight and bias."""
    columns: tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]
    columns = [None] * count_blocks(plan), [None] * count_blocks(plan), [None] * count_blocks(plan)
    for member, group in zip(plan.groups, groups, strict=True):
        absent = [None] * len(member.blocks)
        projections = group.projections[:, : moment_rank(member)].unbind() if member.projects else absent
        weights = group.projections[:, member.inner :].unbind() if member.pools else absent
        biases = group.biases[:, member.inner :].unbind() if member.pools else absent
        for column, values in zip(columns, (projections, weights, biases), strict=True):
            for block, value in zip(member.blocks, values, strict=True):
                column[block] = value
    return columns


def by_group(plan: Plan, vectors: list[Tensor]) -> list[Tensor]:
    """Cut the families' tensors over all their channels, ``(..., C)``, into each group's, ``(B, ..., C)``."""
    return [
        piece for family, vector in zip(plan.families, vectors, strict=True) for piece in _cut(plan, family, vector)
    ]


def found_by_group(plan: Plan, vectors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Return :func:`by_group`, with None for every group of a family that has None."""
    parts: list[Tensor | None] = []
    for family, vector in zip(plan.families, vectors, strict=True):
        parts += [None] * len(family.groups) if vector is None else _cut(plan, family, vector)
    return parts


def _cut(plan: Plan, family: Family, vector: Tensor) -> list[Tensor]:
    members = [plan.groups[group] for group in family.groups]
    pieces = vector.split([len(member.blocks) * member.channels for member in members], dim=-1)
    return [
        piece.unflatten(-1, (len(member.blocks), member.channels)).movedim(-2, 0)
        for piece, member in zip(pieces, members, strict=True)
    ]


def side_by_side(rows: list[Tensor]) -> Tensor:
    """``(..., C)`` of several blocks as one."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def stacked(pieces: list[Tensor]) -> Tensor:
    """Concatenate along the first dimension; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def over_processes(
    plan: Plan,
    process_groups: list[Any],  # of each block
    vectors: Sequence[tuple[Tensor, ...] | None],
    function: Callable[..., tuple[Tensor, ...]],
) -> list[tuple[Tensor, ...] | None]:
    """Apply ``function`` to vectors ``(C,)`` of all blocks of a process group, by family; None where there are none.

    The order of the blocks, unlike that of the families, is the same in all processes.
    """
    parts: dict[int, list[Tensor]] = {}
    results: dict[int, list[Tensor]] = {}
    for family, own in zip(plan.families, vectors, strict=True):
        if own is not None:
            pieces = (vector.split(plan.widths(family)) for vector in own)
            parts |= {block: columns for block, *columns in zip(plan.order(family), *pieces, strict=True)}
    remaining = sorted(parts)
    while remaining:
        chosen = process_groups[remaining[0]]
        members = [block for block in remaining if process_groups[block] is chosen]
        remaining = [block for block in remaining if block not in members]
        outputs = function(
            *(torch.cat(column) for column in zip(*(parts[block] for block in members), strict=True)), chosen
        )
        widths = [parts[block][0].shape[0] for block in members]
        pieces = (vector.split(widths) for vector in outputs)
        results |= {block: columns for block, *columns in zip(members, *pieces, strict=True)}
    return [
        None
        if own is None
        else tuple(
            torch.cat(c).to(family.dtype) for c in zip(*(results[block] for block in plan.order(family)), strict=True)
        )
        for family, own in zip(plan.families, vectors, strict=True)
    ]
