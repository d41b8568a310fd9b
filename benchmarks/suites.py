"""What is measured: of each suite its inputs, its implementations (peers) and the least that it has to move.

A new suite is one entry of SUITES. Its implementations take the inputs' tensors in order and return a tuple of tensors.
"""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import mmrazor
from benchmarks.inputs import LEVELS, Case, Cost, Implementation, Suite, forced
from benchmarks.loss_suites import FBKD_LOSS, NON_LOCAL, RELATION
from benchmarks.train_step import TRAIN_STEP
from fbkd_ops import backends, functional, reference

FORCED = ("cuda", "triton")
OURS = ("fbkd_ops", "fbkd_ops:memory_efficient", *(f"fbkd_ops:{backend}" for backend in FORCED))
PEERS = ("eager", "no_distillation", "mmrazor", "compile", "reference", *OURS)


def outputs_of(result: Tensor | Iterable[Tensor]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def peers_of(suite: Suite, device: str) -> dict[str, Callable[[Case], Implementation]]:
    """What makes the suite's implementations that run on a device, in the order of PEERS."""
    makers = dict(suite.implementations)
    makers.setdefault("compile", lambda case: torch.compile(makers[suite.baseline](case), dynamic=False))
    if device == "cuda" and not suite.checked_as:
        for backend in FORCED:
            if backend in backends.FUNCTIONS[suite.op]:
                makers[f"fbkd_ops:{backend}"] = _forced(suite.implementations["fbkd_ops"], backend)
    return {name: makers[name] for name in PEERS if name in makers}


def _forced(make: Callable[[Case], Implementation], backend: str) -> Callable[[Case], Implementation]:
    return lambda case: forced(make(case), backend)


def _pool_inputs(case: Case) -> list[Tensor]:
    return [case.features(0).requires_grad_()]


def _pool_eager(x: Tensor) -> tuple[Tensor, ...]:
    magnitude = x.abs()
    return magnitude.mean(1), magnitude.mean((2, 3)), x.mean(1), x.mean((2, 3))


def _pool_cost(case: Case) -> Cost:
    """Forward reads x once and writes the means; backward reads x (for its signs) and their gradients, writes dx."""
    n, channels, height, width = case.shape
    means = 2 * 4 * n * (height * width + channels)
    return Cost(case.map_bytes + means, 2 * case.map_bytes + means)


def _distance_inputs(case: Case) -> list[Tensor]:
    """Student, teacher and a spatial mask of mean 1, float32."""
    student, teacher = case.features(0).requires_grad_(), case.features(1)
    n, _, height, width = case.shape
    mask = 2 * torch.rand(n, height, width, generator=torch.Generator().manual_seed(2)).to(case.device)
    return [student, teacher, mask]


def _distance_eager(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    return ((student - teacher) ** 2 * mask[:, None]).sum().sqrt()


def _distance_cost(case: Case) -> Cost:
    """Forward reads student, teacher and mask; backward reads them again and writes the student's gradient.

    No fewer: to have the difference in backward without a second read, forward has to write it.
    """
    n, _, height, width = case.shape
    mask = 4 * n * height * width
    return Cost(2 * case.map_bytes + mask, 3 * case.map_bytes + mask)


def _correlation_inputs(case: Case) -> list[Tensor]:
    """Student, and a teacher that agrees with it in part."""
    student, noise = case.features(0), case.features(1)
    return [student.requires_grad_(), student.detach() + noise]


def _standardised(x: Tensor) -> Tensor:
    rows = x.transpose(0, 1).flatten(1)  # (C, N H W)
    return (rows - rows.mean(1, keepdim=True)) / (rows.std(1, keepdim=True) + 1e-6)


def _correlation_eager(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(_standardised(student), _standardised(teacher)) / 2


def _correlation_cost(case: Case) -> Cost:
    """Forward reads student and teacher; backward reads them again and writes the student's gradient."""
    coefficients = 8 * 4 * case.shape[1]
    return Cost(2 * case.map_bytes + coefficients, 3 * case.map_bytes + coefficients)


def _divergence_eager(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = (F.log_softmax(x.flatten(0, 1).flatten(1), dim=1) for x in (student, teacher))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


def _divergence_cost(case: Case) -> Cost:
    """Forward reads student and teacher; backward reads them again and writes the student's gradient."""
    normalisers = 4 * 4 * case.shape[0] * case.shape[1]
    return Cost(2 * case.map_bytes + normalisers, 3 * case.map_bytes + normalisers)


def _adapted_inputs(case: Case) -> list[Tensor]:
    """Student, weight, bias, teacher, mask. Beside 16-bit features the parameters are float32, as in training."""
    student, teacher, mask = _distance_inputs(case)
    channels = case.shape[1]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(channels, channels, generator=generator) / channels**0.5
    bias = torch.randn(channels, generator=generator)
    dtype = torch.promote_types(student.dtype, torch.float32)
    weight, bias = (parameter.to(case.device, dtype).requires_grad_() for parameter in (weight, bias))
    return [student, weight, bias, teacher, mask]


def _adapted_eager(student: Tensor, weight: Tensor, bias: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """The parameters follow the features' dtype, as under autocast."""
    dtype = student.dtype
    adapted = F.conv2d(student, weight.to(dtype)[:, :, None, None], bias.to(dtype))
    return _distance_eager(adapted, teacher, mask)


def _adapted_cost(case: Case) -> Cost:
    """The traffic of the plain distance and of the parameters; one matrix product forward, two backward.

    Backward needs the adapted difference again. Five maps in all: it is recomputed from a second read of both maps (a
    fourth product, not counted), or forward makes the gradient up to a factor and backward scales it. On a GPU forward
    writes the difference, which spares the fourth product and costs two maps more (not counted either).
    """
    n, channels, height, width = case.shape
    plain, parameters = _distance_cost(case), 4 * channels * (channels + 1)
    product = 2 * channels * channels * n * height * width
    return Cost(plain.forward_bytes + parameters, plain.backward_bytes + 2 * parameters, product, 2 * product)


def _op_suite(
    op: str,
    inputs: Callable[[Case], list[Tensor]],
    eager: Implementation,
    cost: Callable[[Case], Cost],
    brief_level: str = "P2",
) -> Suite:
    """A suite of functions that are the same for every case; those of the package have the op's name."""
    functions = {"eager": eager, "reference": getattr(reference, op), "fbkd_ops": getattr(functional, op)}
    makers = {name: lambda case, function=function: function for name, function in functions.items()}
    return Suite(op, inputs, makers, cost, OP_CASES, brief=(Case(LEVELS[brief_level]),), not_in_brief=("reference",))


OP_CASES = (
    Case(LEVELS["P2"]),
    Case(LEVELS["P2"], layout="channels_last"),
    Case(LEVELS["P2"], "bfloat16"),
    Case(LEVELS["P3"]),
)
CORRELATION = _op_suite("channel_correlation_loss", _correlation_inputs, _correlation_eager, _correlation_cost)
CORRELATION.implementations["mmrazor"] = lambda case: mmrazor.installed().pkd.PKDLoss()
DIVERGENCE = _op_suite("channel_divergence_loss", _correlation_inputs, _divergence_eager, _divergence_cost)
DIVERGENCE.implementations["mmrazor"] = lambda case: mmrazor.installed().cwd.ChannelWiseDivergence()
SUITES = {
    "attention_pool": _op_suite("attention_pool", _pool_inputs, _pool_eager, _pool_cost),
    "masked_l2": _op_suite("masked_l2_loss", _distance_inputs, _distance_eager, _distance_cost),
    # Brief on P3: on P2 a round takes a second, too few for a median.
    "adapted_masked_l2": _op_suite("adapted_masked_l2_loss", _adapted_inputs, _adapted_eager, _adapted_cost, "P3"),
    "channel_correlation": CORRELATION,
    "channel_divergence": DIVERGENCE,
    "non_local": NON_LOCAL,
    "relation": RELATION,
    "fbkd_loss": FBKD_LOSS,
    "train_step": TRAIN_STEP,
}
