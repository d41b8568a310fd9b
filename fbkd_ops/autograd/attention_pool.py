"""The four means of a feature map and their gradient, on any backend."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _extension, backends, reference
from .._layout import matrix_layout
from .._numerics import accumulation_dtype
from ..types import AttentionPool

__all__ = ["AttentionPoolFunction", "attention_pool"]

_SCHEMAS = {
    "attention_pool_forward": "(Tensor x) -> (Tensor, Tensor, Tensor, Tensor)",
    "attention_pool_backward": (
        "(Tensor x, Tensor? grad_spatial_attention, Tensor? grad_channel_attention, "
        "Tensor? grad_spatial_mean, Tensor? grad_channel_mean) -> Tensor"
    ),
}


def attention_pool(x: Tensor) -> AttentionPool:
    """Both attention maps and both plain means of ``x (N, C, H, W)`` in one read."""
    backend = backends.resolve("attention_pool", x)
    if backend == "reference":
        return reference.attention_pool(x)
    return AttentionPool(*AttentionPoolFunction.apply(x, backend))


class AttentionPoolFunction(torch.autograd.Function):
    """``dx = sign(x) * (g_sa / C + g_ca / HW) + g_sm / C + g_cm / HW``, absent gradients left out."""

    @staticmethod
    def forward(ctx, x, backend):
        if matrix_layout(x) is None:
            x = x.contiguous()
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x)
        ctx.backend = backend
        return _FORWARD[backend](x)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        if all(grad is None for grad in grads):
            return None, None
        (x,) = ctx.saved_tensors
        grads = [None if grad is None else grad.contiguous() for grad in grads]
        return _BACKWARD[ctx.backend](x, *grads), None


def _fake_forward(x):
    images, channels, height, width = x.shape
    dtype = accumulation_dtype(x)
    spatial = [x.new_empty((images, height, width), dtype=dtype) for _ in range(2)]
    channel = [x.new_empty((images, channels), dtype=dtype) for _ in range(2)]
    return spatial[0], channel[0], spatial[1], channel[1]


def _fake_backward(x, *grads):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=matrix_layout(x))


def _triton_forward(x):
    from ..kernels import attention_pool as kernels

    return kernels.attention_pool_forward(x)


def _triton_backward(x, *grads):
    from ..kernels import attention_pool as kernels

    return kernels.attention_pool_backward(x, *grads)


def _register_triton(name, launcher, fake):
    """An op around a launcher, so that torch.compile keeps it as one node."""
    _library.define(f"{name}_triton{_SCHEMAS[name]}")
    _library.impl(f"{name}_triton", launcher, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fbkd_ops::{name}_triton", fake)


_library = torch.library.Library("fbkd_ops", "FRAGMENT")
_register_triton("attention_pool_forward", _triton_forward, _fake_forward)
_register_triton("attention_pool_backward", _triton_backward, _fake_backward)
_FORWARD = {"triton": torch.ops.fbkd_ops.attention_pool_forward_triton.default}
_BACKWARD = {"triton": torch.ops.fbkd_ops.attention_pool_backward_triton.default}

if _extension.cpu.loaded:
    torch.library.register_fake("fbkd_ops::attention_pool_forward", _fake_forward)
    torch.library.register_fake("fbkd_ops::attention_pool_backward", _fake_backward)
    _FORWARD["cpu"] = _FORWARD["cuda"] = torch.ops.fbkd_ops.attention_pool_forward.default
    _BACKWARD["cpu"] = _BACKWARD["cuda"] = torch.ops.fbkd_ops.attention_pool_backward.default
