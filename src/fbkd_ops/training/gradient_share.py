"""A weight of the terms that sets itself: so that they send a given share of the detector's gradient into the features.

Every tapped map leaves its module on two branches, into the loss and back into the detector. In a step that measures,
an identity on each of them tells, in the backward pass, the squares of the gradient that comes back through it.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._validation import check_number, is_int
from .._warnings import ShareWatch

__all__ = ["GradientShare", "ShareSettings", "checked_settings"]

MAPS = 64  # of a layer, at most
# Before the first measurement. The terms' gradient is linear in the factor, so that this little of it tells the rest.
FIRST_FACTOR = 1e-3
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-6, 1e6
# Of a new measurement in the mean of the logarithms.
NEWEST = 0.3
OWN, TERMS = 0, 1  # branches


class ShareSettings(NamedTuple):
    """What a :class:`fbkd_ops.Distiller` is given."""

    target: float  # > 0
    every: int  # steps from one measurement to the next
    steps: int | None  # training steps in which the terms count after which the factor stays; None: never

    def is_due(self, step: int) -> bool:
        """Whether the ``step``-th step with terms, counted from 0, measures."""
        return step % self.every == 0 and (self.steps is None or step < self.steps)


def checked_settings(target: Any, every: Any, steps: Any) -> ShareSettings | None:
    """Return the settings; None where no share is wanted."""
    if not is_int(every) or every < 1:
        raise ValueError(f"share_every must be an int >= 1, got {every!r}")
    if steps is not None and (not is_int(steps) or steps < 1):
        raise ValueError(f"share_steps must be None or an int >= 1, got {steps!r}")
    if target is None:
        return None
    target = check_number(target, "a finite number > 0", lambda value: value > 0, "gradient_share")
    return ShareSettings(target, int(every), None if steps is None else int(steps))


class BranchSquares(torch.autograd.Function):
    """The identity of some maps, whose backward sends their gradients' sums of squares to ``sums (MAPS,)``."""

    @staticmethod
    def forward(ctx, sums, *maps):
        ctx.set_materialize_grads(False)
        # Nothing is saved: a checkpoint that computes its maps again does so without this node.
        ctx.dtype, ctx.device = sums.dtype, sums.device
        return tuple(x.view_as(x) for x in maps)

    @staticmethod
    def backward(ctx, *grads):
        unused = torch.zeros(MAPS, dtype=ctx.dtype, device=ctx.device)
        squares = [unused[0] if g is None else g.detach().to(ctx.dtype).square().sum() for g in grads]
        return torch.cat([torch.stack(squares), unused[len(squares) :]]), *grads


class GradientShare(nn.Module):
    """The factor of the terms, from measurements of both branches' gradients.

    Args:
        settings: target and schedule.
        layers: how many layers are tapped.

    Attributes:
        share: the last measured share; 0 before the first.
        log_unit: mean logarithm of the share that a factor of 1 would give.
        measured: how many measurements were used.
        failed: how many in a row could not be used since.
    """

    share: Tensor
    log_unit: Tensor
    measured: Tensor
    failed: Tensor
    factor_in_use: Tensor
    pending: Tensor

    def __init__(self, settings: ShareSettings, layers: int):
        super().__init__()
        self.settings, self.layers = settings, layers
        for name in ("share", "log_unit", "measured", "failed", "factor_in_use"):
            self.register_buffer(name, torch.zeros(()))
        # Sums of squares of a backward pass whose checkpoint was written before the next forward: own, terms.
        self.register_buffer("pending", torch.zeros(2))
        self._watch, self._awaits_backward = ShareWatch(), False
        self._renew_sums()

    def factor(self) -> Tensor:
        """Return what the terms are multiplied with, a scalar on the device."""
        wanted = self.settings.target * torch.exp(-self.log_unit.float())
        wanted = wanted.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        return torch.where(self.measured > 0, wanted, torch.full_like(wanted, FIRST_FACTOR))

    def split(self, layer: int, value: Any) -> tuple[Any, Any]:
        """Return what a layer gives twice: as the loss takes it, and as the detector goes on with it."""
        maps: list[Tensor] = []
        _replaced(value, maps.append)
        maps = maps[:MAPS]
        if not maps:
            return value, value
        branches = [iter(BranchSquares.apply(self._sums[branch, layer], *maps)) for branch in (TERMS, OWN)]
        for_loss, for_detector = (_replaced(value, functools.partial(_next, branch)) for branch in branches)
        return for_loss, for_detector

    def begin(self, factor: Tensor) -> None:
        """Remember the factor of a step that measures."""
        self.factor_in_use.copy_(factor.detach())
        self._awaits_backward = True

    @torch.no_grad()
    def collect(self) -> None:
        """Take the last backward pass' measurement in. All processes have to call it in the same steps."""
        if not self._awaits_backward:
            return
        self._awaits_backward = False
        own, terms = self._measurement().unbind()
        self._found().zero_()
        self.pending.zero_()
        share = (terms / own).sqrt()
        unit = share.log() - self.factor_in_use.float().log()
        is_good = unit.isfinite()
        newest = torch.where(self.measured > 0, NEWEST, 1.0)
        mean = self.log_unit + newest * (unit - self.log_unit)
        self.log_unit.copy_(torch.where(is_good, mean, self.log_unit))
        self.share.copy_(torch.where(is_good, share, self.share))
        self.measured.add_(is_good)
        self.failed.copy_(torch.where(is_good, 0.0, self.failed + 1))
        self._watch.see(self.failed)

    def _measurement(self) -> Tensor:
        """Return the sums of squares of own and terms' gradients ``(2,)`` of all processes."""
        squares = self._local_squares() + self.pending
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(squares)
        return squares

    def _local_squares(self) -> Tensor:
        """Of the maps that the loss reads; NaN where a gradient is."""
        own, terms = self._found().flatten(1).unbind()
        return torch.stack([torch.where(terms == 0, torch.zeros_like(own), own).sum(), terms.sum()])

    def _found(self) -> Tensor:
        """Return the sums of squares ``(2, layers, MAPS)`` that backward passes left."""
        return cast(Tensor, self._sums.grad)

    def _renew_sums(self) -> None:
        """Make anew the leaf that backward passes fill. It is no parameter: no optimizer and no clipping sees it."""
        self._sums = torch.zeros(2, self.layers, MAPS, device=self.share.device, requires_grad=True)
        self._sums.grad = torch.zeros_like(self._sums)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradientShare":
        """Move the state, in float32 whatever the detector's dtype becomes."""
        waiting = self._local_squares() + self.pending
        kept = {name: buffer.clone() for name, buffer in self.named_buffers()} | {"pending": waiting}
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            setattr(self, name, kept[name].to(buffer.device))
        self._renew_sums()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._awaits_backward:
            destination[f"{prefix}pending"] = self._local_squares() + self.pending

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Take a checkpoint of a training without a share too, which has none of these names."""
        if any(name.startswith(prefix) for name in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            self._found().zero_()
            self._awaits_backward = bool(self.pending.any())

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_sums"]  # a copy of a leaf has no gradient
        state["_buffers"] = self._buffers | {"pending": self._local_squares() + self.pending}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._renew_sums()


def _next(branch: Iterator[Tensor], x: Tensor) -> Tensor:
    """Return the branch's next map, beyond the last one x itself."""
    return next(branch, x)


def _replaced(value: Any, replace: Callable[[Tensor], Any]) -> Any:
    """Return a tensor, list, tuple or dict with ``replace`` of each map that has a gradient in its place."""
    if isinstance(value, Tensor):
        return replace(value) if value.requires_grad and value.is_floating_point() else value
    if isinstance(value, Mapping):
        parts = {name: _replaced(part, replace) for name, part in value.items()}
        kind: Any = type(value)
        return kind(**parts) if dataclasses.is_dataclass(value) else kind(parts)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(part, replace) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(_replaced(part, replace) for part in value)
    return value
