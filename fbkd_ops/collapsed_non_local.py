"""The ``dot_product`` non-local block as one affine map of each pixel, ``z = x + matrix @ (projection @ x) + offset``.

The map follows from three things that one read of the features gives: the pooled phi and g, the mean of the pixels and
their covariance. Everything else is products of matrices of at most ``(C, C)``. ``docs/math.md`` derives each step.
"""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from ._batch_norm import Moments, scale_and_shift, uses_batch_statistics
from ._numerics import accumulation_dtype
from .autograd.attention_pool import attention_pools
from .autograd.non_local_statistics import NO_POOL, MapStatistics, StatisticsRequest, non_local_statistics
from .linear_non_local import Block, pool_cells, stacked
from .types import NonLocalWeights

__all__ = ["CollapsedNonLocal", "collapse"]


class CollapsedNonLocal(NamedTuple):
    """The block as ``z = x + matrix @ (projection @ x) + offset``."""

    matrix: Tensor  # (N, C, c)
    projection: Tensor  # theta's weight (c, C)
    offset: Tensor  # (N, C)


def collapse(
    backend: str,
    maps: list[Tensor],  # (N, C, H, W)
    blocks: list[Block],
    means: list[Optional[Tensor]],  # (N, C) of the maps over pixels, None where not known yet
) -> list[tuple[Tensor, CollapsedNonLocal]]:
    """Each map, for what the caller's own gradient flows into, and its block. Updates the norms' running statistics.

    What flows back into a returned map is added to in place: it must come from an op that keeps no hold of it.
    """
    blocks = [block._replace(weights=_as(accumulation_dtype(x), block.weights)) for x, block in zip(maps, blocks)]
    requests = [_request(x, mean, block) for x, mean, block in zip(maps, means, blocks)]
    statistics = non_local_statistics(backend, requests)
    return [(s.x, _collapse(s, request, block)) for s, request, block in zip(statistics, requests, blocks)]


def _as(dtype: torch.dtype, weights: NonLocalWeights) -> NonLocalWeights:
    return NonLocalWeights(*(w if w is None else w.to(dtype) for w in weights))


def _pools(x: Tensor, block: Block) -> bool:
    return pool_cells(x, block.settings) != (1, 1, 1, 1)


def _request(x: Tensor, mean: Optional[Tensor], block: Block) -> StatisticsRequest:
    weights, pools = block.weights, _pools(x, block)
    pooled = {}
    if pools:
        weight, bias = (stacked(weights, ("phi", "g"), part) for part in ("weight", "bias"))
        pooled = dict(weight=weight, bias=bias, pool=pool_cells(x, block.settings))
    if pools and not uses_batch_statistics(block.norm):
        return StatisticsRequest(x, **pooled)
    if mean is None:
        (pool,) = attention_pools([x.detach()])
        mean = pool.channel_mean
    projection = weights.theta_weight if pools else stacked(weights, ("theta", "phi", "g"), "weight")
    # Two products with the projection's rows, or one with the map's, of which symmetry saves a quarter.
    narrow = 2 * projection.shape[0] < x.shape[1]
    return StatisticsRequest(x, mean.detach().to(projection.dtype), projection if narrow else None, **pooled)


def _collapse(statistics: MapStatistics, request: StatisticsRequest, block: Block) -> CollapsedNonLocal:
    weights, norm = block.weights, block.norm
    pairs = _pooled_pairs(statistics.pooled) if request.pool != NO_POOL else _all_pairs(statistics, request, weights)
    matrix = torch.matmul(weights.out_weight, pairs.mT)  # (N, C, c)
    offset = torch.matmul(matrix, weights.theta_bias)  # (N, C)
    if weights.out_bias is not None:
        offset = offset + weights.out_bias
    if norm is None:
        return CollapsedNonLocal(matrix, weights.theta_weight, offset)
    moments = None
    if uses_batch_statistics(norm):
        theta = torch.matmul(statistics.mean, weights.theta_weight.mT)  # (N, c), without the bias
        covariance = _theta_covariance(statistics.covariance, request, weights)
        image_means = torch.bmm(matrix, theta[:, :, None])[:, :, 0] + offset
        pixels = request.x.shape[2] * request.x.shape[3]
        moments = Moments(image_means, (torch.bmm(matrix, covariance) * matrix).sum(dim=2), pixels)
    scale, shift = scale_and_shift(norm, moments, matrix)
    return CollapsedNonLocal(scale[:, None] * matrix, weights.theta_weight, scale * offset + shift)


def _pooled_pairs(pooled: Tensor) -> Tensor:
    """``sum_j phi_j g_j^T / K``, ``(N, c, c)``, from phi and g ``(N, 2c, K)``."""
    phi, g = pooled.chunk(2, dim=1)
    return torch.bmm(phi, g.mT) / g.shape[2]


def _all_pairs(statistics: MapStatistics, request: StatisticsRequest, weights: NonLocalWeights) -> Tensor:
    """The same over all pixels: the covariance of phi and g, and the product of their means."""
    inner = weights.g_bias.shape[0]
    if request.projection is None:
        covariance = torch.matmul(torch.matmul(weights.phi_weight, statistics.covariance), weights.g_weight.mT)
    else:
        covariance = statistics.covariance[:, inner : 2 * inner, 2 * inner :]
    phi = torch.matmul(statistics.mean, weights.phi_weight.mT) + weights.phi_bias  # (N, c)
    g = torch.matmul(statistics.mean, weights.g_weight.mT) + weights.g_bias
    return covariance + phi[:, :, None] * g[:, None, :]


def _theta_covariance(covariance: Tensor, request: StatisticsRequest, weights: NonLocalWeights) -> Tensor:
    """Of theta over each image's pixels, ``(N, c, c)``."""
    if request.projection is None:
        return torch.matmul(torch.matmul(weights.theta_weight, covariance), weights.theta_weight.mT)
    inner = weights.g_bias.shape[0]
    return covariance[:, :inner, :inner]
