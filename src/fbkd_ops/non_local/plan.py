"""Which blocks of a pyramid's relation terms are computed together: those of one width, at any level and side."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.non_local_statistics import NO_POOL
from .batch_norm import synchronizes, uses_batch_statistics
from .parameters import Block
from .pooling import pool_cells

__all__ = ["Family", "Group", "LevelGroup", "Place", "Plan", "count_blocks", "make_plan", "moment_rank"]


class Group(NamedTuple):
    """Blocks of one width and one inner width."""

    blocks: tuple[int, ...]  # the level's student is block 2 * level, its teacher the next one
    channels: int  # C
    inner: int  # c
    pools: bool
    projects: bool  # whether the kernel projects the covariance; else it gives that of the map itself
    takes_moments: bool  # whether the map's mean and covariance are needed


class Family(NamedTuple):
    """Groups whose blocks have the same number of images, dtype and kind of norm: their channels lie side by side."""

    groups: tuple[int, ...]
    dtype: torch.dtype
    norm: str  # "none", "fixed", or "batch" where it takes the batch's own moments
    eps: float
    synchronizes: bool  # with other processes


class Place(NamedTuple):
    """Where one side's blocks of a group of levels begin."""

    group: int
    first: int  # among the group's blocks


class LevelGroup(NamedTuple):
    """Levels whose students are of one group, and whose teachers are."""

    levels: tuple[int, ...]
    student: Place
    teacher: Place
    low_rank: bool  # whether ``U W`` stays two factors


class Plan(NamedTuple):
    """Which blocks, norms and levels of a pyramid are computed together."""

    groups: tuple[Group, ...]
    families: tuple[Family, ...]
    levels: tuple[LevelGroup, ...]
    pools: tuple[int, ...]  # four a block: cell height and width, and those of the first pool in a nested order

    def order(self, family: Family) -> list[int]:
        """Return the family's blocks as their channels lie side by side."""
        return [block for group in family.groups for block in self.groups[group].blocks]

    def widths(self, family: Family) -> list[int]:
        """Channels of each of these blocks."""
        members = [self.groups[group] for group in family.groups]
        return [member.channels for member in members for _ in member.blocks]


# No properties: torch.compile of torch 2.10 reads none of a named tuple.


def moment_rank(group: Group) -> int:
    """Rows of the projection that the moments are taken of: theta's, without pooling also those of phi and g."""
    return group.inner if group.pools else 3 * group.inner


def count_blocks(plan: Plan) -> int:
    """Return the number of blocks, two per level."""
    return len(plan.pools) // 4


class _Kind(NamedTuple):
    """What a family's blocks have in common."""

    images: int
    dtype: torch.dtype
    norm: str
    eps: float
    synchronizes: bool
    given: tuple[bool, bool, bool]  # output bias, the norm's weight and bias
    takes_moments: bool  # whether the maps' means and covariances are needed


class _Width(NamedTuple):
    """What a group's blocks have in common."""

    kind: _Kind
    channels: int
    inner: int
    pools: bool


def make_plan(backend: str, maps: list[Tensor], blocks: list[Block], dtypes: list[torch.dtype]) -> Plan:
    """Return the plan for maps ``(N, C, H, W)`` and their blocks, student and teacher of each level in turn.

    Args:
        backend: the C++ kernels multiply matrices of low rank one after the other; Triton's take their products.
        maps: the features.
        blocks: all in ``dot_product`` mode.
        dtypes: what each map's moments are accumulated in.
    """
    cells = [pool_cells(x, block.settings) for x, block in zip(maps, blocks, strict=True)]
    pools = [pool != _NO_POOL for pool in cells]
    widths = [
        _Width(_kind_of(x, block, dtype, pooled), x.shape[1], block.weights.g_weight.shape[0], pooled)
        for x, block, dtype, pooled in zip(maps, blocks, dtypes, pools, strict=True)
    ]
    kinds = _distinct([width.kind for width in widths])
    # Families one after the other, so that their groups are.
    ordered = [width for kind in kinds for width in _distinct(widths) if width.kind == kind]
    members: list[list[int]] = [[] for _ in ordered]
    levels = []
    pairs = [
        (ordered.index(student), ordered.index(teacher))
        for student, teacher in zip(widths[::2], widths[1::2], strict=True)
    ]
    for pair in _distinct(pairs):
        chosen = tuple(level for level, other in enumerate(pairs) if other == pair)
        places = []
        for side, group in enumerate(pair):
            places.append(Place(group, len(members[group])))
            members[group] += [2 * level + side for level in chosen]
        student_place, teacher_place = places
        levels.append(LevelGroup(chosen, student_place, teacher_place, _stays_factored(backend, ordered[pair[1]])))
    return Plan(
        tuple(_group(backend, width, blocks) for width, blocks in zip(ordered, members, strict=True)),
        tuple(_family(kind, ordered) for kind in kinds),
        tuple(levels),
        tuple(side for pool, pooled in zip(cells, pools, strict=True) for side in (pool if pooled else NO_POOL)),
    )


_NO_POOL = (1, 1, 1, 1)  # as pool_cells says it


def _distinct(values: list) -> list:
    """Return the values without repetitions. Sizes that torch.compile leaves open can be compared, but not hashed."""
    found = []
    for value in values:
        if value not in found:
            found.append(value)
    return found


def _kind_of(x: Tensor, block: Block, dtype: torch.dtype, pools: bool) -> _Kind:
    norm, has_bias = block.norm, block.weights.out_bias is not None
    if norm is None:
        return _Kind(x.shape[0], dtype, "none", 0.0, False, (has_bias, False, False), not pools)
    given, batch = (has_bias, norm.weight is not None, norm.bias is not None), uses_batch_statistics(norm)
    kind = "batch" if batch else "fixed"
    return _Kind(x.shape[0], dtype, kind, norm.eps, batch and synchronizes(norm), given, batch or not pools)


def _group(backend: str, width: _Width, blocks: list[int]) -> Group:
    group = Group(tuple(blocks), width.channels, width.inner, width.pools, False, width.kind.takes_moments)
    # Two products with the projection's rows, or one with the map's, of which symmetry saves a quarter.
    return group._replace(projects=backend == "cpu" and group.takes_moments and 2 * moment_rank(group) < width.channels)


def _family(kind: _Kind, widths: list[_Width]) -> Family:
    groups = tuple(index for index, width in enumerate(widths) if width.kind == kind)
    return Family(groups, kind.dtype, kind.norm, kind.eps, kind.synchronizes)


def _stays_factored(backend: str, teacher: _Width) -> bool:
    """Whether two products of rank c are fewer multiplications than one of the teacher's width."""
    return backend == "cpu" and 2 * teacher.inner < teacher.channels
