"""Backward passes that have no derivative of their own, and say so however one is asked for."""

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from .._numerics import recordable

__all__ = ["Sources", "first_order", "is_differentiated", "save"]

MESSAGE = (
    "an op of fbkd_ops has no second derivative: compute the gradient without create_graph=True, or the loss inside "
    "fbkd_ops.use_backend('reference'), which is plain PyTorch"
)


def is_differentiated(tensors: Iterable[Tensor]) -> bool:
    """Whether a derivative by one of the tensors is asked for: also a forward-mode one, which Functions refuse."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return True
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


class Sources(NamedTuple):
    """The inputs of a Function that learn and that it does not save, without their memory."""

    leaves: list[weakref.ref]
    others: Tensor | None  # empty, with their history


def save(ctx: Any, tensors: Iterable[Tensor | None], inputs: Iterable[Any]) -> None:
    """``ctx.save_for_backward(*tensors)``, and remember all ``inputs`` of the Function for :func:`first_order`."""
    tensors = [x if x is None else recordable(x) for x in tensors]
    ctx.save_for_backward(*tensors)
    ctx.sources = None if torch.compiler.is_compiling() else _sources(tensors, inputs)


def _sources(saved: list[Tensor | None], inputs: Iterable[Any]) -> Sources:
    saved_ids = set(map(id, saved))
    rest = [x for x in inputs if _learns(x) and id(x) not in saved_ids]
    others = [x for x in rest if not x.is_leaf]
    with torch.enable_grad():
        anchor = _Refusal.apply(0, *others) if others else None
    return Sources([weakref.ref(x) for x in rest if x.is_leaf], anchor)


def first_order(backward: Callable) -> Callable:
    """Decorate ``backward`` of a Function that calls :func:`save`: its gradients have no derivative.

    ``torch.autograd.function.once_differentiable`` cuts the gradients off from all that they depend on, so that
    ``torch.autograd.grad`` returns what ordinary autograd connects beside them as if it were all. Here a node that
    raises lies between the gradients and everything that they depend on.
    """

    @functools.wraps(backward)
    def wrapper(ctx, *grads):
        with torch.no_grad():
            gradients = backward(ctx, *grads)
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return gradients
        return _refusing(gradients, [*grads, *ctx.saved_tensors, *_present(ctx.sources)])

    return wrapper


def _present(sources: Sources) -> list[Tensor | None]:
    return [*(leaf() for leaf in sources.leaves), sources.others]


def _refusing(gradients: Any, sources: list[Tensor | None]) -> Any:
    """Return the gradients, with the sources as their history."""
    is_single = isinstance(gradients, Tensor)
    results = [gradients] if is_single else list(gradients)
    found = [index for index, gradient in enumerate(results) if gradient is not None]
    joined = _Refusal.apply(len(found), *(results[index] for index in found), *filter(_learns, sources))
    for index, gradient in zip(found, joined, strict=True):
        results[index] = gradient
    return results[0] if is_single else tuple(results)


def _learns(x: Any) -> bool:
    return isinstance(x, Tensor) and x.requires_grad


class _Refusal(torch.autograd.Function):
    """The first ``count`` tensors, or an empty one for none, with all tensors as their history."""

    @staticmethod
    def forward(ctx, count, *tensors):
        return tuple(x.view_as(x) for x in tensors[:count]) if count else tensors[0].new_empty(0)

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(MESSAGE)
