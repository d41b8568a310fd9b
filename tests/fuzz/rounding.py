"""How far rounding may move a result: the literal formula in float64 with every operation rounded at random.

A bound of a few eps of the result is too strict where terms cancel, and a bound that is derived by hand holds for one
formula only. Here the formula itself tells: it runs in float64, and each operation's result, like each operand of a sum
of products, is moved by a random part of an eps of the dtype whose rounding is asked for (Monte Carlo arithmetic,
Parker 1997). An exact zero stays zero: S - T of equal maps has no rounding error.
"""

from typing import Any, Optional

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["RandomRounding", "Trace"]

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


class Trace:
    """What a run has met: the winners of its max-pools, in their order, and the smallest variance of a BatchNorm."""

    def __init__(self):
        self.winners: list[Tensor] = []
        self.largest_factor = 0.0  # 1 / sqrt(variance + eps) of a BatchNorm's own statistics


class RandomRounding(TorchDispatchMode):
    """Round every operation at random inside the block.

    Args:
        eps: of the dtype whose rounding is imitated; 0 changes nothing.
        seed: of the random numbers.
        trace: written by a run without rounding. With rounding its max-pools take the winners in it in place of their
            own, as is right where all values in front of them are exact.
    """

    def __init__(self, eps: float, seed: int, trace: Optional[Trace] = None):
        super().__init__()
        self.eps, self.trace, self.pools = eps, trace, 0
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        packet = function.overloadpacket
        if packet is aten.max_pool2d_with_indices:
            return self._pooled(function(*args, **(kwargs or {})), args[0])
        if packet in NORMS:
            return self._normalized(function(*args, **(kwargs or {})), *args[:2])
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
        return result * (1 + self.eps * (2 * noise - 1) * size)

    def _pooled(self, result: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        values, indices = result
        if self.trace is None:
            return result
        if not self.eps:
            self.trace.winners.append(indices)
            return result
        indices = self.trace.winners[self.pools]
        self.pools += 1
        return x.flatten(-2).gather(-1, indices.flatten(-2)).reshape(values.shape), indices

    def _normalized(self, result: tuple[Tensor, ...], x: Tensor, weight: Optional[Tensor]) -> tuple[Tensor, ...]:
        """A BatchNorm whose terms, ``weight * x / root`` and ``weight * mean / root``, are rounded one by one."""
        values, mean, factor = result
        if not factor.numel():
            return result
        if not self.eps:
            if self.trace is not None:
                self.trace.largest_factor = max(self.trace.largest_factor, float(factor.max()))
            return result
        scale = factor if weight is None else factor * weight.abs()
        noise = 2 * torch.rand(x.shape, generator=self.generator, dtype=torch.float64) - 1
        return values + self.eps * noise * x.abs() * scale[:, None, None], mean, factor
