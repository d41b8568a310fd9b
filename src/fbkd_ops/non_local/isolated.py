"""Plain PyTorch as one node of the graph, whose backward pass takes no notice of autocast."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .._numerics import recordable, without_autocast
from ..autograd.first_order import first_order, save

__all__ = ["isolated"]


def isolated(
    function: Callable[..., Tensor], tensors: Sequence[Tensor | None], memory_efficient: bool = False
) -> Tensor:
    """Return ``function(True, *tensors)``.

    Autograd would multiply in half precision where backward runs under autocast, as each of its nodes looks at that.

    Args:
        function: its first argument says whether this is the first time that it runs: not in a backward pass that
            computes it again.
        tensors: all that the result has a gradient of, and what else an in-place change would break.
        memory_efficient: keep the tensors alone for the backward pass, which then runs the function again.
    """
    if torch.compiler.is_compiling():  # its backward pass knows no autocast, and it decides what to compute again
        return function(True, *tensors)
    return _Isolated.apply(function, torch.is_grad_enabled() and not memory_efficient, *tensors)


class _Isolated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, function, keep, *tensors):
        ctx.function, ctx.graph = function, None
        save(ctx, tensors, tensors)
        if not keep or not any(ctx.needs_input_grad):
            return function(True, *tensors)
        tensors = [x if x is None else recordable(x) for x in tensors]
        ctx.graph = _graph(function, True, tensors, ctx.needs_input_grad[2:])
        return ctx.graph[1].detach()

    @staticmethod
    @first_order
    def backward(ctx, grad):
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        with without_autocast(grad):
            inputs, output = ctx.graph or _graph(ctx.function, False, tensors, needed)
            wanted = [x for x, is_needed in zip(inputs, needed, strict=True) if is_needed]
            keeps = torch._C._autograd._get_current_graph_task_keep_graph()
            found = iter(torch.autograd.grad(output, wanted, grad, retain_graph=keeps, allow_unused=True))
        return None, None, *(next(found) if is_needed else None for is_needed in needed)


def _graph(function, is_first: bool, tensors: Sequence[Tensor | None], needed: Sequence[bool]):
    """Leaves in place of the tensors, and what the function makes of them."""
    with torch.enable_grad():
        leaves = [
            x if x is None else x.detach().requires_grad_(wants) for x, wants in zip(tensors, needed, strict=True)
        ]
        return leaves, function(is_first, *leaves)
