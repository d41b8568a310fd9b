"""A factor of the terms that sets itself: the gradient at the tapped maps is a given share of the detector's own.

Every tapped map leaves its module on two branches, into the loss and back into the detector. In a step that measures,
an identity on each of them tells, in the backward pass, the squares of the gradient that comes back through it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from .._numerics import constant_vector
from .._validation import check_number, is_int
from .._warnings import ShareWatch
from .feature_tap import Branches
from .nested import mapped

__all__ = ["SHARE_STATE", "GradientShare", "ShareSettings", "checked_settings"]

# _disable_dynamo is torch.compiler.disable, but loads the compiler with the first call and not with this file, where it
# was 2 of the 5 seconds of CPU time that `import fbkd_ops` took.
MAPS = 64  # most maps per layer
# Until the first measurement. The terms' gradient is proportional to the factor, so a small one is enough.
FIRST_FACTOR = 1e-3
SMALLEST_FACTOR, LARGEST_FACTOR = 1e-6, 1e6
# Weight of a new measurement in the running mean of logarithms.
NEWEST = 0.3
OWN, TERMS = 0, 1  # branches: the detector's own, the first loss's; those of further losses follow
# Steps whose backward pass may come after the next one's forward, as for a sum of losses over batches.
MOST_WAITING = 4
SHARE_STATE = ("share", "log_unit", "measured", "failed", "pending")


class ShareSettings(NamedTuple):
    """What a :class:`fbkd_ops.Distiller` is given."""

    target: float | tuple[float, ...]  # > 0: of all terms together, or of each of several losses
    every: int  # steps with terms from one measurement to the next
    steps: int | None  # training steps, counted from start_step, after which the factor stays; None: never

    def shape(self) -> tuple[int, ...]:
        """Of the factors: (), or one for each of several losses."""
        return (len(self.target),) if isinstance(self.target, tuple) else ()


def checked_settings(target: Any, every: Any, steps: Any, losses: Sequence[str] = ()) -> ShareSettings | None:
    """Return the settings; None where no share is wanted. ``losses`` are the names of several."""
    if not is_int(every) or every < 1:
        raise ValueError(f"share_every must be an int >= 1, got {every!r}")
    if steps is not None and (not is_int(steps) or steps < 1):
        raise ValueError(f"share_steps must be None or an int >= 1, got {steps!r}")
    if target is None:
        return None
    return ShareSettings(_checked_target(target, losses), int(every), None if steps is None else int(steps))


def _checked_target(target: Any, losses: Sequence[str]) -> float | tuple[float, ...]:
    """Return the share, or that of each loss in their order."""
    if not isinstance(target, Mapping):
        return check_number(target, "a finite number > 0", lambda value: value > 0, "gradient_share")
    if not losses:
        raise ValueError("gradient_share must be a number where there is one loss, got a dict")
    if set(target) != set(losses):
        raise ValueError(
            f"gradient_share must be a number or have a share for each of {', '.join(map(repr, losses))}, got "
            f"{', '.join(map(repr, target)) or 'none'}"
        )
    shares = (
        check_number(target[name], "a finite number > 0", lambda value: value > 0, f"gradient_share[{name!r}]")
        for name in losses
    )
    return tuple(shares)


class BranchSquares(torch.autograd.Function):
    """The identity of some maps, whose backward sends their gradients' sums of squares to ``sums (MAPS,)``."""

    @staticmethod
    def forward(ctx, sums, *maps):
        ctx.set_materialize_grads(False)
        # Nothing is saved, because a checkpoint's recomputation runs without this node.
        ctx.dtype = sums.dtype
        return tuple(x.view_as(x) for x in maps)

    @staticmethod
    def backward(ctx, *grads):
        device = next(g.device for g in grads if g is not None)
        unused = torch.zeros(MAPS, dtype=ctx.dtype, device=device)
        squares = [unused[0] if g is None else g.detach().to(ctx.dtype).square().sum() for g in grads]
        return torch.cat([torch.stack(squares), unused[len(squares) :]]), *grads


class _Waiting(NamedTuple):
    """A step that measures, until its backward pass has come."""

    sums: Tensor  # (1 + losses, layers, MAPS), a leaf: own and terms' sums of squares arrive as its gradient
    factor: Tensor  # () or (losses,)


class GradientShare(nn.Module):
    """The factor of the terms, from measurements of both branches' gradients.

    Where several losses have a share each, every number below is a vector of one entry per loss.

    Processes of ``torch.distributed`` exchange their sums in the default group, so all of them have to distil alike.

    Args:
        settings: target and schedule.
        layers: how many layers are tapped.

    Attributes:
        share: the last measured share; 0 before the first.
        log_unit: mean logarithm of the share that a factor of 1 would give.
        measured: how many measurements were used.
        failed: how many in a row could not be used since.
        pending: the last measurement that no forward has used yet, kept by checkpoints, copies and moves: sums of
            squares of the own and of the terms' gradient, and the factor.
    """

    share: Tensor
    log_unit: Tensor
    measured: Tensor
    failed: Tensor
    pending: Tensor

    def __init__(self, settings: ShareSettings, layers: int, device: torch.device | None = None):
        super().__init__()
        self.settings, self.layers = settings, layers
        for name in SHARE_STATE:
            shape = (3 * self.losses,) if name == "pending" else settings.shape()
            self.register_buffer(name, torch.zeros(shape, device=device))
        self._watch, self._waiting, self._has_pending = ShareWatch(), list[_Waiting](), False
        self._is_measured = False  # known once the steps are over
        self._sums: Tensor | None = None  # of the step that measures now

    @property
    def losses(self) -> int:
        """How many losses have a share; 1 where all have one together."""
        return math.prod(self.settings.shape())

    def factor(self, weight: float) -> Tensor:
        """Return what the terms are multiplied with, on the device: the factor times ``weight``.

        Until the first measurement it is ``FIRST_FACTOR``, whatever the weight.
        """
        target: float | Tensor
        if isinstance(self.settings.target, tuple):
            target = constant_vector(list(self.settings.target), torch.float32, self.log_unit.device, keep=False)
        else:
            target = self.settings.target
        wanted = target * torch.exp(-self.log_unit.float())
        wanted = weight * wanted.clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
        return torch.where(self.measured > 0, wanted, torch.full_like(wanted, FIRST_FACTOR))

    def is_due(self, step: int, between: int = 1) -> bool:
        """Whether a step with terms measures; after ``steps`` only until one could.

        Args:
            step: counted from the first one that may have terms.
            between: steps from one with terms to the next.
        """
        if step % (self.settings.every * between) or not torch.is_grad_enabled():
            return False
        if self.settings.steps is None or step < self.settings.steps:
            return True
        self._is_measured = self._is_measured or int(self.measured.min()) > 0
        return not self._is_measured

    @_disable_dynamo
    def begin(self, factor: Tensor) -> None:
        """Make the leaf of a step that measures with this factor."""
        # No parameter: neither an optimizer nor the clipping of gradients sees it.
        self._sums = torch.zeros(1 + self.losses, self.layers, MAPS, device=factor.device, requires_grad=True)
        self._waiting = [*self._waiting[1 - MOST_WAITING :], _Waiting(self._sums, factor.detach())]

    def split(self, layer: int, value: Any) -> tuple[Any, Any]:
        """Return what a layer gives twice: as the loss takes it, and as the detector goes on with it.

        Where several losses have a share each, the former is the value as it is, for :meth:`branches`.
        """
        for_detector = self._measured(OWN, layer, value)
        return (value if self.settings.shape() else self._measured(TERMS, layer, value)), for_detector

    def branches(self, layer: int, value: Any) -> Branches:
        """Return what a layer gives as each of several losses takes it."""
        return Branches([self._measured(TERMS + index, layer, value) for index in range(self.losses)])

    def _measured(self, row: int, layer: int, value: Any) -> Any:
        """Return the value with maps whose gradients' sums of squares arrive in a row of the sums."""
        maps: list[Tensor] = []
        mapped(value, lambda leaf: maps.append(leaf) if _has_gradient(leaf) else None)
        maps = maps[:MAPS]
        if not maps or self._sums is None:
            return value
        branch = iter(BranchSquares.apply(self._sums[row, layer], *maps))
        return mapped(value, lambda leaf: next(branch, leaf) if _has_gradient(leaf) else leaf)

    def is_waiting(self) -> bool:
        """Whether a measurement may have come."""
        return bool(self._waiting) or self._has_pending

    @_disable_dynamo
    @torch.no_grad()
    def collect(self) -> None:
        """Take in what backward passes have measured. All processes have to call it in the same steps."""
        arrived = [waiting for waiting in self._waiting if waiting.sums.grad is not None]
        self._waiting = [waiting for waiting in self._waiting if waiting.sums.grad is None]
        found = [_measurement(waiting) for waiting in arrived]
        if self._has_pending:
            found = [self.pending.clone(), *found]
            self.pending.zero_()
            self._has_pending = False
        for own_terms_factor in found:
            self._add(*own_terms_factor.float().split([2 * self.losses, self.losses]))

    def _add(self, squares: Tensor, factor: Tensor) -> None:
        """Let a measurement move the mean: sums of squares of this process ``(2 * losses,)``, factors ``(losses,)``."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(squares)
        own, terms = squares.view(2, *self.settings.shape()).unbind()
        share = (terms / own).sqrt()
        unit = share.log() - factor.view(self.settings.shape()).log()
        is_good = unit.isfinite()
        newest = torch.where(self.measured > 0, NEWEST, 1.0)
        mean = self.log_unit + newest * (unit - self.log_unit)
        self.log_unit.copy_(torch.where(is_good, mean, self.log_unit))
        self.share.copy_(torch.where(is_good, share, self.share))
        self.measured.add_(is_good)
        self.failed.copy_(torch.where(is_good, 0.0, self.failed + 1))
        self._watch.see(self.failed.max())

    def _pending(self) -> Tensor:
        """Return the last measurement that nothing has taken in yet, zeros where there is none."""
        arrived = [waiting for waiting in self._waiting if waiting.sums.grad is not None]
        if not arrived:
            return self.pending
        return _measurement(arrived[-1])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GradientShare":
        """Move the state, in float32 whatever the detector's dtype becomes. What waits for a backward pass is lost."""
        kept = {name: buffer.clone() for name, buffer in self.named_buffers()} | {"pending": self._pending().clone()}
        self._has_pending = self._has_pending or any(waiting.sums.grad is not None for waiting in self._waiting)
        self._waiting, self._sums = [], None
        super()._apply(fn, recurse)
        for name, buffer in self.named_buffers():
            value = torch.zeros_like(kept[name], device=buffer.device) if kept[name].is_meta else kept[name]
            setattr(self, name, value.to(buffer.device))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}pending"] = self._pending().clone()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        """Take a checkpoint of a training without a share too, which has none of these names."""
        if any(name.startswith(prefix) for name in state_dict):
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            self._waiting, self._sums, self._has_pending = [], None, bool(self.pending.any())

    def __getstate__(self) -> dict[str, Any]:
        pending = self._pending().clone()
        buffers = self._buffers | {"pending": pending}
        changes: dict[str, Any] = {
            "_waiting": [],
            "_sums": None,
            "_buffers": buffers,
            "_has_pending": bool(pending.any()),
        }
        return self.__dict__ | changes


def _measurement(waiting: _Waiting) -> Tensor:
    """Return ``(3 * losses,)``: own and terms' sums of squares over the maps that a loss reads, and its factor.

    NaN where a gradient is.
    """
    own, *terms = cast(Tensor, waiting.sums.grad).flatten(1).unbind()
    own_squares = [torch.where(each == 0, torch.zeros_like(own), own).sum() for each in terms]
    return torch.cat([torch.stack([*own_squares, *(each.sum() for each in terms)]), waiting.factor.reshape(-1)])


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.requires_grad and leaf.is_floating_point()
