"""The non-local block without its ``(HW, K)`` matrix: memory and time linear in the number of pixels.

In every mode the block is an affine map of a few vectors a pixel, ``z = x + A r + b``, where the
*response* ``r`` is theta (``dot_product``) or y (the other modes). BatchNorm's statistics of ``A r`` follow
from the mean and the covariance of ``r``, so neither ``u = Wz y + bz`` nor the pair matrix is ever formed.
``docs/math.md`` derives each step.
"""

from dataclasses import dataclass
from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._numerics import root
from .autograd.contiguous_gradient import contiguous_gradient
from .autograd.projection import projection
from .autograd.relation_residual import relation_residual
from .reference import max_pool
from .types import NonLocalWeights

__all__ = ["AffineNonLocal", "BlockSettings", "Response", "non_local", "relation_loss", "response", "to_affine"]


@dataclass(frozen=True)
class BlockSettings:
    """How a non-local block compares pixels; see :class:`fbkd_ops.presets.LevelSettings`."""

    mode: str = "dot_product"
    stride: int = 1
    pool_order: str = "single"
    use_scale: bool = True


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
    x: Tensor,  # (N, C, H, W)
    weights: NonLocalWeights,
    settings: BlockSettings,
    norm: Optional[nn.BatchNorm2d],
) -> Tensor:
    """``z (N, C, H, W)`` of the block."""
    block = to_affine(response(x, weights, settings)[1], norm)
    added = torch.baddbmm(block.offset[:, :, None], block.matrix, block.vectors)  # (N, C, L)
    return x + added.reshape(x.shape)


def relation_loss(
    student: Tensor,  # (N, Cs, H, W)
    teacher: Tensor,  # (N, Ct, H, W)
    student_weights: NonLocalWeights,
    teacher_weights: NonLocalWeights,
    adaptation_weight: Tensor,  # B (Ct, Cs)
    adaptation_bias: Tensor,  # (Ct,)
    settings: BlockSettings,
    student_norm: Optional[nn.BatchNorm2d],
    teacher_norm: Optional[nn.BatchNorm2d],
) -> Tensor:
    """``|| NL_t(T) - B(NL_s(S)) ||`` over the whole batch, without either z."""
    student, s = response(student, student_weights, settings)
    teacher, t = response(teacher, teacher_weights, settings)
    s, t = to_affine(s, student_norm), to_affine(t, teacher_norm)
    squares = relation_residual(
        student.flatten(2),
        adaptation_weight,
        s.vectors,
        torch.matmul(adaptation_weight, s.matrix),  # (N, Ct, cs)
        teacher.flatten(2),
        t.vectors,
        t.matrix,
        t.offset - torch.matmul(s.offset, adaptation_weight.mT) - adaptation_bias,  # (N, Ct)
    )
    return root(squares)


def response(x: Tensor, weights: NonLocalWeights, settings: BlockSettings) -> tuple[Tensor, Response]:
    """x for what the caller's own gradient flows into, and the block's response to ``x (N, C, H, W)``.

    What flows back into the returned x is added to in place: it must come from an op that keeps no hold of it.
    """
    weights = NonLocalWeights(*(w if w is None else w.to(x.dtype) for w in weights))
    n, channels = x.shape[:2]
    bias = weights.out_bias if weights.out_bias is not None else x.new_zeros(channels)
    x, theta, phi, g = _projections(x, weights, settings)  # (N, C, H, W), (N, c, L), (N, c, K), (N, c, K)
    if settings.mode == "dot_product":
        pairs = torch.bmm(phi, g.mT) / g.shape[2]  # (N, c, c)
        return x, Response(theta, torch.matmul(weights.out_weight, pairs.mT), bias)
    if settings.mode == "concatenation":
        y = _concatenation(theta, phi, g, weights.pair_weight)
    else:
        y = _softmax_attention(theta, phi, g, settings)
    return x, Response(y, weights.out_weight.expand(n, -1, -1), bias)


def _projections(x: Tensor, weights: NonLocalWeights, settings: BlockSettings) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x again, theta at every pixel, and the pooled phi and g, from one product with the stacked weights."""
    n, channels, height, width = x.shape
    gaussian = settings.mode == "gaussian"
    fields = ("g",) if gaussian else ("g", "theta", "phi")
    stacked = [torch.cat([getattr(weights, f"{field}_{part}") for field in fields]) for part in ("weight", "bias")]
    projected, x = projection(x.flatten(2), *stacked)
    x = x.reshape(n, channels, height, width)
    parts = projected.reshape(n, projected.shape[1], height, width).chunk(len(fields), dim=1)
    g = _pooled(parts[0], settings)
    if gaussian:
        return x, x.flatten(2), _pooled(x, settings), g
    return x, parts[1].flatten(2), _pooled(parts[2], settings), g


def _pooled(x: Tensor, settings: BlockSettings) -> Tensor:
    """``x (N, c, H, W)`` max-pooled, ``(N, c, K)``."""
    return max_pool(x, settings.stride, settings.pool_order).flatten(2)


def _softmax_attention(query: Tensor, key: Tensor, g: Tensor, settings: BlockSettings) -> Tensor:
    """y of the two gaussian modes, ``(N, c, L)``: attention with a query a pixel and K keys."""
    scaled = settings.mode == "embedded_gaussian" and settings.use_scale
    scale = query.shape[1] ** -0.5 if scaled else 1.0
    width = max(query.shape[1], g.shape[1])
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
    """y of ``concatenation`` mode, ``(N, c, L)``: ``y_i = sum_j relu(a_i + b_j) g_j / K``.

    The j that count for pixel i are those with ``b_j > -a_i``: a suffix of the sorted b, so
    ``y_i = (a_i * G_i + B_i) / K`` with suffix sums of g and of b g, found by one binary search a pixel.
    """
    n, inner, cells = g.shape
    w_theta, w_phi = pair_weight.chunk(2)  # (c,), (c,)
    a = torch.matmul(w_theta, theta)  # (N, L)
    b, order = torch.matmul(w_phi, phi).sort(dim=1)  # (N, K)
    g = g.gather(2, order[:, None].expand(n, inner, cells))
    first = torch.searchsorted(b.detach(), -a.detach(), right=True)  # (N, L), in 0..K
    first = first[:, None].expand(n, inner, -1)
    g_sums = _suffix_sums(g).gather(2, first)  # (N, c, L)
    bg_sums = _suffix_sums(b[:, None] * g).gather(2, first)
    return ((a[:, None] * g_sums + bg_sums) / cells).to(theta.dtype)


def _suffix_sums(values: Tensor) -> Tensor:
    """``(N, c, K)`` to ``(N, c, K + 1)``: entry k is the sum from k on, in float64 against cancellation."""
    sums = values.double().flip(2).cumsum(2).flip(2)
    return F.pad(sums, (0, 1))


def to_affine(block: Response, norm: Optional[nn.BatchNorm2d]) -> AffineNonLocal:
    """Fold the normalisation of ``u`` into the affine map, and update its running statistics."""
    vectors, matrix, bias = block
    n, channels = matrix.shape[:2]
    if norm is None:
        return AffineNonLocal(vectors, matrix, bias.expand(n, channels))
    mean, variance = _statistics(block, norm)
    scale = (variance + norm.eps).rsqrt()  # (C,)
    if norm.weight is not None:
        scale = scale * norm.weight.to(scale.dtype)
    offset = scale * (bias - mean)
    if norm.bias is not None:
        offset = offset + norm.bias.to(offset.dtype)
    return AffineNonLocal(vectors, scale[:, None] * matrix, offset.expand(n, channels))


def _statistics(block: Response, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """The mean and the biased variance ``(C,)`` that BatchNorm would normalise ``u`` with."""
    dtype = block.matrix.dtype
    n, channels = block.matrix.shape[:2]
    count = n * block.vectors.shape[2]
    if not norm.training and norm.running_mean is not None:
        return norm.running_mean.to(dtype), norm.running_var.to(dtype)
    if count == 0:
        return _empty_batch_statistics(block, norm)
    if norm.training and count == 1:
        raise ValueError(f"Expected more than 1 value per channel when training, got input size {[n, channels, 1, 1]}")
    _refuse_synchronized(norm)
    mean, variance = _moments(block)
    _update_running_statistics(norm, mean.detach(), variance.detach(), count)
    return mean, variance


def _refuse_synchronized(norm: nn.Module) -> None:
    """Statistics of one process would be silently wrong under a SyncBatchNorm of several."""
    distributed = torch.distributed
    if isinstance(norm, nn.SyncBatchNorm) and norm.training and distributed.is_available():
        if distributed.is_initialized() and distributed.get_world_size(norm.process_group) > 1:
            raise RuntimeError(
                "norm is a SyncBatchNorm over several processes, which this version does not synchronize; "
                "leave the loss out of convert_sync_batchnorm, or freeze the norm with .eval()"
            )


def _empty_batch_statistics(block: Response, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Anything finite will do; BatchNorm counts an empty batch but leaves its statistics."""
    if norm.training and norm.running_mean is not None:
        norm.num_batches_tracked.add_(1)
    return torch.zeros_like(block.bias), torch.ones_like(block.bias)


def _moments(block: Response) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of ``u`` over images and pixels, from those of the response."""
    vectors, matrix, bias = block
    center = vectors.mean(dim=2, keepdim=True)  # (N, c, 1)
    centered = vectors - center
    covariance = torch.bmm(centered, centered.mT) / vectors.shape[2]  # (N, c, c)
    image_means = torch.bmm(matrix, center)[:, :, 0] + bias  # (N, C)
    mean = image_means.mean(dim=0)
    within = (torch.bmm(matrix, covariance) * matrix).sum(dim=2).mean(dim=0)
    between = (image_means - mean).square().mean(dim=0)
    return mean, within + between


def _update_running_statistics(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """What ``nn.BatchNorm2d`` does to its buffers in training: unbiased variance, momentum or average."""
    if not norm.training or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    if norm.momentum is None:
        momentum = norm.num_batches_tracked.to(norm.running_mean.dtype).reciprocal()
    else:
        momentum = norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), momentum)
    unbiased = variance * (count / (count - 1))
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), momentum)
