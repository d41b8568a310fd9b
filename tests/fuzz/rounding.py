"""How far rounding may move a result: the literal formula in float64 with every operation rounded at random.

A bound of a few eps of the result is too strict where terms cancel, and a bound that is derived by hand holds for one
formula only. Here the formula itself tells: it runs in float64, and each operation's result, like each operand of a sum
of products, is moved by a random part of an eps of the dtype whose rounding is asked for (Monte Carlo arithmetic,
Parker 1997). An exact zero stays zero: S - T of equal maps has no rounding error.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

# Each result element is a sum over operands: rounding enters with every one of them.
SUMS = {
    aten.mm,
    aten.bmm,
    aten.addmm,
    aten.baddbmm,
    aten.linear,
    aten.convolution,
    aten.convolution_backward,
    aten.sum,
    aten.mean,
    aten.var,
    aten._softmax,
    aten._softmax_backward_data,
    aten._native_batch_norm_legit_no_training,
    aten.native_batch_norm_backward,
}
ELEMENTWISE = {aten.add, aten.sub, aten.rsub, aten.mul, aten.div, aten.pow, aten.sqrt, aten.rsqrt, aten.exp}


NORMS = {aten.native_batch_norm, aten._native_batch_norm_legit, aten._native_batch_norm_legit_functional}


# How much larger than their sum the terms of a convolution's output may be.
LARGER_TERMS = 4


class Trace:
    """What the run without rounding has met, in its order."""

    def __init__(self):
        self.winners: list[Tensor] = []  # of max-pools
        self.factors: list[Tensor] = []  # (C,), 1 / sqrt(variance + eps) of BatchNorms that use the batch's statistics
        self.largest_logit = 0.0  # in absolute value, of all softmaxes

    def largest_factor(self) -> float:
        return max((float(factor.max()) for factor in self.factors if factor.numel()), default=0.0)


class RandomRounding(TorchDispatchMode):
    """Round every operation at random inside the block.

    BatchNorms keep the variance of the run without rounding, up to the error of second moments: else the errors of a
    constant channel would be its variance, and would be divided by themselves.

    Args:
        eps: of the dtype whose rounding is imitated; 0 changes nothing, and writes the trace.
        seed: of the random numbers.
        trace: what the run without rounding has met.
        keeps_winners: whether max-pools take the winners of the run without rounding in place of their own, as is right
            where all values in front of them are exact.
    """

    def __init__(self, eps: float, seed: int, trace: Trace, keeps_winners: bool = False):
        super().__init__()
        self.eps, self.trace, self.keeps_winners = eps, trace, keeps_winners
        self.winners, self.factors = iter(trace.winners), iter(trace.factors)
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        packet = function.overloadpacket
        if packet is aten.max_pool2d_with_indices:
            return self._pooled(function(*args, **(kwargs or {})), args[0])
        if packet in NORMS:
            return self._normalized(function(*args, **(kwargs or {})), *args[:3])
        if packet is aten._softmax and not self.eps and args[0].numel():
            self.trace.largest_logit = max(self.trace.largest_logit, float(args[0].abs().max()))
        if not self.eps or (packet not in SUMS and packet not in ELEMENTWISE):
            return function(*args, **(kwargs or {}))
        if packet in SUMS:
            args = tuple(map(self._rounded, args))
        result = function(*args, **(kwargs or {}))
        if packet is aten._softmax:
            result = self._rounded_sums(result, args[0])
        return type(result)(map(self._rounded, result)) if isinstance(result, (tuple, list)) else self._rounded(result)

    def _rounded(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.dtype != torch.float64:
            return value
        noise = torch.rand(value.shape, generator=self.generator, dtype=torch.float64)
        return value * (1 + self.eps * (2 * noise - 1))

    def _rounded_sums(self, result: Tensor, logits: Tensor) -> Tensor:
        """A softmax as fused attention makes it: the logarithm of a row's sum has the rounding error of the logits."""
        size = logits.abs().amax(-1, keepdim=True) if logits.numel() else logits
        noise = torch.rand(size.shape, generator=self.generator, dtype=torch.float64)
        return result * torch.exp(self.eps * (2 * noise - 1) * size)

    def _rounded_factor(self, factor: Tensor, x: Tensor) -> Tensor:
        """``1 / sqrt(variance + eps)`` of a variance that is a sum of products as large as the square of x's terms."""
        eps = min(self.eps, torch.finfo(torch.float32).eps)  # no statistics are made in 16 bits
        sizes = LARGER_TERMS * x.abs().amax((0, 2, 3)) * factor
        noise = 2 * torch.rand(factor.shape, generator=self.generator, dtype=torch.float64) - 1
        return factor * (1 + (eps / 2 * noise * sizes.square()).clamp(-0.5, 0.5))

    def _pooled(self, result: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = result
        if not self.eps:
            self.trace.winners.append(indices)
        if not self.eps or not self.keeps_winners:
            return result
        indices = next(self.winners)
        return x.flatten(-2).gather(-1, indices.flatten(-2)).reshape(values.shape), indices

    def _normalized(
        self, result: tuple[Tensor, ...], x: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, ...]:
        """A BatchNorm whose terms, ``weight * x / root`` and ``weight * mean / root``, are rounded one by one."""
        values, mean, factor = result
        if not self.eps:
            self.trace.factors.append(factor)
        if not self.eps or not factor.numel():
            return result
        factor = self._rounded_factor(next(self.factors), x)
        scale = (factor if weight is None else factor * weight)[:, None, None]
        shift = 0 if bias is None else bias[:, None, None]
        noise = 2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1
        return scale * (x - mean[:, None, None] + self.eps * noise * x.abs()) + shift, mean, factor
