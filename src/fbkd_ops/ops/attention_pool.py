"""The four means of a pyramid's feature maps and their gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .._layout import empty_gradient, in_place_layout
from .._numerics import accumulation_dtype
from ..autograd.first_order import first_order, is_differentiated, save
from ..types import AttentionPool
from .registry import kernel, register

__all__ = ["AttentionPoolFunction", "attention_pools", "pools_of"]


def attention_pools(backend: str, features: list[Tensor]) -> list[AttentionPool]:
    """Both attention maps and both plain means of every ``(N, C, H, W)``, in one read and one launch."""
    if is_differentiated(features):
        return pools_of(AttentionPoolFunction.apply(backend, *features))
    # Without a gradient not through the Function: torch.compile hands it a wrong context for two levels (torch 2.14).
    return pools_of(kernel("attention_pool_forward", backend)([in_place_layout(x) for x in features]))


def pools_of(means: Sequence[Tensor]) -> list[AttentionPool]:
    """Return the ops' flat lists, four tensors a level."""
    return [AttentionPool(*means[first : first + 4]) for first in range(0, len(means), 4)]


class AttentionPoolFunction(torch.autograd.Function):
    """``dx = sign(x) * (g_sa / C + g_ca / HW) + g_sm / C + g_cm / HW``, absent gradients left out."""

    @staticmethod
    def forward(ctx, backend, *features):
        maps = [in_place_layout(x) for x in features]
        ctx.set_materialize_grads(False)
        save(ctx, maps, features)
        ctx.backend = backend
        return tuple(kernel("attention_pool_forward", backend)(maps))

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        saved = ctx.saved_tensors
        grads = [None if grad is None else grad.contiguous() for grad in grads]
        used = [level for level in range(len(grads) // 4) if any(g is not None for g in grads[4 * level :][:4])]
        gradients = [None] * (len(grads) // 4)
        if used:
            features = [saved[level] for level in used]
            given = [grad for level in used for grad in grads[4 * level :][:4]]
            for level, dx in zip(used, kernel("attention_pool_backward", ctx.backend)(features, given), strict=True):
                gradients[level] = dx
        return None, *gradients


def _fake_forward(features):
    means = []
    for x in features:
        images, channels, height, width = x.shape
        spatial, channel = (images, height, width), (images, channels)
        means += [x.new_empty(shape, dtype=accumulation_dtype(x)) for shape in (spatial, channel, spatial, channel)]
    return means


def _fake_backward(features, grads):
    return [empty_gradient(x) for x in features]


# The gradients are four a level, in the order of the means.
register(
    "attention_pool_forward",
    "(Tensor[] x) -> Tensor[]",
    _fake_forward,
    compiled=("cpu", "cuda"),
    triton="attention_pool",
)
register(
    "attention_pool_backward",
    "(Tensor[] x, Tensor?[] grads) -> Tensor[]",
    _fake_backward,
    compiled=("cpu", "cuda"),
    triton="attention_pool",
)
