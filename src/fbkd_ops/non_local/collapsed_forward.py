"""Forward pass of the collapsed relation."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.registry import kernel
from ..types import present
from . import batch_norm as norms
from . import collapsed_algebra as algebra
from .collapsed_state import (
    BlockTensors,
    FamilyState,
    GroupParameters,
    GroupState,
    LevelState,
    MapState,
    State,
    by_group,
    cells_of,
    found_by_group,
    kernel_parameters,
    level_side,
    over_processes,
    side_by_side,
)
from .plan import Family, Group, Plan, count_blocks, moment_rank


class _Channels(NamedTuple):
    """Vectors of a family's blocks, side by side."""

    out_bias: Tensor | None
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    running_mean: Tensor | None
    running_variance: Tensor | None


class _Statistics(NamedTuple):
    """What the maps of a group's blocks leave; see :class:`GroupState`."""

    pooled: Tensor | None
    moments: Tensor | None


class _Matrices(NamedTuple):
    """A group's matrices before the norm, and what they are made of; see :class:`GroupState`."""

    probes: Tensor
    pairs: Tensor
    unscaled: Tensor


def collapsed_outputs(
    backend: str,
    plan: Plan,
    process_groups: list[Any],
    blocks: list[BlockTensors],
    adaptations: list[tuple[Tensor, Tensor]],
) -> tuple[State, list[Tensor], list[Tensor]]:
    """Return the state, all levels' outputs and all families' statistics."""
    parameters, channels, adapted = _joined_parameters(plan, blocks, adaptations)
    maps, pooled, covariances = _map_statistics(backend, plan, blocks, parameters)
    found = _group_statistics(plan, parameters, maps, pooled, covariances)
    probes = _probes(plan, parameters, found, maps)
    matrices = [
        _matrices(member, maps, own, of_maps, probe)
        for member, own, of_maps, probe in zip(plan.groups, parameters, found, probes, strict=True)
    ]
    families, statistics = _normalised(plan, process_groups, matrices, channels, maps)
    scales = found_by_group(plan, [family.scale for family in families])
    groups = [
        GroupState(*own, *of_maps, *before, algebra.scaled_matrices(before.unscaled, scale))
        for own, of_maps, before, scale in zip(parameters, found, matrices, scales, strict=True)
    ]
    offsets = by_group(plan, [family.offsets for family in families])
    levels, outputs = _level_outputs(plan, groups, offsets, adapted)
    through = [block.x.view_as(block.x) for block in blocks[::2]]
    return State(maps, groups, families, levels), through + outputs, statistics


def _joined_parameters(
    plan: Plan, blocks: list[BlockTensors], adaptations: list[tuple[Tensor, Tensor]]
) -> tuple[list[GroupParameters], list[_Channels], list[tuple[Tensor, Tensor]]]:
    """Parameters of the groups and of the families, and weights and biases of the groups of levels.

    A family's lie in one piece of memory: one copy instead of one a stack.
    """
    groups, families = [], []
    adapted: dict[int, tuple[Tensor, Tensor]] = {}
    for family in plan.families:
        order = [blocks[block] for block in plan.order(family)]
        vectors: list[list[Any]]  # of tensors, or of None
        vectors = [[block[field] for block in order] for field in range(-len(_Channels._fields), 0)]
        members = [plan.groups[group] for group in family.groups]
        levels = [index for index, level in enumerate(plan.levels) if level.teacher.group in family.groups]
        stacks: list[list[Tensor]]
        stacks = [stack for member in members for stack in _stacks([blocks[block] for block in member.blocks])]
        stacks += [
            [adaptations[level][part] for level in plan.levels[index].levels] for index in levels for part in (0, 1)
        ]
        found = iter(_joined([column for column in vectors if column[0] is not None] + stacks, family.dtype))
        families.append(_Channels(*(None if column[0] is None else next(found) for column in vectors)))
        for channels, inner in ((member.channels, member.inner) for member in members):
            shapes = (3 * inner, channels), (3 * inner,), (channels, inner)
            groups.append(GroupParameters(*(next(found).view(-1, *shape) for shape in shapes)))
        for index in levels:
            to, width = (plan.groups[place.group].channels for place in (plan.levels[index][2], plan.levels[index][1]))
            adapted[index] = next(found).view(-1, to, width), next(found).view(-1, to)
    return groups, families, [adapted[index] for index in range(len(plan.levels))]


def _stacks(group: list[BlockTensors]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Projections, biases and output weights of a group's blocks."""
    weights = [weight for block in group for weight in (block.theta_weight, block.phi_weight, block.g_weight)]
    biases = [bias for block in group for bias in (block.theta_bias, block.phi_bias, block.g_bias)]
    return weights, biases, [block.out_weight for block in group]


def _joined(lists: Sequence[Sequence[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Return the elements of each list's tensors, one after the other."""
    elements = torch.cat([tensor.flatten() for tensors in lists for tensor in tensors]).to(dtype)
    return list(elements.split([sum(tensor.numel() for tensor in tensors) for tensors in lists]))


def _map_statistics(
    backend: str, plan: Plan, blocks: list[BlockTensors], groups: list[GroupParameters]
) -> tuple[list[MapState], list[Tensor], list[Tensor]]:
    """Return the maps, and what one read of each gives: the pooled values and the covariances."""
    maps, means = [block.x for block in blocks], [block.mean for block in blocks]
    parameters = kernel_parameters(plan, groups)
    outputs = kernel("non_local_statistics_forward", backend)(maps, means, *parameters, list(plan.pools))
    pooled, winners, covariances = (
        outputs[first : first + count_blocks(plan)] for first in range(0, 3 * count_blocks(plan), count_blocks(plan))
    )
    return [MapState(*state) for state in zip(maps, means, winners, strict=True)], pooled, covariances


class _Copies:
    """Copies into parts of new tensors, all made at once."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.values: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def add(self, part: Tensor, value: Tensor) -> None:
        self.parts.append(part)
        self.values.append(value)

    def stack(self, values: list[Tensor]) -> Tensor:
        """Return the values ``(..., K)`` along a new first dimension, the shorter ones with zeros behind them."""
        if len(values) == 1:
            return values[0][None]
        longest = max(value.shape[-1] for value in values)
        stack = values[0].new_empty(len(values), *values[0].shape[:-1], longest)
        for part, value in zip(stack, values, strict=True):
            self.add(part[..., : value.shape[-1]], value)
            if value.shape[-1] < longest:
                self.zeros.append(part[..., value.shape[-1] :])
        return stack

    def run(self) -> None:
        if self.zeros:
            torch._foreach_zero_(self.zeros)
        if self.parts:
            torch._foreach_copy_(self.parts, self.values)


def _group_statistics(
    plan: Plan, groups: list[GroupParameters], maps: list[MapState], pooled: list[Tensor], covariances: list[Tensor]
) -> list[_Statistics]:
    """Return the groups' pooled values, and the moments of their maps where these are needed."""
    copies, results, unprojected = _Copies(), [], []
    for member, group in zip(plan.groups, groups, strict=True):
        values = copies.stack([pooled[block] for block in member.blocks]) if member.pools else None
        moments = None
        if member.takes_moments:
            shape = len(member.blocks), maps[member.blocks[0]].x.shape[0], 2 + moment_rank(member), member.channels
            moments = group.projections.new_empty(shape)
            copies.zeros.append(moments[:, :, 0])
            for slot, block in enumerate(member.blocks):
                copies.add(moments[slot, :, 1], present(maps[block].mean))
                if member.projects:
                    copies.add(moments[slot, :, 2:], covariances[block])
            if not member.projects:
                projections = group.projections[:, : moment_rank(member)]
                stack = copies.stack([covariances[block] for block in member.blocks])
                unprojected.append((moments[:, :, 2:], projections, stack))
        results.append(_Statistics(values, moments))
    copies.run()
    for rows, projections, stack in unprojected:
        algebra.fill_covariances(rows, projections, stack)
    return results


def _probes(
    plan: Plan, groups: list[GroupParameters], statistics: list[_Statistics], maps: list[MapState]
) -> list[Tensor]:
    results, rows, biases = [], [], []
    for member, group, (_, moments) in zip(plan.groups, groups, statistics, strict=True):
        if moments is None:
            images = maps[member.blocks[0]].x.shape[0]
            probes = group.biases[:, None, None, : member.inner].expand(-1, images, -1, -1)
        else:
            probes = algebra.project_moments(moments, group.projections[:, : moment_rank(member)])
            rows.append(probes[:, :, :2])
            biases.append(group.biases[:, None, None, : moment_rank(member)])
        results.append(probes)
    if rows:
        torch._foreach_add_(rows, biases)
    return results


def _matrices(
    member: Group, maps: list[MapState], parameters: GroupParameters, statistics: _Statistics, probes: Tensor
) -> _Matrices:
    if statistics.pooled is not None:
        pairs = algebra.pooled_pairs(statistics.pooled, cells_of(member, maps))
    else:
        pairs = algebra.all_pairs(probes, member.inner)
    return _Matrices(probes, pairs, algebra.unscaled_matrices(pairs, parameters.out_weights))


def _normalised(
    plan: Plan,
    process_groups: list[Any],  # of each block
    groups: list[_Matrices],
    channels: list[_Channels],
    maps: list[MapState],
) -> tuple[list[FamilyState], list[Tensor]]:
    """Return the families with their norms folded, and the statistics of those that take the batch's moments."""
    values, local = [], []
    for family, own in zip(plan.families, channels, strict=True):
        values.append(_channel_values(family, plan.groups, groups, own.out_bias))
        local.append(norms.batch_moments(*values[-1][1:]) if family.norm == "batch" else None)
    vectors = [
        (*moments[:2], _counts(plan, family, maps, moments[0])) if moments is not None and family.synchronizes else None
        for family, moments in zip(plan.families, local, strict=True)
    ]
    shared = over_processes(plan, process_groups, vectors, norms.shared_moments)
    families, statistics = [], []
    for family, own, (offsets, *_), moments, joint in zip(plan.families, channels, values, local, shared, strict=True):
        if family.norm == "none":
            families.append(FamilyState(offsets, offsets))
            continue
        deviations: Tensor | None = None
        shared_state: tuple[Tensor, ...] = ()  # deviations and shares
        if moments is None:
            mean, variance = present(own.running_mean), present(own.running_variance)
        elif joint is None:
            mean, variance, deviations = moments
            statistics += [mean, variance]
        else:
            mean, variance, deviations, shared_state = joint[0], joint[1], moments[2], joint[3:]
            statistics += [mean, variance, joint[2]]
        folded = norms.fold(mean, variance, family.eps, own.norm_weight)
        normalised = norms.folded_offsets(folded, own.norm_bias, offsets)
        families.append(FamilyState(offsets, normalised, *folded, deviations, *shared_state))
    return families, statistics


def _channel_values(
    family: Family, members: tuple[Group, ...], groups: list[_Matrices], out_bias: Tensor | None
) -> list[Tensor]:
    """Return what the blocks add to x = 0, ``(N, C)``, before the norm.

    For norms that take the batch's moments, also mean and variance of what they add to an image's pixels, ``(N, C)``.
    """
    normalises = family.norm == "batch"
    own = [groups[index] for index in family.groups]
    values = [
        algebra.probe_values(algebra.theta_probes(group.probes, members[index].inner, normalises), group.unscaled)
        for index, group in zip(family.groups, own, strict=True)
    ]
    joined = side_by_side([row for value in values for row in value[:, :, : 2 if normalises else 1].unbind()])
    if out_bias is not None:
        joined = joined + out_bias
    results = list(joined.unbind(1))
    if normalises:
        # The diagonal of V Cov(theta) V^T.
        products = torch._foreach_mul([group.unscaled for group in own], [value[:, :, 2:] for value in values])
        results.append(side_by_side([row for product in products for row in product.sum(dim=2).unbind()]))
    return results


def _counts(plan: Plan, family: Family, maps: list[MapState], like: Tensor) -> Tensor:
    """Values of each channel in this process, ``(C,)``."""
    shapes = [
        (maps[block].x.shape, width) for block, width in zip(plan.order(family), plan.widths(family), strict=True)
    ]
    counts = [shape[0] * shape[2] * shape[3] for shape, width in shapes for _ in range(width)]
    return like.new_tensor(counts)


def _level_outputs(
    plan: Plan,
    groups: list[GroupState],
    offsets: list[Tensor],
    adaptations: list[tuple[Tensor, Tensor]],  # B (levels, Ct, Cs) and its bias (levels, Ct)
) -> tuple[list[LevelState], list[Tensor]]:
    """Return the states, and all levels' P, then U, W and v."""
    states, stacks = [], []
    for chosen, (weights, _) in zip(plan.levels, adaptations, strict=True):
        (s, o_s), (t, o_t) = (level_side(chosen, place, groups, offsets) for place in (chosen.student, chosen.teacher))
        states.append(LevelState(weights, torch.matmul(weights[:, None], s.matrices)))
        teacher, projection = t.matrices, t.theta
        if not chosen.low_rank:
            teacher = torch.bmm(teacher.flatten(1, 2), projection).unflatten(1, teacher.shape[1:3])
            projection = teacher.new_empty(len(chosen.levels), 0)
        student = torch.bmm(states[-1].relations.flatten(1, 2), s.theta).unflatten(1, (-1, weights.shape[1]))
        stacks.append((student, teacher, projection, torch.baddbmm(o_t, o_s, weights.mT, alpha=-1)))
    torch._foreach_add_([stack[0] for stack in stacks], [weights[:, None] for weights, _ in adaptations])
    torch._foreach_sub_([stack[3] for stack in stacks], [biases[:, None] for _, biases in adaptations])
    columns: list[dict[int, Tensor]] = [{} for _ in range(4)]
    for chosen, stack in zip(plan.levels, stacks, strict=True):
        for column, tensors in zip(columns, stack, strict=True):
            for level, tensor in zip(chosen.levels, tensors.unbind(), strict=True):
                column[level] = tensor
    return states, [column[level] for column in columns for level in range(count_blocks(plan) // 2)]
