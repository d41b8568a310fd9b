"""From a pyramid's maps and parameters to what its relation residuals are made of, with hand-written gradients.

Blocks of one width are computed together, whatever their level and side; what a norm does to each channel is computed
for the channels of all blocks, side by side. ``relation_plan.py`` decides which blocks go together,
``collapsed_non_local.py`` has the algebra of the blocks and ``_batch_norm.py`` that of the norms.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _batch_norm as norms
from .. import collapsed_non_local as algebra
from .._layout import in_place_layout
from .._numerics import without_autocast
from ..relation_plan import Family, Group, LevelGroup, Place, Plan, count_blocks, moment_rank
from .non_local_statistics import own_memory
from .ops import kernel

__all__ = ["BlockTensors", "CollapsedRelationFunction", "LevelOutputs"]


class BlockTensors(NamedTuple):
    """One map and its block."""

    x: Tensor  # (N, C, H, W)
    mean: Optional[Tensor]  # (N, C) over pixels, without gradient, in the accumulation dtype; None: not needed
    theta_weight: Tensor  # (c, C)
    theta_bias: Tensor  # (c,)
    phi_weight: Tensor
    phi_bias: Tensor
    g_weight: Tensor
    g_bias: Tensor
    out_weight: Tensor  # (C, c)
    out_bias: Optional[Tensor]  # (C,)
    norm_weight: Optional[Tensor]  # (C,)
    norm_bias: Optional[Tensor]
    running_mean: Optional[Tensor]  # of a norm that does not take the batch's moments
    running_variance: Optional[Tensor]


class LevelOutputs(NamedTuple):
    """What a level's residual ``t + U W t - P s + v`` is made of."""

    student: Tensor  # S, for whatever else reads it
    student_matrix: Tensor  # P (N, Ct, Cs)
    teacher_matrix: Tensor  # U (N, Ct, c), or (N, Ct, Ct)
    projection: Tensor  # W (c, Ct), or empty
    offset: Tensor  # v (N, Ct)


class _MapState(NamedTuple):
    x: Tensor  # (N, C, H, W)
    mean: Optional[Tensor]  # (N, C)
    winners: Tensor  # (N, 2c, K), empty where nothing is pooled


class _GroupState(NamedTuple):
    projections: Tensor  # (B, 3c, C), of theta, phi and g
    biases: Tensor  # (B, 3c)
    out_weights: Tensor  # (B, C, c)
    pooled: Optional[Tensor] = None  # (B, N, 2c, K), see algebra.pooled_pairs
    moments: Optional[Tensor] = None  # (B, N, 2 + r, C)
    probes: Optional[Tensor] = None  # (B, N, 2 + r, r), or (B, N, 1, c) without moments
    pairs: Optional[Tensor] = None  # (B, N, c, c)
    unscaled: Optional[Tensor] = None  # (B, N, c, C)
    matrices: Optional[Tensor] = None  # V (B, N, C, c)


class _Channels(NamedTuple):
    """Vectors of a family's blocks, side by side."""

    out_bias: Optional[Tensor]
    norm_weight: Optional[Tensor]
    norm_bias: Optional[Tensor]
    running_mean: Optional[Tensor]
    running_variance: Optional[Tensor]


class _FamilyState(NamedTuple):
    """All channels of a family's blocks, side by side."""

    values: Tensor  # (N, C), what the block adds to x = 0, before the norm
    offsets: Tensor  # (N, C), the same after the norm
    mean: Optional[Tensor] = None  # (C,), see norms.Fold
    inverse_deviation: Optional[Tensor] = None
    scale: Optional[Tensor] = None
    deviations: Optional[Tensor] = None  # (N, C), of each image's mean from all images'
    shared_deviations: Optional[Tensor] = None  # (C,), of this process' mean from all processes'
    shares: Optional[Tensor] = None  # (C,)


class _LevelState(NamedTuple):
    adaptations: Tensor  # B (levels, Ct, Cs)
    relations: Tensor  # B V_s (levels, N, Ct, cs)


def _theta(group: _GroupState) -> Tensor:
    """``(B, c, C)``."""
    return group.projections[:, : group.out_weights.shape[2]]


def _folded(family: _FamilyState) -> norms.Fold:
    return norms.Fold(family.mean, family.inverse_deviation, family.scale)


class _State(NamedTuple):
    """What the forward pass leaves for the backward pass."""

    maps: list[_MapState]  # by block
    groups: list[_GroupState]
    families: list[_FamilyState]
    levels: list[_LevelState]  # by group of levels


class CollapsedRelationFunction(torch.autograd.Function):
    """The fields of :class:`LevelOutputs`, each a tensor a level; then, without gradient, mean, variance and number of
    values ``(C,)`` of the families whose norms take the batch's moments.

    Backward needs a gradient of every level's matrices and offsets.
    """

    @staticmethod
    def forward(ctx, backend, plan, process_groups, *tensors):
        blocks, adaptations = _unpacked(plan, tensors)
        with without_autocast(blocks[0].x):
            state, levels, statistics = _forward(backend, plan, process_groups, blocks, adaptations)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(*(tensor for part in state for row in part for tensor in row))
        ctx.backend, ctx.plan, ctx.process_groups = backend, plan, process_groups
        ctx.shapes = _convolution_shapes(plan, tensors)
        width = len(BlockTensors._fields)
        ctx.wanted = [ctx.needs_input_grad[3 + width * block] for block in range(count_blocks(plan))]
        return (*levels, *statistics)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        plan, count = ctx.plan, count_blocks(ctx.plan) // 2
        state = _restored(plan, ctx.saved_tensors)
        end = len(LevelOutputs._fields) * count
        columns = LevelOutputs(*(list(grads[first : first + count]) for first in range(0, end, count)))
        # Not under the next line: dynamo asks for strides twice, and would leave autocast off in between.
        maps = _own_map_gradients(state, columns.student, ctx.wanted)
        with without_autocast(state.maps[0].x):
            gradients = _backward(ctx.backend, plan, ctx.process_groups, state, columns, maps)
        needed, found = ctx.needs_input_grad[3:], zip(gradients, ctx.shapes)
        found = [g if g is None or shape is None else g.view(shape) for g, shape in found]
        return None, None, None, *(g if wanted else None for g, wanted in zip(found, needed))


def _unpacked(plan: Plan, tensors: tuple) -> tuple[list[BlockTensors], list[tuple[Tensor, Tensor]]]:
    """Blocks with maps that the kernels can read, and weight and bias of each level's adaptation."""
    width = len(BlockTensors._fields)
    blocks = [BlockTensors(*tensors[width * block : width * (block + 1)]) for block in range(count_blocks(plan))]
    blocks = [block._replace(x=in_place_layout(block.x)) for block in blocks]
    rest = tensors[width * count_blocks(plan) :]
    return blocks, [tuple(rest[first : first + 2]) for first in range(0, len(rest), 2)]


def _convolution_shapes(plan: Plan, tensors: tuple) -> list[Optional[tuple[int, ...]]]:
    """Shapes of the weights that are no matrices ``(out, in)`` but ``(out, in, 1, 1)``; None for all other tensors."""
    width = len(BlockTensors._fields)
    end, shapes = width * count_blocks(plan), []
    for index, x in enumerate(tensors):
        is_map = index < end and index % width == 0
        shapes.append(None if is_map or x is None or x.dim() != 4 else tuple(x.shape))
    return shapes


def _restored(plan: Plan, saved: tuple) -> _State:
    """The state from its tensors, one after the other."""
    parts, first = [], 0
    counts = count_blocks(plan), len(plan.groups), len(plan.families), len(plan.levels)
    for row, count in zip((_MapState, _GroupState, _FamilyState, _LevelState), counts):
        width = len(row._fields)
        parts.append([row(*saved[first + width * index : first + width * (index + 1)]) for index in range(count)])
        first += width * count
    return _State(*parts)


def _side_by_side(rows: list[Tensor]) -> Tensor:
    """``(..., C)`` of several blocks as one."""
    return rows[0] if len(rows) == 1 else torch.cat(rows, dim=-1)


def _stacked(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _by_group(plan: Plan, vectors: list[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """What the families have for all channels, ``(..., C)``, as ``(B, ..., C)`` of each group."""
    parts = []
    for family, vector in zip(plan.families, vectors):
        members = [plan.groups[group] for group in family.groups]
        if vector is None:
            parts += [None] * len(members)
            continue
        pieces = vector.split([len(member.blocks) * member.channels for member in members], dim=-1)
        parts += [
            piece.unflatten(-1, (len(member.blocks), member.channels)).movedim(-2, 0)
            for piece, member in zip(pieces, members)
        ]
    return parts


# The forward pass.


def _forward(
    backend: str,
    plan: Plan,
    process_groups: list,
    blocks: list[BlockTensors],
    adaptations: list[tuple[Tensor, Tensor]],
) -> tuple[_State, list[Tensor], list[Tensor]]:
    """The state, all levels' outputs and all families' statistics."""
    groups, channels, adapted = _joined_parameters(plan, blocks, adaptations)
    maps, pooled, covariances = _map_statistics(backend, plan, blocks, groups)
    groups = _with_probes(plan, _with_statistics(plan, groups, maps, pooled, covariances), maps)
    groups = [_unscaled(member, group, maps) for member, group in zip(plan.groups, groups)]
    families, statistics = _normalised(plan, process_groups, groups, channels, maps)
    scales = _by_group(plan, [family.scale for family in families])
    groups = [g._replace(matrices=algebra.scaled_matrices(g.unscaled, scale)) for g, scale in zip(groups, scales)]
    offsets = _by_group(plan, [family.offsets for family in families])
    levels, outputs = _level_outputs(plan, groups, offsets, adapted)
    through = [block.x.view_as(block.x) for block in blocks[::2]]
    return _State(maps, groups, families, levels), through + outputs, statistics


def _joined_parameters(
    plan: Plan, blocks: list[BlockTensors], adaptations: list[tuple[Tensor, Tensor]]
) -> tuple[list[_GroupState], list[_Channels], list[tuple[Tensor, Tensor]]]:
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
            groups.append(_GroupState(*(next(found).view(-1, *shape) for shape in shapes)))
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
    """The elements of each list's tensors, one after the other."""
    elements = torch.cat([tensor.flatten() for tensors in lists for tensor in tensors]).to(dtype)
    return list(elements.split([sum(tensor.numel() for tensor in tensors) for tensors in lists]))


def _kernel_parameters(plan: Plan, groups: list[_GroupState]) -> tuple[list[Optional[Tensor]], ...]:
    """What the statistics' kernels take of each block: projection of the covariance, weight and bias of the pool."""
    parameters = [(None, None, None)] * count_blocks(plan)
    for member, group in zip(plan.groups, groups):
        absent = [None] * len(member.blocks)
        projections = group.projections[:, : moment_rank(member)].unbind() if member.projects else absent
        weights = group.projections[:, member.inner :].unbind() if member.pools else absent
        biases = group.biases[:, member.inner :].unbind() if member.pools else absent
        for block, *of_block in zip(member.blocks, projections, weights, biases):
            parameters[block] = of_block
    return tuple(list(column) for column in zip(*parameters))


def _map_statistics(
    backend: str, plan: Plan, blocks: list[BlockTensors], groups: list[_GroupState]
) -> tuple[list[_MapState], list[Tensor], list[Tensor]]:
    """The maps, and what one read of each gives: the pooled values and the covariances."""
    maps, means = [block.x for block in blocks], [block.mean for block in blocks]
    parameters = _kernel_parameters(plan, groups)
    outputs = kernel("non_local_statistics_forward", backend)(maps, means, *parameters, list(plan.pools))
    pooled, winners, covariances = (
        outputs[first : first + count_blocks(plan)] for first in range(0, 3 * count_blocks(plan), count_blocks(plan))
    )
    return [_MapState(*state) for state in zip(maps, means, winners)], pooled, covariances


class _Copies:
    """Copies into parts of new tensors, all made at once."""

    def __init__(self):
        self.parts, self.values, self.zeros = [], [], []

    def add(self, part: Tensor, value: Tensor) -> None:
        self.parts.append(part)
        self.values.append(value)

    def stack(self, values: list[Tensor]) -> Tensor:
        """The values ``(..., K)`` along a new first dimension, the shorter ones with zeros behind them."""
        if len(values) == 1:
            return values[0][None]
        longest = max(value.shape[-1] for value in values)
        stack = values[0].new_empty(len(values), *values[0].shape[:-1], longest)
        for part, value in zip(stack, values):
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
    plan: Plan, groups: list[_GroupState], maps: list[_MapState], pooled: list[Tensor], covariances: list[Tensor]
) -> list[_GroupState]:
    """The groups with what they pool, and with the moments of their maps where these are needed."""
    copies, results, unprojected = _Copies(), [], []
    for member, group in zip(plan.groups, groups):
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


def _with_probes(plan: Plan, groups: list[_GroupState], maps: list[_MapState]) -> list[_GroupState]:
    results, rows, biases = [], [], []
    for member, group in zip(plan.groups, groups):
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


def _unscaled(member: Group, group: _GroupState, maps: list[_MapState]) -> _GroupState:
    """The group with its pairs and its matrices before the norm."""
    if member.pools:
        pairs = algebra.pooled_pairs(group.pooled, _cells(member, maps))
    else:
        pairs = algebra.all_pairs(group.probes, member.inner)
    return group._replace(pairs=pairs, unscaled=algebra.unscaled_matrices(pairs, group.out_weights))


def _cells(member: Group, maps: list[_MapState]) -> list[int]:
    """K of each block."""
    return [maps[block].winners.shape[2] for block in member.blocks]


def _normalised(
    plan: Plan,
    process_groups: list,  # of each block
    groups: list[_GroupState],
    channels: list[_Channels],
    maps: list[_MapState],
) -> tuple[list[_FamilyState], list[Tensor]]:
    """The families with their norms folded, and the statistics of those that take the batch's moments."""
    values, local = [], []
    for family, own in zip(plan.families, channels):
        values.append(_channel_values(family, plan.groups, groups, own.out_bias))
        local.append(norms.batch_moments(*values[-1][1:]) if family.norm == "batch" else None)
    vectors = [
        (*moments[:2], _counts(plan, family, maps, moments[0])) if family.synchronizes else None
        for family, moments in zip(plan.families, local)
    ]
    shared = _over_processes(plan, process_groups, vectors, norms.shared_moments)
    families, statistics = [], []
    for family, own, (offsets, *_), moments, joint in zip(plan.families, channels, values, local, shared):
        if family.norm == "none":
            families.append(_FamilyState(offsets, offsets))
            continue
        mean, variance, deviations, rest = own.running_mean, own.running_variance, None, ()
        if family.norm == "batch":
            mean, variance, deviations = moments
            if joint is not None:
                mean, variance, counts, *rest = joint
            statistics += [mean, variance] if joint is None else [mean, variance, counts]
        folded = norms.fold(mean, variance, family.eps, own.norm_weight)
        normalised = norms.folded_offsets(folded, own.norm_bias, offsets)
        families.append(_FamilyState(offsets, normalised, *folded, deviations, *rest))
    return families, statistics


def _channel_values(
    family: Family, members: tuple[Group, ...], groups: list[_GroupState], out_bias: Optional[Tensor]
) -> list[Tensor]:
    """What the blocks add to x = 0, and for norms that take the batch's moments mean and variance of what they add to
    an image's pixels. Each ``(N, C)``, before the norm."""
    normalises = family.norm == "batch"
    own = [groups[index] for index in family.groups]
    values = [
        algebra.probe_values(algebra.theta_probes(group.probes, members[index].inner, normalises), group.unscaled)
        for index, group in zip(family.groups, own)
    ]
    results = _side_by_side([row for value in values for row in value[:, :, : 2 if normalises else 1].unbind()])
    if out_bias is not None:
        results = results + out_bias
    results = list(results.unbind(1))
    if normalises:
        # The diagonal of V Cov(theta) V^T.
        products = torch._foreach_mul([group.unscaled for group in own], [value[:, :, 2:] for value in values])
        results.append(_side_by_side([row for product in products for row in product.sum(dim=2).unbind()]))
    return results


def _counts(plan: Plan, family: Family, maps: list[_MapState], like: Tensor) -> Tensor:
    """Values of each channel in this process, ``(C,)``."""
    shapes = [(maps[block].x.shape, width) for block, width in zip(plan.order(family), plan.widths(family))]
    counts = [shape[0] * shape[2] * shape[3] for shape, width in shapes for _ in range(width)]
    return like.new_tensor(counts)


def _over_processes(plan: Plan, process_groups: list, vectors: list[Optional[tuple[Tensor, ...]]], function) -> list:
    """``function`` of vectors ``(C,)`` of all blocks of a process group, by family; None where there are none.

    The order of the blocks, unlike that of the families, is the same in all processes.
    """
    parts, results = {}, {}
    for family, own in zip(plan.families, vectors):
        if own is not None:
            pieces = (vector.split(plan.widths(family)) for vector in own)
            parts |= {block: columns for block, *columns in zip(plan.order(family), *pieces)}
    remaining = sorted(parts)
    while remaining:
        chosen = process_groups[remaining[0]]
        members = [block for block in remaining if process_groups[block] is chosen]
        remaining = [block for block in remaining if block not in members]
        outputs = function(*(torch.cat(column) for column in zip(*(parts[block] for block in members))), chosen)
        widths = [parts[block][0].shape[0] for block in members]
        pieces = (vector.split(widths) for vector in outputs)
        results |= {block: columns for block, *columns in zip(members, *pieces)}
    return [
        None
        if own is None
        else tuple(torch.cat(c).to(family.dtype) for c in zip(*(results[block] for block in plan.order(family))))
        for family, own in zip(plan.families, vectors)
    ]


def _level_outputs(
    plan: Plan,
    groups: list[_GroupState],
    offsets: list[Tensor],
    adaptations: list[tuple[Tensor, Tensor]],  # B (levels, Ct, Cs) and its bias (levels, Ct)
) -> tuple[list[_LevelState], list[Tensor]]:
    """The states, and all levels' P, then U, W and v."""
    states, stacks = [], []
    for chosen, (weights, _) in zip(plan.levels, adaptations):
        (s, o_s), (t, o_t) = (_side(chosen, place, groups, offsets) for place in (chosen.student, chosen.teacher))
        states.append(_LevelState(weights, torch.matmul(weights[:, None], s.matrices)))
        teacher, projection = t.matrices, t.theta
        if not chosen.low_rank:
            teacher = torch.bmm(teacher.flatten(1, 2), projection).unflatten(1, teacher.shape[1:3])
            projection = teacher.new_empty(len(chosen.levels), 0)
        student = torch.bmm(states[-1].relations.flatten(1, 2), s.theta).unflatten(1, (-1, weights.shape[1]))
        stacks.append((student, teacher, projection, torch.baddbmm(o_t, o_s, weights.mT, alpha=-1)))
    torch._foreach_add_([stack[0] for stack in stacks], [weights[:, None] for weights, _ in adaptations])
    torch._foreach_sub_([stack[3] for stack in stacks], [biases[:, None] for _, biases in adaptations])
    columns = [[None] * (count_blocks(plan) // 2) for _ in range(4)]
    for chosen, stack in zip(plan.levels, stacks):
        for column, tensors in zip(columns, stack):
            for level, tensor in zip(chosen.levels, tensors.unbind()):
                column[level] = tensor
    return states, [tensor for column in columns for tensor in column]


class _Side(NamedTuple):
    """One side of a group of levels."""

    matrices: Tensor  # V (levels, N, C, c)
    theta: Tensor  # (levels, c, C)


def _side(chosen: LevelGroup, place: Place, groups: list[_GroupState], offsets: list[Tensor]) -> tuple[_Side, Tensor]:
    """Also the blocks' offsets ``(levels, N, C)``."""
    blocks = slice(place.first, place.first + len(chosen.levels))
    group = groups[place.group]
    return _Side(group.matrices[blocks], _theta(group)[blocks]), offsets[place.group][blocks]


# The backward pass.


class _SideGradients(NamedTuple):
    """One side of a group of levels."""

    matrices: Tensor  # of V (levels, N, C, c)
    theta: Tensor  # of theta's weight, where it is a factor beside V (levels, c, C)
    offsets: Tensor  # (levels, N, C)


class _GroupGradients(NamedTuple):
    projections: Tensor  # (B, r, C): of the pooled convolutions only where the kernel does not give them
    out_weights: Tensor  # (B, C, c)
    probes: Tensor  # (B, N, rows, r)
    pooled: Optional[Tensor]  # (B, N, 2c, K)


class _FamilyGradients(NamedTuple):
    out_bias: Tensor  # (C,)
    norm_weight: Optional[Tensor]  # (C,)
    norm_bias: Tensor  # (C,)
    values: list[Tensor]  # (N, C), of the values of theta's bias and, beside moments, of theta's mean
    variances: Optional[Tensor] = None  # (C,), twice that of an image's variance


def _backward(
    backend: str,
    plan: Plan,
    process_groups: list,
    state: _State,
    grads: LevelOutputs,  # of lists
    maps: list[Optional[Tensor]],  # see _own_map_gradients
) -> list[Optional[Tensor]]:
    """Gradients in the order of the function's tensors."""
    offsets = _by_group(plan, [family.offsets for family in state.families])
    sides, adaptations = [[] for _ in plan.groups], []
    for chosen, level, stacks in zip(plan.levels, state.levels, _stacked_gradients(plan, grads)):
        student, teacher, weights = _level_gradients(chosen, level, state.groups, offsets, *stacks)
        sides[chosen.student.group].append(student)
        sides[chosen.teacher.group].append(teacher)
        adaptations.append(weights)
    matrices = [_stacked([side.matrices for side in of_group]) for of_group in sides]
    families = _family_gradients(plan, process_groups, state, sides, matrices)
    groups = _group_gradients(plan, state, sides, matrices, families)
    weights = _finish_map_gradients(backend, plan, state, groups, maps)
    blocks = _block_gradients(plan, groups, families, maps, weights)
    return [x for block in blocks for x in block] + _adaptation_gradients(plan, adaptations, families)


def _stacked_gradients(plan: Plan, grads: LevelOutputs) -> list[tuple[Optional[Tensor], ...]]:
    """Those of P, U, W and v of each group of levels, ``(levels, ...)``, with one copy for all that are not alone."""
    stacks, slots, values = [], [], []
    for chosen in plan.levels:
        columns = [[column[level] for level in chosen.levels] for column in grads[1:]]
        stack = []
        for column in columns:
            if column[0] is None or len(column) == 1:
                stack.append(None if column[0] is None else column[0][None])
                continue
            stack.append(column[0].new_empty(len(column), *column[0].shape))
            slots += stack[-1].unbind()
            values += column
        stacks.append(tuple(stack))
    if slots:
        torch._foreach_copy_(slots, values)
    return stacks


def _level_gradients(
    chosen: LevelGroup,
    level: _LevelState,
    groups: list[_GroupState],
    offsets: list[Tensor],
    student_matrix: Tensor,  # of P (levels, N, Ct, Cs)
    teacher_matrix: Tensor,  # of U (levels, N, Ct, c), or of U W (levels, N, Ct, Ct)
    projection: Optional[Tensor],  # of W (levels, c, Ct)
    offset: Tensor,  # of v (levels, N, Ct)
) -> tuple[_SideGradients, _SideGradients, Tensor]:
    """Of the student's side, of the teacher's and of B ``(levels, Ct, Cs)``."""
    (s, o_s), (t, _) = (_side(chosen, place, groups, offsets) for place in (chosen.student, chosen.teacher))
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
        return student, _SideGradients(teacher_matrix, projection, offset), weights
    rows = teacher_matrix.flatten(1, 2)
    matrices = torch.bmm(rows, t.theta.mT).unflatten(1, teacher_matrix.shape[1:3])
    return student, _SideGradients(matrices, torch.bmm(t.matrices.flatten(1, 2).mT, rows), offset), weights


def _family_gradients(
    plan: Plan, process_groups: list, state: _State, sides: list[list[_SideGradients]], matrices: list[Tensor]
) -> list[_FamilyGradients]:
    rows, shifts, weights, moments = [], [], [], []
    for family, own in zip(plan.families, state.families):
        of_blocks = [row for index in family.groups for side in sides[index] for row in side.offsets.unbind()]
        rows.append(_side_by_side(of_blocks))  # (N, C)
        shifts.append(rows[-1].sum(dim=0))
        weights.append(None)
        moments.append(None)
        if family.norm == "none":
            continue
        # Each image's part of the scales' gradient.
        parts = torch._foreach_mul(
            [matrices[index] for index in family.groups], [state.groups[index].unscaled.mT for index in family.groups]
        )
        of_images = _side_by_side([row for part in parts for row in part.sum(dim=3).unbind()])
        scale = torch.addcmul(of_images, rows[-1], own.values).sum(dim=0)
        weights[-1] = norms.weight_gradient(_folded(own), scale, shifts[-1])
        if family.norm == "batch":
            moments[-1] = norms.moment_gradients(_folded(own), weights[-1], shifts[-1], rows[-1].shape[0])
    moments = _shared_gradients(plan, process_groups, state.families, moments)
    return [_channel_gradients(own, *columns) for own, *columns in zip(state.families, rows, shifts, weights, moments)]


def _shared_gradients(
    plan: Plan, process_groups: list, families: list[_FamilyState], moments: list[Optional[tuple[Tensor, Tensor]]]
) -> list[Optional[tuple[Tensor, Tensor]]]:
    """The gradients of the moments, after those of moments that several processes share have been added up."""
    joint = [family.synchronizes for family in plan.families]
    if not any(joint):
        return moments
    images = [max(family.values.shape[0], 1) for family in families]
    vectors = [
        (own[0] * count, own[1] * (count / 2), family.shared_deviations, family.shares) if shares else None
        for own, family, count, shares in zip(moments, families, images, joint)
    ]
    found = _over_processes(plan, process_groups, vectors, norms.shared_moment_gradients)
    return [
        own if new is None else (new[0] / count, new[1] * (2 / count))
        for own, new, count in zip(moments, found, images)
    ]


def _channel_gradients(
    own: _FamilyState,
    row: Tensor,  # of the offsets (N, C)
    shift: Tensor,  # (C,)
    weight: Optional[Tensor],  # (C,)
    moments: Optional[tuple[Tensor, Tensor]],  # see norms.moment_gradients
) -> _FamilyGradients:
    if own.scale is None:
        return _FamilyGradients(shift, None, shift, [row])
    values, out_bias = row * own.scale, shift * own.scale
    if moments is None:
        return _FamilyGradients(out_bias, weight, shift, [values])
    mean, variance = moments
    images = torch.addcmul(mean, variance, own.deviations)  # (N, C)
    # A constant is subtracted again by the norm: what is left is what other processes' losses ask for.
    out_bias = torch.add(out_bias, mean, alpha=row.shape[0])
    return _FamilyGradients(out_bias, weight, shift, [values, images], variance)


def _group_gradients(
    plan: Plan,
    state: _State,
    sides: list[list[_SideGradients]],
    matrices: list[Tensor],
    families: list[_FamilyGradients],
) -> list[_GroupGradients]:
    scales = _by_group(plan, [family.scale for family in state.families])
    variances = _by_group(plan, [family.variances for family in families])
    values = [_by_group(plan, [family.values[0] for family in families])]
    values.append(_by_group(plan, [family.values[1] if len(family.values) > 1 else None for family in families]))
    through = _products([matrix.mT for matrix in matrices], [x if x is None else x[:, None, None] for x in scales])
    weighted = _products(
        [None if x is None else group.unscaled for group, x in zip(state.groups, variances)],
        [x if x is None else x[:, None, None] for x in variances],
    )
    results = []
    for index, (member, group) in enumerate(zip(plan.groups, state.groups)):
        rows = [column[index][:, :, None] for column in values if column[index] is not None] + [weighted[index]]
        rows = [row for row in rows if row is not None]
        of_theta = algebra.theta_probes(group.probes, member.inner, len(rows) > 1)
        found = algebra.unscaled_gradients(
            through[index], rows, group.unscaled, of_theta, group.pairs, group.out_weights
        )
        probes, projections = found.probes, _stacked([side.theta for side in sides[index]])
        if not member.pools:
            probes = algebra.all_pairs_gradient(probes, found.pairs, group.probes, member.inner)
        if member.takes_moments:
            projections = algebra.projection_gradients(projections, probes, group.moments)
        pooled = None
        if member.pools:
            pooled = algebra.pooled_gradients(found.pairs, group.pooled, _cells(member, state.maps))
        results.append(_GroupGradients(projections, found.out_weights, probes, pooled))
    return results


def _products(left: list[Optional[Tensor]], right: list[Optional[Tensor]]) -> list[Optional[Tensor]]:
    """Elementwise; where a right one is None, the left one."""
    chosen = [index for index, factor in enumerate(right) if factor is not None]
    results = list(left)
    if chosen:
        found = torch._foreach_mul([left[index] for index in chosen], [right[index] for index in chosen])
        for index, product in zip(chosen, found):
            results[index] = product
    return results


def _own_map_gradients(state: _State, students: list[Optional[Tensor]], wanted: list[bool]) -> list[Optional[Tensor]]:
    """What flows into each block's map from elsewhere, in memory that may be changed; None where nobody wants it."""
    incoming = [grad for student in students for grad in (student, None)]
    return [own_memory(grad, map.x) if want else None for grad, map, want in zip(incoming, state.maps, wanted)]


def _finish_map_gradients(
    backend: str, plan: Plan, state: _State, groups: list[_GroupGradients], gradients: list[Optional[Tensor]]
) -> list[Tensor]:
    """Add to each map's gradient in place; return that of the pooled weights ``(2c, C)``. One read of each map."""
    maps, means, winners = map(list, zip(*state.maps))
    projections, weights, _ = _kernel_parameters(plan, state.groups)
    inner, shifts, pooled = ([None] * count_blocks(plan) for _ in range(3))
    for member, group, found in zip(plan.groups, state.groups, groups):
        for slot, block in enumerate(member.blocks if member.takes_moments else ()):
            if gradients[block] is not None:
                inner[block], shifts[block] = algebra.map_gradient(
                    found.probes[slot],
                    group.projections[slot, : moment_rank(member)],
                    maps[block].shape[2] * maps[block].shape[3],
                    member.projects,
                )
        for slot, block in enumerate(member.blocks if member.pools else ()):
            pooled[block] = found.pooled[slot, :, :, : winners[block].shape[2]].contiguous()
    if backend == "cpu":  # whose op takes no strides
        inner, shifts = ([x if x is None else x.contiguous() for x in column] for column in (inner, shifts))
    own = [x.new_empty(0) if grad is None else grad for grad, x in zip(gradients, maps)]
    own = own if any(grad is not None for grad in gradients) else []
    # Outputs that the op fills: torch.compile takes no op that changes some arguments and returns others.
    filled = [x.new_empty(0) if weight is None else torch.empty_like(weight) for x, weight in zip(maps, weights)]
    arguments = maps, means, projections, inner, shifts, weights, winners, pooled, list(plan.pools)
    kernel("non_local_statistics_backward_", backend)(own, filled, *arguments)
    return filled


def _block_gradients(
    plan: Plan,
    groups: list[_GroupGradients],
    families: list[_FamilyGradients],
    maps: list[Optional[Tensor]],
    weights: list[Tensor],  # of what is pooled (2c, C)
) -> list[BlockTensors]:
    biases = _bias_gradients(plan, groups)
    vectors = zip(*(_by_group(plan, list(column)) for column in zip(*(family[:3] for family in families))))
    blocks = [None] * count_blocks(plan)
    for member, group, columns in zip(plan.groups, groups, vectors):
        stacks, outs = group.projections.unbind(), group.out_weights.unbind()
        norms_of_blocks = zip(*([None] * len(stacks) if column is None else column.unbind() for column in columns))
        pooled = group.pooled.sum((1, 3)).unbind() if member.pools else None  # (2c,) each
        for slot, (block, norm) in enumerate(zip(member.blocks, norms_of_blocks)):
            if member.pools:  # theta apart from phi and g
                weight = stacks[slot], *weights[block].split(member.inner)
                bias = biases[block], *pooled[slot].split(member.inner)
            else:
                weight, bias = stacks[slot].split(member.inner), biases[block].split(member.inner)
            layers = [x for layer in zip(weight, bias) for x in layer]
            blocks[block] = BlockTensors(maps[block], None, *layers, outs[slot], *norm, None, None)
    return blocks


def _bias_gradients(plan: Plan, groups: list[_GroupGradients]) -> list[Tensor]:
    """Of the projections' biases, ``(r,)`` of each block."""
    biases = [None] * count_blocks(plan)
    for family in plan.families:
        members = [
            (slot, block, index) for index in family.groups for slot, block in enumerate(plan.groups[index].blocks)
        ]
        total = _side_by_side([groups[index].probes[slot, :, :2] for slot, _, index in members]).sum((0, 1))
        ranks = [groups[index].probes.shape[3] for _, _, index in members]
        for (_, block, _), bias in zip(members, total.split(ranks)):
            biases[block] = bias
    return biases


def _adaptation_gradients(plan: Plan, weights: list[Tensor], families: list[_FamilyGradients]) -> list[Tensor]:
    """Of weight and bias of each level in turn."""
    shifts = _by_group(plan, [family.norm_bias.neg() for family in families])
    gradients = [None] * count_blocks(plan)
    for chosen, weight in zip(plan.levels, weights):
        for slot, level in enumerate(chosen.levels):
            bias = shifts[chosen.teacher.group][chosen.teacher.first + slot]
            gradients[2 * level : 2 * level + 2] = weight[slot], bias
    return gradients
