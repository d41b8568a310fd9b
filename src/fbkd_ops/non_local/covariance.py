"""Means and covariances of vectors in float64, whose gradient needs no more memory than the vectors themselves."""

import torch
from torch import Tensor

from .._numerics import without_autocast
from ..autograd.first_order import first_order, save

__all__ = ["Covariance"]


class Covariance(torch.autograd.Function):
    """Mean ``(N, c, 1)`` and biased covariance ``(N, c, c)`` of ``vectors (N, c, L)``.

    With ``z = v - mean``: ``dv = (dS + dS^T) z / L + dmean / L``.
    """

    @staticmethod
    def forward(ctx, vectors, dtype):
        with without_autocast(vectors):
            center, covariance = _moments(vectors, dtype)
        save(ctx, [vectors, center], [vectors])
        return center, covariance

    @staticmethod
    @first_order
    def backward(ctx, center_gradient, covariance_gradient):
        vectors, center = ctx.saved_tensors
        pixels = vectors.shape[2]
        product = ((covariance_gradient + covariance_gradient.mT) / pixels).to(vectors.dtype)
        shift = (center_gradient / pixels).to(vectors.dtype).expand_as(vectors)
        with without_autocast(vectors):
            return torch.baddbmm(shift, product, vectors - center.to(vectors.dtype)), None


def _moments(vectors: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    pixels = vectors.shape[2]
    if vectors.dtype == dtype:
        center = vectors.mean(dim=2, keepdim=True)
        centered = vectors - center
        return center, torch.bmm(centered, centered.mT) / pixels
    vectors = vectors.to(dtype)  # squares of float32 lose nothing in float64, so that no pass has to centre them first
    center = vectors.sum(dim=2, keepdim=True) / pixels
    return center, torch.baddbmm(torch.bmm(center, center.mT), vectors, vectors.mT, beta=-1, alpha=1 / pixels)
