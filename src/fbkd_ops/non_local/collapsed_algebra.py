"""The algebra of ``dot_product`` non-local blocks as affine maps of a pixel, ``z = x + V W x + o``, and its gradients.

The map follows from three things that one read of the features gives: the pooled phi and g, the mean of the pixels and
their covariance. Everything else is products of matrices of at most ``(C, C)``, here for ``B`` blocks of one width at a
time, stacked. ``docs/math.md`` derives each step; the gradients are written out because autograd would take hundreds of
small nodes.

The *moments* of a map are ``2 + r`` rows of C: zeros, the mean of the pixels, and the covariance of ``projection @ x``
with x. Projected, with the bias added to the first two, they are the *probes*: theta of x = 0, theta's mean and theta's
covariance, which is all that BatchNorm needs to know.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "UnscaledGradients",
    "all_pairs",
    "all_pairs_gradient",
    "fill_covariances",
    "map_gradient",
    "pooled_gradients",
    "pooled_pairs",
    "probe_values",
    "project_moments",
    "projection_gradients",
    "scaled_matrices",
    "theta_probes",
    "unscaled_gradients",
    "unscaled_matrices",
]


def fill_covariances(rows: Tensor, projections: Tensor, covariances: Tensor) -> None:
    """Write ``projection Cov(x)`` into rows ``(B, N, r, C)``, from ``(B, r, C)`` and ``(B, N, C, C)``."""
    factors = projections[:, None].expand(-1, rows.shape[1], -1, -1).reshape(-1, *projections.shape[1:])
    rows.flatten(0, 1).baddbmm_(factors, covariances.flatten(0, 1), beta=0)


def project_moments(moments: Tensor, projections: Tensor) -> Tensor:
    """Project moments ``(B, N, 2 + r, C)`` to probes ``(B, N, 2 + r, r)``, without the bias of their first two rows."""
    return torch.bmm(moments.flatten(1, 2), projections.mT).unflatten(1, moments.shape[1:3])


def theta_probes(probes: Tensor, inner: int, normalises: bool) -> Tensor:
    """Theta's part of the probes ``(B, N, rows, c)``: all rows, or the bias alone where no norm takes the moments."""
    return probes[:, :, : 2 + inner if normalises else 1, :inner]


def pooled_pairs(pooled: Tensor, cells: list[int]) -> Tensor:
    """``M = sum_j phi_j g_j^T / K (B, N, c, c)``, from phi and g ``(B, N, 2c, K)``.

    Blocks of fewer ``cells`` than others have zeros behind them.
    """
    phi, g = pooled.flatten(0, 1).chunk(2, dim=1)
    pairs = pooled.new_empty(phi.shape[0], phi.shape[1], phi.shape[1])
    pairs.baddbmm_(phi, g.mT, beta=0, alpha=_factor(cells))
    return _divided(pairs.unflatten(0, pooled.shape[:2]), cells)


def pooled_gradients(pairs_gradient: Tensor, pooled: Tensor, cells: list[int]) -> Tensor:
    """Return the gradient of the pooled phi and g ``(B, N, 2c, K)``, given that of the pairs ``(B, N, c, c)``."""
    gradient, pairs = torch.empty_like(pooled), pairs_gradient.flatten(0, 1)
    (to_phi, to_g), (phi, g) = (x.flatten(0, 1).chunk(2, dim=1) for x in (gradient, pooled))
    to_phi.baddbmm_(pairs, g, beta=0, alpha=_factor(cells))
    to_g.baddbmm_(pairs.mT, phi, beta=0, alpha=_factor(cells))
    return _divided(gradient, cells)


def _factor(cells: list[int]) -> float:
    """``1 / K``, if that is the same for all blocks: then it costs nothing."""
    return 1 / cells[0] if min(cells) == max(cells) else 1.0


def _divided(blocks: Tensor, cells: list[int]) -> Tensor:
    """Each block ``(B, ...)`` over its number of cells, if these differ; in place."""
    if min(cells) != max(cells):
        torch._foreach_mul_(list(blocks.unbind()), [1 / count for count in cells])
    return blocks


def all_pairs(probes: Tensor, inner: int) -> Tensor:
    """Return the same pairs over all pixels: the covariance of phi and g, and the product of their means."""
    parts = _PhiAndG(probes, inner)
    pairs = torch.baddbmm(parts.covariance.flatten(0, 1), _columns(parts.phi), _columns(parts.g).mT)
    return pairs.unflatten(0, probes.shape[:2])


def all_pairs_gradient(theta_gradient: Tensor, pairs_gradient: Tensor, probes: Tensor, inner: int) -> Tensor:
    """Return the gradient of the probes of all three convolutions, given that of theta's and of the pairs.

    As in :class:`UnscaledGradients`, that of a covariance is the sum of the gradient and its transpose.
    """
    gradient, parts = torch.zeros_like(probes), _PhiAndG(probes, inner)
    theta_probes(gradient, inner, theta_gradient.shape[2] > 1).copy_(theta_gradient)
    filled = _PhiAndG(gradient, inner)
    filled.covariance.copy_(pairs_gradient)
    filled.transposed.copy_(pairs_gradient.mT)
    filled.phi.copy_(torch.matmul(pairs_gradient, parts.g[..., None])[..., 0])
    filled.g.copy_(torch.matmul(pairs_gradient.mT, parts.phi[..., None])[..., 0])
    return gradient


class _PhiAndG:
    """Views of the probes ``(B, N, 2 + 3c, 3c)`` of theta, phi and g."""

    def __init__(self, probes: Tensor, inner: int):
        phi, g = slice(inner, 2 * inner), slice(2 * inner, 3 * inner)
        self.phi, self.g = probes[:, :, 1, phi], probes[:, :, 1, g]  # the means (B, N, c)
        rows = probes[:, :, 2:]
        self.covariance, self.transposed = rows[:, :, phi, g], rows[:, :, g, phi]  # (B, N, c, c)


def _columns(vectors: Tensor) -> Tensor:
    """``(B, N, c)`` as ``(B * N, c, 1)``."""
    return vectors.flatten(0, 1)[:, :, None]


def unscaled_matrices(pairs: Tensor, out_weights: Tensor) -> Tensor:
    """``(Wz M^T)^T = M Wz^T (B, N, c, C)``: the block's matrix before its norm, transposed."""
    return torch.bmm(pairs.flatten(1, 2), out_weights.mT).unflatten(1, pairs.shape[1:3])


def probe_values(probes: Tensor, unscaled: Tensor) -> Tensor:
    """Return the blocks' results for theta's probes, ``(B, N, rows, C)``."""
    return torch.bmm(probes.flatten(0, 1), unscaled.flatten(0, 1)).unflatten(0, unscaled.shape[:2])


def scaled_matrices(unscaled: Tensor, scale: Tensor | None) -> Tensor:
    """``V (B, N, C, c)``, the matrix after a norm that scales channels by ``scale (B, C)``."""
    if scale is None:
        return unscaled.mT.contiguous()
    return torch.mul(unscaled.mT, scale[:, None, :, None], out=torch.empty_like(unscaled).view(unscaled.mT.shape))


class UnscaledGradients(NamedTuple):
    """Gradients of what the matrices before the norm are made of."""

    probes: Tensor  # theta's (B, N, rows, c); of a covariance the sum of the gradient and its transpose
    pairs: Tensor  # (B, N, c, c)
    out_weights: Tensor  # (B, C, c)


def unscaled_gradients(
    through: Tensor,  # of the matrices before the norm by way of those after it (B, N, c, C)
    rows: list[Tensor],  # of the values of theta's probes (B, N, rows, C), one after the other
    unscaled: Tensor,
    probes: Tensor,  # theta's
    pairs: Tensor,
    out_weights: Tensor,
) -> UnscaledGradients:
    """One product with the probes, and one with the matrices, for values and variances together."""
    outer = (rows[0] if len(rows) == 1 else torch.cat(rows, dim=2)).flatten(0, 1)  # (B * N, rows, C)
    gradient = torch.baddbmm(through.flatten(0, 1), probes.flatten(0, 1).mT, outer)  # (B * N, c, C)
    of_probes = torch.bmm(outer, unscaled.flatten(0, 1).mT).unflatten(0, unscaled.shape[:2])
    stacked = gradient.unflatten(0, unscaled.shape[:2]).flatten(1, 2)  # (B, N * c, C)
    of_pairs = torch.bmm(stacked, out_weights).unflatten(1, pairs.shape[1:3])
    return UnscaledGradients(of_probes, of_pairs, torch.bmm(stacked.mT, pairs.flatten(1, 2)))


def projection_gradients(theta_gradient: Tensor, probe_gradient: Tensor, moments: Tensor) -> Tensor:
    """``(B, r, C)``, given that of theta's weight as the matrices' factor ``(B, c, C)`` and that of the probes."""
    left, right = probe_gradient.flatten(1, 2).mT, moments.flatten(1, 2)
    inner = theta_gradient.shape[1]
    if left.shape[1] == inner:
        return torch.baddbmm(theta_gradient, left, right)
    gradient = torch.bmm(left, right)
    gradient[:, :inner].add_(theta_gradient)
    return gradient


def map_gradient(probe_gradient: Tensor, projection: Tensor, pixels: int, projects: bool) -> tuple[Tensor, Tensor]:
    """Return the gradient of one map as ``inner (x - mean) + shift``: ``inner (N, C, C)`` and ``shift (N, C)``.

    Args:
        probe_gradient: ``(N, 2 + r, r)``.
        projection: ``(r, C)``.
        pixels: of the map.
        projects: whether ``inner`` stays without the projection's transpose before it, ``(N, r, C)``.
    """
    images, rank = probe_gradient.shape[0], projection.shape[0]
    rows = projection.new_empty(images, 1 + rank, projection.shape[1])
    rows.baddbmm_(probe_gradient[:, 1:], projection.expand(images, -1, -1), beta=0, alpha=1 / pixels)
    shift, inner = rows[:, 0], rows[:, 1:]
    return inner if projects else torch.bmm(projection.mT.expand(images, -1, -1), inner), shift
