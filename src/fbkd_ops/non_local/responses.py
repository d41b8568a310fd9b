"""The non-local block without its ``(HW, K)`` matrix: memory and time linear in the number of pixels.

In every mode the block is an affine map of a few vectors a pixel, ``z = x + A r + b``, where the
*response* ``r`` is theta (``dot_product``) or y (the other modes). BatchNorm's statistics of ``A r`` follow
from the mean and the covariance of ``r``, so neither ``u = Wz y + bz`` nor the pair matrix is ever formed.
``docs/math.md`` derives each step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.non_local_statistics import StatisticsRequest, non_local_statistics
from ..types import NonLocalWeights, present, weights_of
from .batch_norm import Moments, scale_and_shift, uses_batch_statistics
from .covariance import Covariance
from .isolated import isolated
from .modes import MODES, Operands
from .parameters import Block, BlockSettings, as_matrices, block_tensors, with_tensors
from .pooling import max_pooled, pool_cells
from .projection import projection

__all__ = ["AffineNonLocal", "non_local", "stacked", "to_affine"]


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
    weights = weights_of(w if w is None else w.to(x.dtype) for w in as_matrices(weights))
    n, channels = x.shape[:2]
    bias = weights.out_bias if weights.out_bias is not None else x.new_zeros(channels)
    x, theta, phi, g = _projections(backend, x, weights, settings)  # (N, C, H, W), (N, c, L), (N, c, K), (N, c, K)
    mode = MODES[settings.mode]
    found = mode.attend(Operands(theta, phi, weights.pair_weight, settings.use_scale), g)
    if mode.collapses:
        return x, Response(theta, torch.matmul(weights.out_weight, found.mT), bias)
    return x, Response(found, weights.out_weight.expand(n, -1, -1), bias)


def _projections(
    backend: str, x: Tensor, weights: NonLocalWeights, settings: BlockSettings
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, theta of every pixel, and the pooled phi and g: x and pooled x in a mode that embeds nothing."""
    embeds = MODES[settings.mode].embeds
    fields, cells = ("g", "phi") if embeds else ("g",), pool_cells(x, settings)
    if backend == "torch" or cells == (1, 1, 1, 1):
        x, *parts = _convolved(x, weights, (*fields, "theta") if embeds else fields)
        pooled = [max_pooled(part, settings) for part in parts[: len(fields)]]
        parts = [*pooled, *parts[len(fields) :]]
    else:
        x, *parts = _convolved_and_pooled(backend, x, weights, fields, cells)
        if embeds:
            x, theta = _convolved(x, weights, ("theta",))
            parts = [*parts, theta]  # no append: torch.compile of torch 2.11 makes a tuple of a starred target
    if not embeds:
        return x, x.flatten(2), max_pooled(x, settings), parts[0]
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
    return statistics.x, *present(statistics.pooled).chunk(len(fields), dim=1)


def stacked(weights: NonLocalWeights, fields: tuple[str, ...], part: str) -> Tensor:
    """Return the ``"weight"`` or ``"bias"`` of several convolutions as that of one."""
    return torch.cat([getattr(weights, f"{field}_{part}") for field in fields])


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
    """Mean and biased variance of ``u`` over each image's pixels, from those of the response.

    In float64 where the device has it: a channel of u may be far smaller than the response that it is a sum of.
    """
    dtype = block.vectors.dtype if block.vectors.device.type == "mps" else torch.float64
    center, covariance = Covariance.apply(block.vectors, dtype)
    matrix, bias = block.matrix.to(dtype), block.bias.to(dtype)
    image_means = torch.bmm(matrix, center)[:, :, 0] + bias  # (N, C)
    return Moments(image_means, (torch.bmm(matrix, covariance) * matrix).sum(dim=2), block.vectors.shape[2])
