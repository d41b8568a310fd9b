"""From a pyramid's maps and parameters to what its relation residuals are made of, with hand-written gradients.

Blocks of one width are computed together, whatever their level and side; what a norm does to each channel is computed
for the channels of all blocks, side by side. ``plan.py`` decides which blocks go together,
``collapsed_algebra.py`` has the algebra of the blocks and ``batch_norm.py`` that of the norms. The two passes are in
``collapsed_forward.py`` and ``collapsed_backward.py``.
"""

import torch
from torch import Tensor

from .._layout import in_place_layout
from .._numerics import without_autocast
from ..autograd.first_order import first_order, save
from .collapsed_backward import collapsed_gradients, own_map_gradients
from .collapsed_forward import collapsed_outputs
from .collapsed_state import (
    BlockTensors,
    FamilyState,
    GroupState,
    LevelGradients,
    LevelOutputs,
    LevelState,
    MapState,
    State,
)
from .plan import Plan, count_blocks

__all__ = ["BlockTensors", "CollapsedRelationFunction", "LevelOutputs"]


class CollapsedRelationFunction(torch.autograd.Function):
    """The fields of :class:`LevelOutputs`, each a tensor per level, then the batch's statistics.

    These are mean, variance and number of values ``(C,)`` of the families whose norms take them; without gradient.

    Backward needs a gradient of every level's matrices and offsets.
    """

    @staticmethod
    def forward(ctx, backend, plan, process_groups, *tensors):
        blocks, adaptations = _unpacked(plan, tensors)
        with without_autocast(blocks[0].x):
            state, levels, statistics = collapsed_outputs(backend, plan, process_groups, blocks, adaptations)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*statistics)
        save(ctx, (tensor for part in state for row in part for tensor in row), tensors)
        ctx.backend, ctx.plan, ctx.process_groups = backend, plan, process_groups
        ctx.shapes = _convolution_shapes(plan, tensors)
        width = len(BlockTensors._fields)
        ctx.wanted = [ctx.needs_input_grad[3 + width * block] for block in range(count_blocks(plan))]
        return (*levels, *statistics)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        plan, count = ctx.plan, count_blocks(ctx.plan) // 2
        state = _restored(plan, ctx.saved_tensors)
        end = len(LevelOutputs._fields) * count
        columns = LevelGradients(*(list(grads[first : first + count]) for first in range(0, end, count)))
        # Not under the next line: dynamo asks for strides twice, and would leave autocast off in between.
        maps = own_map_gradients(state, columns.students, ctx.wanted)
        with without_autocast(state.maps[0].x):
            gradients = collapsed_gradients(ctx.backend, plan, ctx.process_groups, state, columns, maps)
        needed, found = ctx.needs_input_grad[3:], zip(gradients, ctx.shapes, strict=True)
        found = [g if g is None or shape is None else g.view(shape) for g, shape in found]
        return None, None, None, *(g if wanted else None for g, wanted in zip(found, needed, strict=True))


def _unpacked(plan: Plan, tensors: tuple) -> tuple[list[BlockTensors], list[tuple[Tensor, Tensor]]]:
    """Blocks with maps that the kernels can read, and weight and bias of each level's adaptation."""
    width = len(BlockTensors._fields)
    blocks = [BlockTensors(*tensors[width * block : width * (block + 1)]) for block in range(count_blocks(plan))]
    blocks = [block._replace(x=in_place_layout(block.x)) for block in blocks]
    rest = tensors[width * count_blocks(plan) :]
    return blocks, [tuple(rest[first : first + 2]) for first in range(0, len(rest), 2)]


def _convolution_shapes(plan: Plan, tensors: tuple) -> list[tuple[int, ...] | None]:
    """Shapes of the weights that are no matrices ``(out, in)`` but ``(out, in, 1, 1)``; None for all other tensors."""
    width = len(BlockTensors._fields)
    end, shapes = width * count_blocks(plan), []
    for index, x in enumerate(tensors):
        is_map = index < end and index % width == 0
        shapes.append(None if is_map or x is None or x.dim() != 4 else tuple(x.shape))
    return shapes


def _restored(plan: Plan, saved: tuple) -> State:
    """Return the state from its tensors, one after the other."""
    counts = count_blocks(plan), len(plan.groups), len(plan.families), len(plan.levels)
    widths = [len(row._fields) for row in (MapState, GroupState, FamilyState, LevelState)]
    rows, first = [], 0
    for width, count in zip(widths, counts, strict=True):
        rows.append([saved[first + width * index : first + width * (index + 1)] for index in range(count)])
        first += width * count
    maps, groups, families, levels = rows
    return State(
        [MapState(*row) for row in maps],
        [GroupState(*row) for row in groups],
        [FamilyState(*row) for row in families],
        [LevelState(*row) for row in levels],
    )
