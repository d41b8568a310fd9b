"""How a non-local block compares pixels: one record of :data:`MODES` per mode.

A further mode is added here alone: its record, and its name in :data:`ModeName`.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..types import present
from .contiguous_gradient import contiguous_gradient

__all__ = ["MODES", "Mode", "ModeName", "Operands"]

ModeName = Literal["dot_product", "embedded_gaussian", "gaussian", "concatenation"]


class Operands(NamedTuple):
    """What pixels are compared by. ``L`` is the number of pixels, ``K`` that of the pooled ones."""

    theta: Tensor  # (N, c, L), or (N, C, L): x itself, in a mode that embeds nothing
    phi: Tensor  # (N, c, K), or (N, C, K)
    pair_weight: Tensor | None  # (2c,)
    use_scale: bool


class Mode(NamedTuple):
    """One way to compare pixels.

    Attributes:
        embeds: whether theta and phi are learned convolutions; else they are x and the pooled x.
        has_pair_weight: whether ``[theta_i; phi_j]`` is projected to a scalar by learned weights.
        has_scale: whether ``use_scale`` means something.
        collapses: whether the block is an affine map of x. Its ``attend`` is the matrix of that map, the others' is y.
        pairwise: the literal ``f(theta_i, phi_j)`` of the operands, ``(N, L, K)``, divided by K or summing to 1 over j.
        attend: from the operands and ``g (N, c, K)``, without the ``(L, K)`` matrix: ``y (N, c, L)``; of a mode that
            collapses ``(N, c, c)``, with ``y = attend^T theta``.
    """

    embeds: bool
    has_pair_weight: bool
    has_scale: bool
    collapses: bool
    pairwise: Callable[[Operands], Tensor]
    attend: Callable[[Operands, Tensor], Tensor]


def _dot_product_pairs(operands: Operands) -> Tensor:
    return operands.theta.mT @ operands.phi / operands.phi.shape[2]


def _dot_product(operands: Operands, g: Tensor) -> Tensor:
    """``y_i = sum_j (theta_i . phi_j) g_j / K = (sum_j phi_j g_j^T / K)^T theta_i``."""
    return torch.bmm(operands.phi, g.mT) / g.shape[2]


def _embedded_gaussian_pairs(operands: Operands) -> Tensor:
    products = operands.theta.mT @ operands.phi
    if operands.use_scale:
        products = products / operands.theta.shape[1] ** 0.5
    return torch.softmax(products, dim=2)


def _embedded_gaussian(operands: Operands, g: Tensor) -> Tensor:
    scale = operands.theta.shape[1] ** -0.5 if operands.use_scale else 1.0
    return _softmax_attention(operands.theta, operands.phi, g, scale)


def _gaussian_pairs(operands: Operands) -> Tensor:
    return torch.softmax(operands.theta.mT @ operands.phi, dim=2)


def _gaussian(operands: Operands, g: Tensor) -> Tensor:
    return _softmax_attention(operands.theta, operands.phi, g, 1.0)


def _softmax_attention(query: Tensor, key: Tensor, g: Tensor, scale: float) -> Tensor:
    """Return y of the two gaussian modes, ``(N, c, L)``: attention with one query per pixel and K keys."""
    # On a GPU the fused kernels read whole 16-byte vectors; PyTorch would fall back to one with a (L, K) matrix.
    width = -(-max(query.shape[1], g.shape[1]) // 8) * 8
    query, key, value = (_as_heads(vectors, width) for vectors in (query, key, g))
    y = F.scaled_dot_product_attention(query, key, value, scale=scale)  # (N, 1, L, width)
    # The CPU's fused backward took 4.4 times as long with a transposed gradient.
    y = contiguous_gradient(y)
    return y[:, 0, :, : g.shape[1]].mT


def _as_heads(vectors: Tensor, width: int) -> Tensor:
    """``(N, c, L)`` as one attention head ``(N, 1, L, width)``.

    The fused attention kernels want one width for queries, keys and values; zeros add nothing to a
    product, and the value's zeros are cut off again.
    """
    return F.pad(vectors.mT, (0, width - vectors.shape[1]))[:, None].contiguous()


def _concatenation_pairs(operands: Operands) -> Tensor:
    w_theta, w_phi = present(operands.pair_weight).chunk(2)
    a = torch.einsum("c,nci->ni", w_theta, operands.theta)
    b = torch.einsum("c,ncj->nj", w_phi, operands.phi)
    return torch.relu(a[:, :, None] + b[:, None, :]) / operands.phi.shape[2]


def _concatenation(operands: Operands, g: Tensor) -> Tensor:
    """``y_i = sum_j relu(a_i + b_j) g_j / K`` in time linear in the number of pixels.

    The j that count for pixel i are those with ``b_j > -a_i``: a suffix of the sorted b, so
    ``y_i = (a_i * G_i + B_i) / K`` with suffix sums of g and of b g, found by one binary search a pixel.
    """
    theta, phi = operands.theta, operands.phi
    n, inner, cells = g.shape
    w_theta, w_phi = present(operands.pair_weight).chunk(2)  # (c,), (c,)
    # In float64: a_i G_i and B_i cancel, and so do their gradients.
    a = torch.matmul(w_theta, theta).double()  # (N, L)
    b, order = torch.matmul(w_phi, phi).double().sort(dim=1)  # (N, K)
    g = g.double().gather(2, order[:, None].expand(n, inner, cells))
    # NaN passes relu, and so does its gradient: a NaN b counts for every pixel, for a NaN a every j does, and inf - inf
    # counts.
    finite = torch.finfo(torch.float64)
    rising = b.detach().masked_fill(b.isnan(), float("inf")).clamp(min=finite.min)
    limit = (-a.detach()).masked_fill(a.isnan(), float("-inf")).clamp(max=finite.max)
    first = torch.searchsorted(rising, limit, right=True)  # (N, L), in 0..K
    first = first[:, None].expand(n, inner, -1)
    g_sums = _suffix_sums(g).gather(2, first)  # (N, c, L)
    bg_sums = _suffix_sums(b[:, None] * g).gather(2, first)
    return ((a[:, None] * g_sums + bg_sums) / cells).to(theta.dtype)


def _suffix_sums(values: Tensor) -> Tensor:
    """``(N, c, K)`` to ``(N, c, K + 1)``: entry k is the sum from k on."""
    return F.pad(values.flip(2).cumsum(2).flip(2), (0, 1))


MODES = {
    "dot_product": Mode(
        embeds=True,
        has_pair_weight=False,
        has_scale=False,
        collapses=True,
        pairwise=_dot_product_pairs,
        attend=_dot_product,
    ),
    "embedded_gaussian": Mode(
        embeds=True,
        has_pair_weight=False,
        has_scale=True,
        collapses=False,
        pairwise=_embedded_gaussian_pairs,
        attend=_embedded_gaussian,
    ),
    "gaussian": Mode(
        embeds=False,
        has_pair_weight=False,
        has_scale=False,
        collapses=False,
        pairwise=_gaussian_pairs,
        attend=_gaussian,
    ),
    "concatenation": Mode(
        embeds=True,
        has_pair_weight=True,
        has_scale=False,
        collapses=False,
        pairwise=_concatenation_pairs,
        attend=_concatenation,
    ),
}
