"""Forward pass of the collapsed relation."""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.registry import kernel
from . import batch_norm as norms
from . import collapsed_algebra as algebra
from .collapsed_state import (
    BlockTensors,
    FamilyState,
    GroupState,
    LevelState,
    MapState,
    State,
    by_group,
    cells_of,
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


def collapsed_outputs(
    backend: str,
    plan: Plan,
    process_groups: list,
    blocks: list[BlockTensors],
    adaptations: list[tuple[Tensor, Tensor]],
) -> tuple[State, list[Tensor], list[Tensor]]:
    """Return the state, all levels' outputs and all families' statistics."""
    groups, channels, adapted = _joined_parameters(plan, blocks, adaptations)
    maps, pooled, covariances = _map_statistics(backend, plan, blocks, groups)
    groups = _with_probes(plan, _with_statistics(plan, groups, maps, pooled, covariances), maps)
    groups = [_unscaled(member, group, maps) for member, group in zip(plan.groups, groups, strict=True)]
    families, statistics = _normalised(plan, process_groups, groups, channels, maps)
    scales = by_group(plan, [family.scale for family in families])
    groups = [
        g._replace(matrices=algebra.scaled_matrices(g.unscaled, scale)) for g, scale in zip(groups, scales, strict=True)
    ]
    offsets = by_group(plan, [family.offsets for family in families])
    levels, outputs = _level_outputs(plan, groups, offsets, adapted)
    through = [block.x.view_as(block.x) for block in blocks[::2]]
    return State(maps, groups, families, levels), through + outputs, statistics


def _joined_parameters(
    plan: Plan, blocks: list[BlockTensors], adaptations: list[tuple[Tensor, Tensor]]
) -> tuple[list[GroupState], list[_Channels], list[tuple[Tensor, Tensor]]]:
    """Parameters of the groups and of the families, and weights and biases of the groups of levels.

    A family's lie in one piece of memory: one copy instead of one a stack.
    """
    groups, families, adapted = [], [], [None] * len(plan.levels)
    for family in plan.families:
        order = [blocks[block] for block in plan.order(family)]
        vectors = [[block[field] for block in order] for field in range(-len(_Channels._fields), 0)]
        members = [plan.groups[group] for group in family.groups]
        levels = [index for index, level in enumerate(plan.levels) if level.teacher.group in family.groups]
        stacks = [stack for member in members for stack in _stacks([blocks[block] for block in member.blocks])]
        stacks += [
            [adaptations[level][part] for level in plan.levels[index].levels] for index in levels for part in (0, 1)
        ]
        found = iter(_joined([column for column in vectors if column[0] is not None] + stacks, family.dtype))
        families.append(_Channels(*(None if column[0] is None else next(found) for column in vectors)))
        for channels, inner in ((member.channels, member.inner) for member in members):
            shapes = (3 * inner, channels), (3 * inner,), (channels, inner)
            groups.append(GroupState(*(next(found).view(-1, *shape) for shape in shapes)))
        for index in levels:
            to, width = (plan.groups[place.group].channels for place in (plan.levels[index][2], plan.levels[index][1]))
            adapted[index] = next(found).view(-1, to, width), next(found).view(-1, to)
    return groups, families, adapted


def _stacks(group: list[BlockTensors]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Projections, biases and output weights of a group's blocks."""
    weights = [weight for block in group for weight in (block.theta_weight, block.phi_weight, block.g_weight)]
    biases = [bias for block in group for bias in (block.theta_bias, block.phi_bias, block.g_bias)]
    return weights, biases, [block.out_weight for block in group]


def _joined(lists: list[list[Tensor]], dtype: torch.dtype) -> list[Tensor]:
    """Return the elements of each list's tensors, one after the other."""
    elements = torch.cat([tensor.flatten() for tensors in lists for tensor in tensors]).to(dtype)
    return list(elements.split([sum(tensor.numel() for tensor in tensors) for tensors in lists]))


def _map_statistics(
    backend: str, plan: Plan, blocks: list[BlockTensors], groups: list[GroupState]
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

    def __init__(self):
        self.parts, self.values, self.zeros = [], [], []

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


def _with_statistics(
    plan: Plan, groups: list[GroupState], maps: list[MapState], pooled: list[Tensor], covariances: list[Tensor]
) -> list[GroupState]:
    """Return the groups with their pooled values, and with the moments of their maps where these are needed."""
    copies, results, unprojected = _Copies(), [], []
    for member, group in zip(plan.groups, groups, strict=True):
        if member.pools:
            group = group._replace(pooled=copies.stack([pooled[block] for block in member.blocks]))
        if member.takes_moments:
            shape = len(member.blocks), maps[member.blocks[0]].x.shape[0], 2 + moment_rank(member), member.channels
            group = group._replace(moments=group.projections.new_empty(shape))
            copies.zeros.append(group.moments[:, :, 0])
            for slot, block in enumerate(member.blocks):
                copies.add(group.moments[slot, :, 1], maps[block].mean)
                if member.projects:
                    copies.add(group.moments[slot, :, 2:], covariances[block])
            if not member.projects:
                unprojected.append((member, group, copies.stack([covariances[block] for block in member.blocks])))
        results.append(group)
    copies.run()
    for member, group, stack in unprojected:
        algebra.fill_covariances(group.moments[:, :, 2:], group.projections[:, : moment_rank(member)], stack)
    return results


def _with_probes(plan: Plan, groups: list[GroupState], maps: list[MapState]) -> list[GroupState]:
    results, rows, biases = [], [], []
    for member, group in zip(plan.groups, groups, strict=True):
        if group.moments is None:
            images = maps[member.blocks[0]].x.shape[0]
            probes = group.biases[:, None, None, : member.inner].expand(-1, images, -1, -1)
        else:
            probes = algebra.project_moments(group.moments, group.projections[:, : moment_rank(member)])
            rows.append(probes[:, :, :2])
            biases.append(group.biases[:, None, None, : moment_rank(member)])
        results.append(group._replace(probes=probes))
    if rows:
        torch._foreach_add_(rows, biases)
    return results


def _unscaled(member: Group, group: GroupState, maps: list[MapState]) -> GroupState:
    """Return the group with its pairs and its matrices before the norm."""
    if member.pools:
        pairs = algebra.pooled_pairs(group.pooled, cells_of(member, maps))
    else:
        pairs = algebra.all_pairs(group.probes, member.inner)
    return group._replace(pairs=pairs, unscaled=algebra.unscaled_matrices(pairs, group.out_weights))


def _normalised(
    plan: Plan,
    process_groups: list,  # of each block
    groups: list[GroupState],
    channels: list[_Channels],
    maps: list[MapState],
) -> tuple[list[FamilyState], list[Tensor]]:
    """Return the families with their norms folded, and the statistics of those that take the batch's moments."""
    values, local = [], []
    for family, own in zip(plan.families, channels, strict=True):
        values.append(_channel_values(family, plan.groups, groups, own.out_bias))
        local.append(norms.batch_moments(*values[-1][1:]) if family.norm == "batch" else None)
    vectors = [
        (*moments[:2], _counts(plan, family, maps, moments[0])) if family.synchronizes else None
        for family, moments in zip(plan.families, local, strict=True)
    ]
    shared = over_processes(plan, process_groups, vectors, norms.shared_moments)
    families, statistics = [], []
    for family, own, (offsets, *_), moments, joint in zip(plan.families, channels, values, local, shared, strict=True):
        if family.norm == "none":
            families.append(FamilyState(offsets, offsets))
            continue
        mean, variance, deviations, rest = own.running_mean, own.running_variance, None, ()
        if family.norm == "batch":
            mean, variance, deviations = moments
            if joint is not None:
                mean, variance, counts, *rest = joint
            statistics += [mean, variance] if joint is None else [mean, variance, counts]
        folded = norms.fold(mean, variance, family.eps, own.norm_weight)
        normalised = norms.folded_offsets(folded, own.norm_bias, offsets)
        families.append(FamilyState(offsets, normalised, *folded, deviations, *rest))
    return families, statistics


def _channel_values(
    family: Family, members: tuple[Group, ...], groups: list[GroupState], out_bias: Tensor | None
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
    results = side_by_side([row for value in values for row in value[:, :, : 2 if normalises else 1].unbind()])
    if out_bias is not None:
        results = results + out_bias
    results = list(results.unbind(1))
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
    columns = [[None] * (count_blocks(plan) // 2) for _ in range(4)]
    for chosen, stack in zip(plan.levels, stacks, strict=True):
        for column, tensors in zip(columns, stack, strict=True):
            for level, tensor in zip(chosen.levels, tensors.unbind(), strict=True):
                column[level] = tensor
    return states, [tensor for column in columns for tensor in column]
