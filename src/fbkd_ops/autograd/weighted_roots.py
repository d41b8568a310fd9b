"""Weighted sums of roots: what becomes of every level's sum of squares in the loss."""

import torch
from torch import Tensor

__all__ = ["WeightedRootsFunction", "weighted_roots"]


def weighted_roots(squares: Tensor, scale: Tensor, counts: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Return the roots and the terms: ``scale * sqrt(squares)`` summed over the levels of each.

    Args:
        squares: ``(K,)``, the levels of one term after those of another.
        scale: ``(K,)``, what each root is multiplied with. No gradient.
        counts: how many levels each term has.

    Returns:
        The roots ``(K,)``, without gradient, and one scalar per term. The gradient at a root of exactly 0 is 0; NaN
        stays NaN.
    """
    roots, *terms = WeightedRootsFunction.apply(squares, scale, counts)
    return roots, terms


class WeightedRootsFunction(torch.autograd.Function):
    """``dsquares = g scale / (2 sqrt(squares))``.

    That is differentiable itself, so that a second derivative gets as far as the ops that refuse it.
    """

    @staticmethod
    def forward(ctx, squares, scale, counts):
        roots = squares.sqrt()
        ctx.save_for_backward(squares, scale)
        ctx.counts = counts
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(roots)
        return roots, *(part.sum() for part in (scale * roots).split(counts))

    @staticmethod
    def backward(ctx, _, *grads):
        squares, scale = ctx.saved_tensors
        pairs = zip(grads, ctx.counts, strict=True)
        grad = torch.cat([scale.new_zeros(count) if grad is None else grad.expand(count) for grad, count in pairs])
        roots = squares.masked_fill(squares == 0, float("inf")).sqrt()
        return grad * scale / (2 * roots), None, None
