"""What is measured: of each suite its inputs, its implementations (peers) and the least that it has to move.

A new suite is one entry of SUITES. Its functions take the inputs' tensors in order and return a tuple of tensors.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Union

import torch
import torch.nn.functional as F
from torch import Tensor

from fbkd_ops import backends, functional, reference

__all__ = ["DTYPES", "LAYOUTS", "LEVELS", "PEERS", "SUITES", "Case", "Cost", "Suite", "outputs_of", "peers_of"]

# Feature maps of an 800x1344 image; the strides of P2..P6 are 4..64.
LEVELS = {
    "P2": (1, 256, 200, 336),
    "P3": (1, 256, 100, 168),
    "P4": (1, 256, 50, 84),
    "P5": (1, 256, 25, 42),
    "P6": (1, 256, 13, 21),
}
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
FORCED = ("cuda", "triton")
PEERS = ("eager", "compile", "reference", "fbkd_ops", *(f"fbkd_ops:{backend}" for backend in FORCED))


@dataclass(frozen=True)
class Case:
    """The map that a suite runs on. ``shape`` is (N, C, H, W); ``dtype`` and ``layout`` are names."""

    shape: tuple[int, int, int, int]
    dtype: str = "float32"
    layout: str = "contiguous"
    device: str = "cpu"

    @property
    def title(self) -> str:
        levels = [name for name, shape in LEVELS.items() if shape == self.shape]
        return " ".join([*(levels or ["x".join(map(str, self.shape))]), self.dtype, self.layout])

    @property
    def map_bytes(self) -> int:
        return math.prod(self.shape) * getattr(torch, self.dtype).itemsize

    @property
    def small(self) -> "Case":
        """The map on which results are checked: as many channels unless those are very many, fewer pixels."""
        limits = (2, 512, 19, 28)
        return Case(tuple(map(min, self.shape, limits)), self.dtype, self.layout, self.device)

    def features(self, seed: int) -> Tensor:
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(seed))
        return x.to(self.device, getattr(torch, self.dtype)).contiguous(memory_format=LAYOUTS[self.layout])


@dataclass(frozen=True)
class Cost:
    """The fewest bytes and floating-point operations that any implementation needs."""

    forward_bytes: int
    backward_bytes: int
    forward_flops: int = 0
    backward_flops: int = 0


@dataclass(frozen=True)
class Suite:
    """``op`` is the name in ``fbkd_ops.backends.OPS``; differentiable inputs are those that require a gradient."""

    op: str
    inputs: Callable[[Case], list[Tensor]]
    eager: Callable[..., Iterable[Tensor]]
    reference: Callable[..., Iterable[Tensor]]
    fbkd_ops: Callable[..., Iterable[Tensor]]
    cost: Callable[[Case], Cost]


def outputs_of(result: Union[Tensor, Iterable[Tensor]]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def peers_of(suite: Suite, device: str) -> dict[str, Callable[..., Iterable[Tensor]]]:
    """The suite's implementations that run on a device, keyed as in PEERS."""
    peers = {
        "eager": suite.eager,
        "compile": torch.compile(suite.eager, dynamic=False),
        "reference": suite.reference,
        "fbkd_ops": suite.fbkd_ops,
    }
    if device == "cuda":
        served = [backend for backend in FORCED if backend in backends.OPS[suite.op]]
        peers |= {f"fbkd_ops:{backend}": _forced(suite.fbkd_ops, backend) for backend in served}
    return peers


def _forced(function: Callable, backend: str) -> Callable:
    def forced(*arguments):
        with backends.use_backend(backend):
            return function(*arguments)

    return forced


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

    Backward needs the adapted difference again. Five maps in all, either way: it is recomputed from a second read of
    both maps (a fourth product, not counted), or forward makes the gradient up to a factor and backward scales it.
    """
    n, channels, height, width = case.shape
    plain, parameters = _distance_cost(case), 4 * channels * (channels + 1)
    product = 2 * channels * channels * n * height * width
    return Cost(plain.forward_bytes + parameters, plain.backward_bytes + 2 * parameters, product, 2 * product)


SUITES = {
    "attention_pool": Suite(
        "attention_pool",
        _pool_inputs,
        _pool_eager,
        reference.attention_pool,
        functional.attention_pool,
        _pool_cost,
    ),
    "masked_l2": Suite(
        "masked_l2_loss",
        _distance_inputs,
        _distance_eager,
        reference.masked_l2_loss,
        functional.masked_l2_loss,
        _distance_cost,
    ),
    "adapted_masked_l2": Suite(
        "adapted_masked_l2_loss",
        _adapted_inputs,
        _adapted_eager,
        reference.adapted_masked_l2_loss,
        functional.adapted_masked_l2_loss,
        _adapted_cost,
    ),
}
