"""The non-local block without its ``(HW, K)`` matrix: memory and time linear in the number of pixels.

In every mode the block is an affine map of a few vectors a pixel, ``z = x + A r + b``, where the
*response* ``r`` is theta (``dot_product``) or y (the other modes). BatchNorm's statistics of ``A r`` follow
from the mean and the covariance of ``r``, so neither ``u = Wz y + bz`` nor the pair matrix is ever formed.
``docs/math.md`` derives each step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.non_local_statistics import StatisticsRequest, non_local_statistics
from ..reference import max_pool, pool_kernels
from ..types import NonLocalWeights
from .batch_norm import Moments, scale_and_shift, uses_batch_statistics
from .contiguous_gradient import contiguous_gradient
from .isolated import isolated
from .projection import projection

__all__ = [
    "AffineNonLocal",
    "Block",
    "BlockSettings",
    "as_matrices",
    "block_tensors",
    "non_local",
    "pool_cells",
    "stacked",
    "to_affine",
    "with_tensors",
]


@dataclass(frozen=True)
class BlockSettings:
    """How a non-local block compares pixels; see :class:`fbkd_ops.presets.LevelSettings`."""

    mode: str = "dot_product"
    stride: int = 1
    pool_order: str = "single"
    use_scale: bool = True


class Block(NamedTuple):
    """A non-local block: its convolutions, how it compares pixels, its norm if it has one.

    The convolutions' weights are matrices ``(out, in)``, or ``(out, in, 1, 1)`` as the layers hold them.
    """

    weights: NonLocalWeights
    settings: BlockSettings
    norm: nn.Module | None = None
    norm_parameters: tuple[Tensor | None, Tensor | None] | None = None  # weight and bias in place of its own
    updates_statistics: bool = True  # False: those of the norm have seen this batch already


def block_tensors(block: Block) -> list[Tensor | None]:
    """All of a block that learns."""
    return [*block.weights, *((None, None) if block.norm is None else (block.norm.weight, block.norm.bias))]


def with_tensors(block: Block, tensors: Sequence[Tensor | None], updates_statistics: bool) -> Block:
    """Return the block with other tensors in place of its :func:`block_tensors`."""
    *weights, norm_weight, norm_bias = tensors
    return Block(NonLocalWeights(*weights), block.settings, block.norm, (norm_weight, norm_bias), updates_statistics)


class Response(NamedTuple):
    """What the block adds to x before normalisation: ``u = matrix @ vectors + bias``."""

    vectors: Tensor  # (N, c, L): theta in dot_product mode, y in the others
    matrix: Tensor  # (N, C, c)
    bias: Tensor  # (C,)


class AffineNonLocal(NamedTuple):
    """The block as ``z = x + matrix @ vectors + offset``."""

    vectors: Tensor  # (N, c, L)
    matrix: Tensor  # (N, C, c)
    offset: Tensor  # (N, C)


def as_matrices(weights: NonLocalWeights) -> NonLocalWeights:
    """Return the convolutions' weights as matrices."""
    return NonLocalWeights(*(w.flatten(1) if w is not None and w.dim() == 4 else w for w in weights))


def non_local(
    backend: str,
    x: Tensor,  # (N, C, H, W)
    block: Block,
) -> Tensor:
    """``z (N, C, H, W)`` of the block."""

    def output(is_first: bool, x: Tensor, *tensors: Tensor | None) -> Tensor:
        affine = to_affine(backend, x, with_tensors(block, tensors, is_first))[1]
        added = torch.baddbmm(affine.offset[:, :, None], affine.matrix, affine.vectors)  # (N, C, L)
        return x + added.reshape(x.shape)

    return isolated(output, [x, *block_tensors(block)])


def to_affine(backend: str, x: Tensor, block: Block) -> tuple[Tensor, AffineNonLocal]:
    """Return x for all further reads, whose gradient is added in place, and the block of ``x (N, C, H, W)``."""
    x, found = response(backend, x, block.weights, block.settings)
    return x, _normalized(found, block)


def response(backend: str, x: Tensor, weights: NonLocalWeights, settings: BlockSettings) -> tuple[Tensor, Response]:
    """Return x for all further reads, and the block's response to ``x (N, C, H, W)``.

    What flows back into the returned x is added to in place: it must come from an op that keeps no hold of it.
    """
    weights = NonLocalWeights(*(w if w is None else w.to(x.dtype) for w in as_matrices(weights)))
    n, channels = x.shape[:2]
    bias = weights.out_bias if weights.out_bias is not None else x.new_zeros(channels)
    x, theta, phi, g = _projections(backend, x, weights, settings)  # (N, C, H, W), (N, c, L), (N, c, K), (N, c, K)
    if settings.mode == "dot_product":
        pairs = torch.bmm(phi, g.mT) / g.shape[2]  # (N, c, c)
        return x, Response(theta, torch.matmul(weights.out_weight, pairs.mT), bias)
    if settings.mode == "concatenation":
        y = _concatenation(theta, phi, g, weights.pair_weight)
    else:
        y = _softmax_attention(theta, phi, g, settings)
    return x, Response(y, weights.out_weight.expand(n, -1, -1), bias)


def _projections(
    backend: str, x: Tensor, weights: NonLocalWeights, settings: BlockSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, the query of every pixel (theta, or x in ``gaussian`` mode), and the pooled keys and g."""
    gaussian = settings.mode == "gaussian"
    fields, cells = ("g",) if gaussian else ("g", "phi"), pool_cells(x, settings)
    if backend == "torch" or cells == (1, 1, 1, 1):
        x, *parts = _convolved(x, weights, fields if gaussian else (*fields, "theta"))
        pooled = [_pooled(part, settings) for part in parts[: len(fields)]]
        parts = [*pooled, *parts[len(fields) :]]
    else:
        x, *parts = _convolved_and_pooled(backend, x, weights, fields, cells)
        if not gaussian:
            x, theta = _convolved(x, weights, ("theta",))
            parts = [*parts, theta]  # no append: torch.compile of torch 2.11 makes a tuple of a starred target
    if gaussian:
        return x, x.flatten(2), _pooled(x, settings), parts[0]
    g, phi, theta = parts
    return x, theta.flatten(2), phi, g


def _convolved(x: Tensor, weights: NonLocalWeights, fields: tuple[str, ...]) -> tuple[Tensor, ...]:
    """Return x and its convolutions, each ``(N, c, H, W)``, from one product."""
    projected, flat = projection(x.flatten(2), stacked(weights, fields, "weight"), stacked(weights, fields, "bias"))
    return flat.reshape(x.shape), *projected.unflatten(2, x.shape[2:]).chunk(len(fields), dim=1)


def _convolved_and_pooled(
    backend: str, x: Tensor, weights: NonLocalWeights, fields: tuple[str, ...], cells: tuple[int, int, int, int]
) -> tuple[Tensor, ...]:
    """Return x and its pooled convolutions, each ``(N, c, K)``, from one read."""
    weight, bias = stacked(weights, fields, "weight"), stacked(weights, fields, "bias")
    (statistics,) = non_local_statistics(backend, [StatisticsRequest(x, weight=weight, bias=bias, pool=cells)])
    return statistics.x, *statistics.pooled.chunk(len(fields), dim=1)


def stacked(weights: NonLocalWeights, fields: tuple[str, ...], part: str) -> Tensor:
    """Return the ``"weight"`` or ``"bias"`` of several convolutions as that of one."""
    return torch.cat([getattr(weights, f"{field}_{part}") for field in fields])


def pool_cells(x: Tensor, settings: BlockSettings) -> tuple[int, int, int, int]:
    """Height and width of the cells that ``x (N, C, H, W)`` is pooled by, and of the first pool's cells."""
    kernels = pool_kernels(x.shape[2:], settings.stride, settings.pool_order)
    if not kernels:
        return 1, 1, 1, 1
    first, last = kernels[0], kernels[-1] if len(kernels) > 1 else (1, 1)
    return first[0] * last[0], first[1] * last[1], *first


def _pooled(x: Tensor, settings: BlockSettings) -> Tensor:
    """``x (N, c, H, W)`` max-pooled, ``(N, c, K)``."""
    return max_pool(x, settings.stride, settings.pool_order).flatten(2)


def _softmax_attention(query: Tensor, key: Tensor, g: Tensor, settings: BlockSettings) -> Tensor:
    """Return y of the two gaussian modes, ``(N, c, L)``: attention with one query per pixel and K keys."""
    scaled = settings.mode == "embedded_gaussian" and settings.use_scale
    scale = query.shape[1] ** -0.5 if scaled else 1.0
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


def _concatenation(theta: Tensor, phi: Tensor, g: Tensor, pair_weight: Tensor) -> Tensor:
    """Return y of ``concatenation`` mode, ``(N, c, L)``: ``y_i = sum_j relu(a_i + b_j) g_j / K``.

    The j that count for pixel i are those with ``b_j > -a_i``: a suffix of the sorted b, so
    ``y_i = (a_i * G_i + B_i) / K`` with suffix sums of g and of b g, found by one binary search a pixel.
    """
    n, inner, cells = g.shape
    w_theta, w_phi = pair_weight.chunk(2)  # (c,), (c,)
    a = torch.matmul(w_theta, theta)  # (N, L)
    b, order = torch.matmul(w_phi, phi).sort(dim=1)  # (N, K)
    g = g.gather(2, order[:, None].expand(n, inner, cells))
    # NaN passes relu, and so does its gradient: a NaN b counts for every pixel, for a NaN a every j does.
    rising = b.detach().masked_fill(b.isnan(), float("inf"))
    limit = (-a.detach()).masked_fill(a.isnan(), float("-inf"))
    first = torch.searchsorted(rising, limit, right=True)  # (N, L), in 0..K
    first = first[:, None].expand(n, inner, -1)
    g_sums = _suffix_sums(g).gather(2, first)  # (N, c, L)
    bg_sums = _suffix_sums(b[:, None] * g).gather(2, first)
    return ((a[:, None] * g_sums + bg_sums) / cells).to(theta.dtype)


def _suffix_sums(values: Tensor) -> Tensor:
    """``(N, c, K)`` to ``(N, c, K + 1)``: entry k is the sum from k on, in float64 against cancellation."""
    sums = values.double().flip(2).cumsum(2).flip(2)
    return F.pad(sums, (0, 1))


def _normalized(found: Response, block: Block) -> AffineNonLocal:
    """Fold the normalisation of ``u`` into the affine map, and update its running statistics."""
    vectors, matrix, bias = found
    n, channels = matrix.shape[:2]
    if block.norm is None:
        return AffineNonLocal(vectors, matrix, bias.expand(n, channels))
    moments = _moments(found) if uses_batch_statistics(block.norm) else None
    scale, shift = scale_and_shift(block.norm, moments, matrix, block.norm_parameters, block.updates_statistics)
    return AffineNonLocal(vectors, scale[:, None] * matrix, (scale * bias + shift).expand(n, channels))


def _moments(block: Response) -> Moments:
    """Mean and biased variance of ``u`` over each image's pixels, from those of the response."""
    vectors, matrix, bias = block
    pixels = vectors.shape[2]
    center = vectors.mean(dim=2, keepdim=True)  # (N, c, 1)
    centered = vectors - center
    covariance = torch.bmm(centered, centered.mT) / pixels  # (N, c, c)
    image_means = torch.bmm(matrix, center)[:, :, 0] + bias  # (N, C)
    return Moments(image_means, (torch.bmm(matrix, covariance) * matrix).sum(dim=2), pixels)
