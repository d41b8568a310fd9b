"""The 1x1 convolutions of a non-local block as one product, whose backward adds to a gradient that is there already."""

import torch
from torch import Tensor

from .._numerics import without_autocast
from ..autograd.first_order import first_order, save

__all__ = ["bmm_in_layout", "projection"]


def bmm_in_layout(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """Return ``a @ b`` in the layout of ``like (N, C, L)``, channels side by side or not: nothing copies it later."""
    if like.stride(1) == 1 and like.shape[1] > 1:
        return torch.bmm(b.mT, a.mT).mT
    return torch.bmm(a, b)


def _add_product(to: Tensor | None, a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """``to + a @ b`` in the memory of ``to``, which nobody else holds; ``a @ b`` where there is none."""
    if to is None:
        return bmm_in_layout(a, b, like)
    if torch.compiler.is_compiling():  # it traces with a view in place of ``to``; its own buffers are reused anyway
        return torch.baddbmm(to, a, b)
    return to.baddbmm_(a, b)


class Projection(torch.autograd.Function):
    """``weight @ x + bias`` and x itself; what flows back into x joins ``dx = weight^T grad`` in one product."""

    @staticmethod
    def forward(
        ctx,
        x,  # (N, C, L)
        weight,  # (c, C)
        bias,  # (c,)
    ):
        ctx.set_materialize_grads(False)
        save(ctx, [x, weight], [x, weight, bias])
        projected = torch.baddbmm(bias[:, None], weight.expand(x.shape[0], -1, -1), x)
        return projected, x.view_as(x)

    @staticmethod
    @first_order
    def backward(ctx, grad, dx):
        x, weight = ctx.saved_tensors
        if grad is None:
            return dx, None, None
        with without_autocast(x):
            if ctx.needs_input_grad[0]:
                dx = _add_product(dx, weight.mT.expand(x.shape[0], -1, -1), grad, x)
            return dx, torch.bmm(grad, x.mT).sum(0), grad.sum((0, 2))


def projection(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """``weight @ x + bias (N, c, L)`` for ``x (N, C, L)``, and x for whatever else reads it.

    A gradient that reaches the returned x is added to in its own memory: it must come from an op that makes a new one.
    """
    projected, through = Projection.apply(x, weight, bias)
    return projected, through if x.requires_grad else x
