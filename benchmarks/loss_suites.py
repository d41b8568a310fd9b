"""The suites with non-local blocks: ``non_local``, one block by itself, ``relation``, one level's relation term, and
``fbkd_loss``, all terms of a pyramid.

Their inputs are the students' maps, the teachers' and the parameters of ``FBKDLoss`` in its order; a block's are its
map and its parameters. An implementation is a module that is called with those parameters in place of its own.
BatchNorm is in training mode, and its parameters are random: where they are 0, as at first, a non-local block is the
identity.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

import fbkd_ops
from benchmarks import mmrazor
from benchmarks.inputs import LEVELS, TOLERANCES, Case, Cost, Implementation, Suite, forced
from fbkd_ops.presets import PRESETS
from fbkd_ops.weights.mmrazor import load_connectors
from fbkd_ops.weights.non_local import load_non_local

STRIDES = PRESETS["mmrazor"]["stride"]  # of P2..P5
# Of each pooling factor: the ratio of the inner width; without pooling as at P2 and P3.
RATIOS = {1: 0.25} | dict(zip(STRIDES, PRESETS["mmrazor"]["inter_channels"], strict=True))

# As under AMP: float16 holds the gradients of features only of a loss so enlarged.
LOSS_SCALE = 2.0**13
# Behind a BatchNorm the terms of a bias's gradient cancel: the literal formula comes out up to 1e-3 off in float32.
LOSS_TOLERANCES = TOLERANCES | {"float32": 5e-3}


class RelationTerm(nn.Module):
    """The relation term, unweighted, of a loss's only level."""

    def __init__(self, loss: fbkd_ops.FBKDLoss):
        super().__init__()
        (level,) = loss.levels
        self.student_non_local, self.teacher_non_local = level.student_non_local, level.teacher_non_local
        self.adaptation, self.memory_efficient = level.relation_adaptation, loss.memory_efficient

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        blocks = self.student_non_local, self.teacher_non_local
        return fbkd_ops.functional.relation_loss(
            *students,
            *teachers,
            *(block.weights() for block in blocks),
            self.adaptation.weight.flatten(1),
            self.adaptation.bias,
            stride=blocks[0].stride,
            pool_order=blocks[0].pool_order,
            student_norm=blocks[0].norm,
            teacher_norm=blocks[1].norm,
            memory_efficient=self.memory_efficient,
        )


class Total(nn.Module):
    """The sum of a loss's four terms."""

    def __init__(self, loss: fbkd_ops.FBKDLoss):
        super().__init__()
        self.loss = loss

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> Tensor:
        return sum(self.loss(students, teachers).values())


def loss_of(case: Case, memory_efficient: bool = False) -> fbkd_ops.FBKDLoss:
    levels = dict(
        num_levels=len(case.strides),
        stride=list(case.strides),
        inter_channels=[RATIOS[stride] for stride in case.strides],
    )
    return fbkd_ops.FBKDLoss(case.shape[1], preset="mmrazor", memory_efficient=memory_efficient, **levels).to(
        case.device
    )


def their_loss_of(case: Case) -> mmrazor.Loss:
    reductions = [round(1 / RATIOS[stride]) for stride in case.strides]
    return mmrazor.Loss(case.shape[1], case.strides, reductions).to(case.device)


def _inputs(part: type[nn.Module]) -> Callable[[Case], list[Tensor]]:
    """Students, teachers and parameters.

    All values are on grids that make the projections exact in float32. So the max-pools of every implementation have
    the same winners, however it rounds; else one that came out differently would look like a mistake.
    """

    def inputs(case: Case) -> list[Tensor]:
        students, teachers = ([(8 * x).round() / 8 for x in case.pyramid(seed)] for seed in (0, 1))
        parameters = _grid_parameters(part(loss_of(case)), case)
        return [*(x.requires_grad_() for x in students), *teachers, *parameters]

    return inputs


def _grid_parameters(module: nn.Module, case: Case) -> list[Tensor]:
    """Random values for the parameters of ``module``, on the grid."""
    generator, values = torch.Generator().manual_seed(3), []
    for parameter in module.parameters():
        value = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1:
            value = value / parameter[0].numel() ** 0.5
        values.append(((64 * value).round() / 64).to(case.device, case.parameter_dtype).requires_grad_())
    return values


def _called(module: nn.Module, names: list[str], levels: int, dtype: torch.dtype | None = None) -> Implementation:
    """``module`` as a function of the inputs: ``names`` are its parameters' in their order, ``dtype`` the only one that
    it takes maps in."""

    def function(*tensors: Tensor) -> Tensor:
        maps, parameters = tensors[: 2 * levels], tensors[2 * levels :]
        maps = [x if dtype is None else x.to(dtype) for x in maps]
        named = dict(zip(names, parameters, strict=True))
        return LOSS_SCALE * functional_call(module, named, (maps[:levels], maps[levels:]))

    return function


def _ours(part: type[nn.Module], backend: str, memory_efficient: bool = False) -> Callable[[Case], Implementation]:
    def made(case: Case) -> Implementation:
        module = part(loss_of(case, memory_efficient))
        names = [name for name, _ in module.named_parameters()]
        function = _called(module, names, len(case.strides))
        return function if backend == "auto" else forced(function, backend)

    return made


def _theirs(part: type[nn.Module], their_part: Callable[[mmrazor.Loss], nn.Module]) -> Callable[[Case], Implementation]:
    """MMRazor's, with its parameters in the order of ours."""

    def made(case: Case) -> Implementation:
        ours, theirs = loss_of(case), their_loss_of(case)
        module = their_part(theirs)
        names = _counterparts(part(ours), module, lambda: load_connectors(ours, theirs.student, theirs.teacher))
        dtype = case.parameter_dtype
        return _called(module.to(dtype), names, len(case.strides), dtype)

    return made


def _counterparts(ours: nn.Module, theirs: nn.Module, copy: Callable[[], None]) -> list[str]:
    """Names of their parameters in the order of ours: ``copy`` takes theirs over, equal ones belong together."""
    for parameter in theirs.parameters():
        nn.init.normal_(parameter)
    copy()

    def of(own: Tensor) -> str:
        return next(name for name, x in theirs.named_parameters() if x.shape == own.shape and torch.equal(x, own))

    return [of(parameter) for parameter in ours.parameters()]


def _implementations(part: type[nn.Module], their_part: Callable[[mmrazor.Loss], nn.Module]) -> dict:
    return {
        "mmrazor": _theirs(part, their_part),
        "reference": _ours(part, "reference"),
        "fbkd_ops": _ours(part, "auto"),
        "fbkd_ops:memory_efficient": _ours(part, "auto", memory_efficient=True),
    }


def _cost(part: type[nn.Module], adaptations: int) -> Callable[[Case], Cost]:
    """Forward reads both maps, backward reads them again and writes dS; parameters are read twice and written once.

    Beside the relation term's products each of the ``adaptations`` has one product forward and two backward.
    """

    def cost(case: Case) -> Cost:
        flops = [0, 0]
        for (n, channels, height, width), stride in zip(case.shapes, case.strides, strict=True):
            inner = max(1, int(channels * RATIOS[stride]))
            cells = n * max(1, height // stride) * max(1, width // stride)
            levels = _relation_flops(channels, inner, n * height * width, cells)
            product = 2 * channels * channels * n * height * width
            flops = [flops[0] + levels[0] + adaptations * product, flops[1] + levels[1] + 2 * adaptations * product]
        maps = case.pixels * case.shape[1] * getattr(torch, case.dtype).itemsize
        parameters = 4 * sum(parameter.numel() for parameter in part(loss_of(case)).parameters())
        return Cost(2 * maps + parameters, 3 * maps + 2 * parameters, *flops)

    return cost


def _relation_flops(channels: int, inner: int, pixels: int, cells: int) -> tuple[int, int]:
    """Forward and backward, both sides: the products of docs/math.md that grow with the map, each in its cheaper form.

    Max-pooled phi and g get a gradient at the winner of each of the ``cells`` only. Where every pixel is a cell, M is
    made from the covariance of all channels.
    """
    wide, narrow, square = 2 * channels * inner, 2 * inner * inner, 2 * channels * channels
    low_rank = min(square, 2 * wide)
    residual, its_gradients = square + low_rank, 2 * square + min(square, 3 * wide)
    if cells == pixels:
        return pixels * (2 * square + residual), pixels * (square + its_gradients)
    phi_and_g, covariance = 2 * wide, low_rank
    forward = pixels * (2 * (phi_and_g + covariance) + residual) + cells * 2 * narrow
    return forward, pixels * (covariance + its_gradients) + cells * (6 * wide + 4 * narrow)


def _student_block(case: Case) -> fbkd_ops.NonLocalBlock2d:
    """The student's of the case's only level."""
    return loss_of(case).levels[0].student_non_local


def _block_inputs(case: Case) -> list[Tensor]:
    x = (8 * case.features(0)).round() / 8
    return [x.requires_grad_(), *_grid_parameters(_student_block(case), case)]


def _called_block(block: nn.Module, names: list[str], dtype: torch.dtype | None = None) -> Implementation:
    """``block`` as a function of x and the parameters ``names``; ``dtype`` is the only one that it takes."""

    def function(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(block, dict(zip(names, parameters, strict=True)), (x if dtype is None else x.to(dtype),))

    return function


def _our_block(backend: str) -> Callable[[Case], Implementation]:
    def made(case: Case) -> Implementation:
        block = _student_block(case)
        function = _called_block(block, [name for name, _ in block.named_parameters()])
        return function if backend == "auto" else forced(function, backend)

    return made


def _their_block(case: Case) -> Implementation:
    """MMRazor's, with its parameters in the order of ours."""
    ours, theirs = _student_block(case), their_loss_of(case).student[0].student_non_local
    names = _counterparts(ours, theirs, lambda: load_non_local(ours, theirs))
    return _called_block(theirs.to(case.parameter_dtype), names, case.parameter_dtype)


def _block_cost(case: Case) -> Cost:
    """Forward reads x and writes z; backward reads x and dz and writes dx. The products are one side's of the relation
    term's, and the affine map that makes z of x, in its low-rank form."""
    (stride,), (n, channels, height, width) = case.strides, case.shape
    inner, pixels = max(1, int(channels * RATIOS[stride])), n * height * width
    cells = n * max(1, height // stride) * max(1, width // stride)
    wide, narrow, square = 2 * channels * inner, 2 * inner * inner, 2 * channels * channels
    low_rank = min(square, 2 * wide)
    if cells == pixels:
        forward, backward = pixels * (square + low_rank), pixels * 3 * low_rank
    else:
        forward = pixels * (2 * wide + 2 * low_rank) + cells * narrow
        backward = pixels * 3 * low_rank + cells * (3 * wide + 2 * narrow)
    parameters = 4 * sum(parameter.numel() for parameter in _student_block(case).parameters())
    return Cost(2 * case.map_bytes + parameters, 3 * case.map_bytes + 2 * parameters, forward, backward)


def _relation_strides(shape: tuple[int, int, int, int]) -> tuple[int, ...]:
    """The preset's at that level; of a map of another size as at P2."""
    level = list(LEVELS.values()).index(shape) if shape in LEVELS.values() else 0
    return (STRIDES[min(level, len(STRIDES) - 1)],)


# Maps that are also those on which results are checked: torch.compile takes minutes, so it is called for one of both.
BRIEF, BRIEF_SMALL = (2, 256, 39, 53), (2, *LEVELS["P6"][1:])
NOT_IN_BRIEF = ("reference", "fbkd_ops:memory_efficient")


NON_LOCAL = Suite(
    "non_local",
    _block_inputs,
    {"mmrazor": _their_block, "reference": _our_block("reference"), "fbkd_ops": _our_block("auto")},
    _block_cost,
    cases=(
        *(
            Case(LEVELS[level], strides=(stride,))
            for level, stride in zip(("P2", "P4"), (STRIDES[0], STRIDES[2]), strict=True)
        ),
        Case(LEVELS["P4"], strides=(1,)),
    ),
    strides=_relation_strides,
    tolerances=LOSS_TOLERANCES,
    brief=(Case(BRIEF, strides=(1,)),),
    not_in_brief=NOT_IN_BRIEF,
)
RELATION = Suite(
    "relation_loss",
    _inputs(RelationTerm),
    _implementations(RelationTerm, mmrazor.RelationTerm),
    _cost(RelationTerm, adaptations=0),
    cases=(
        *(
            Case(LEVELS[level], strides=(stride,))
            for level, stride in zip(("P2", "P3", "P4", "P5"), STRIDES, strict=True)
        ),
        *(Case(LEVELS[level], strides=(1,)) for level in ("P4", "P3", "P2")),
    ),
    strides=_relation_strides,
    tolerances=LOSS_TOLERANCES,
    brief=tuple(Case(shape, strides=(1,)) for shape in (BRIEF_SMALL, BRIEF)),
    not_in_brief=NOT_IN_BRIEF,
)
FBKD_LOSS = Suite(
    "adapted_masked_l2_loss",
    _inputs(Total),
    _implementations(Total, their_part=lambda loss: loss),
    _cost(Total, adaptations=1),
    cases=(Case(LEVELS["P2"], strides=STRIDES),),
    strides=lambda shape: STRIDES,
    tolerances=LOSS_TOLERANCES,
    brief=(Case(BRIEF, strides=STRIDES),),
    not_in_brief=NOT_IN_BRIEF,
)
