"""How the terms of the distillation loss compare to the detector's own losses."""

import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from .feature_tap import unwrapped
from .student_losses import own_losses

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

__all__ = ["BalanceReport", "BalanceRow", "balance_report", "is_sharded"]


class BalanceRow(NamedTuple):
    """One loss on one batch."""

    name: str
    value: float
    gradient_norm: float  # L2, over the student's parameters up to the tapped layers


class BalanceReport(NamedTuple):
    """The detector's own losses and the distillation terms, each with its total."""

    own: list[BalanceRow]
    distillation: list[BalanceRow]
    own_total: BalanceRow
    distillation_total: BalanceRow

    @property
    def ratio(self) -> float:
        """Gradient norm of all terms over that of all own losses; infinite where the own ones have none there."""
        own = self.own_total.gradient_norm
        return self.distillation_total.gradient_norm / own if own else float("inf")

    def __str__(self) -> str:
        rows = [*self.own, self.own_total, *self.distillation, self.distillation_total]
        width = max(len(row.name) for row in rows)
        lines = [f"{'loss':<{width}}  {'value':>10}  {'gradient norm':>13}"]
        lines += [f"{row.name:<{width}}  {row.value:>10.4g}  {row.gradient_norm:>13.4g}" for row in rows]
        return "\n".join([*lines, f"distillation / own gradient: {self.ratio:.3g}"])


def balance_report(distiller: Any, *args: Any, **kwargs: Any) -> BalanceReport:
    """Return the report of :meth:`fbkd_ops.Distiller.balance_report`, which says what it leaves alone."""
    if any(map(is_sharded, distiller.parameters())):
        raise NotImplementedError("balance_report needs whole parameters: call it before fully_shard")
    student, loss = unwrapped(distiller.student), copy.deepcopy(unwrapped(distiller.loss))
    modes = [(module, module.training) for module in student.modules()]
    with torch.random.fork_rng(), _kept_buffers(student), torch.enable_grad():
        try:
            if not student.training:
                student.train()
            output, features_s, features_t, others = distiller.run_for_loss(args, kwargs)
        finally:
            for module, mode in modes:
                module.training = mode
        own, terms = own_losses(output, distiller.total), loss.train()(features_s, features_t, **others)
        return _compared(own, terms, [parameter for parameter in student.parameters() if parameter.requires_grad])


def _compared(own: dict[str, Tensor], terms: dict[str, Tensor], parameters: list[Tensor]) -> BalanceReport:
    first, *others = terms.values()
    total = sum(others, first)
    shared = [
        each for each, gradient in zip(parameters, _gradients(total, parameters), strict=True) if gradient is not None
    ]
    return BalanceReport(
        [_row(name, value, shared) for name, value in own.items()],
        [_row(name, value, shared) for name, value in terms.items()],
        _row("all own losses", sum(own.values(), torch.zeros((), device="cpu")), shared),
        _row("all distillation terms", total, shared),
    )


def is_sharded(parameter: Tensor) -> "TypeGuard[DTensor]":
    """Whether FSDP2 has made it a DTensor; not every build of PyTorch has the class."""
    return hasattr(parameter, "to_local")


def _row(name: str, value: Tensor, parameters: list[Tensor]) -> BalanceRow:
    squares = [each.double().square().sum().item() for each in _gradients(value, parameters) if each is not None]
    return BalanceRow(name, value.item(), sum(squares) ** 0.5)


def _gradients(value: Tensor, parameters: list[Tensor]) -> Sequence[Tensor | None]:
    if not parameters or not value.requires_grad:
        return [None] * len(parameters)
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)


@contextlib.contextmanager
def _kept_buffers(module: nn.Module) -> Iterator[None]:
    """Put the module's buffers (BatchNorm's statistics) back at the end."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
