"""What a non-local block without its pair matrix needs to know of a whole map: pooled projections and a covariance."""

from typing import NamedTuple

import torch
from torch import Tensor

from .._layout import in_place_layout, matrix_layout
from .._numerics import accumulation_dtype, without_autocast
from ..autograd.columns import columns
from ..autograd.first_order import first_order, save
from ..types import present
from .registry import kernel, register

__all__ = [
    "NO_POOL",
    "MapStatistics",
    "NonLocalStatisticsFunction",
    "StatisticsRequest",
    "non_local_statistics",
    "own_memory",
]

NO_POOL = (0, 0, 0, 0)


class StatisticsRequest(NamedTuple):
    """One map and what is asked of it. Weights and means are in the map's accumulation dtype."""

    x: Tensor  # (N, C, H, W)
    mean: Tensor | None = None  # (N, C) over pixels, without gradient; None: no mean and no covariance
    projection: Tensor | None = None  # (r, C): the covariance is that of projection @ x; None: of x itself
    weight: Tensor | None = None  # (p, C) of the 1x1 convolution that is pooled, None: nothing is pooled
    bias: Tensor | None = None  # (p,)
    pool: tuple[int, int, int, int] = NO_POOL  # cell height and width, and those of the first pool in a nested order


class MapStatistics(NamedTuple):
    """What was asked for, all with gradient."""

    x: Tensor  # the map itself, for whatever else reads it
    mean: Tensor | None  # (N, C)
    covariance: Tensor | None  # (N, r, r), biased
    pooled: Tensor | None  # (N, p, K), the largest value of each whole cell


def non_local_statistics(backend: str, requests: list[StatisticsRequest]) -> list[MapStatistics]:
    """Means, covariances and max-pooled 1x1 convolutions of maps in one read of each.

    A gradient that reaches a returned map is added to in its own memory: it must come from an op that makes a new one.
    A map without gradient is returned as it is, so that nobody makes one for it.
    """
    count = len(requests)
    columns = [list(column) for column in zip(*requests, strict=True)]
    pools = tuple(side for pool in columns.pop() for side in pool)
    outputs = NonLocalStatisticsFunction.apply(backend, pools, *(tensor for column in columns for tensor in column))
    columns = [outputs[first : first + count] for first in range(0, len(outputs), count)]
    columns[0] = [
        through if request.x.requires_grad else request.x for through, request in zip(columns[0], requests, strict=True)
    ]
    return [
        MapStatistics(
            x,
            None if request.mean is None else mean,
            None if request.mean is None else covariance,
            None if request.weight is None else pooled,
        )
        for request, x, mean, covariance, pooled in zip(requests, *columns, strict=True)
    ]


class NonLocalStatisticsFunction(torch.autograd.Function):
    """The statistics of maps, and their gradients.

    With ``S = W Cov(x) W^T`` and its symmetric gradient ``G = dS + dS^T``: ``dx = W^T G W (x - mean) / L`` and
    ``dW = G W Cov(x)``; a pooled value passes its gradient to the pixel that it came from.
    """

    @staticmethod
    def forward(ctx, backend, pools, *tensors):
        count = len(tensors) // 5
        maps, means, projections, weights, biases = columns(tensors, count)
        read = [in_place_layout(x) for x in maps]
        projections, weights, biases, means = (
            [x if x is None else x.contiguous() for x in column] for column in (projections, weights, biases, means)
        )
        arguments = read, means, projections, weights, biases, list(pools)
        outputs = kernel("non_local_statistics_forward", backend)(*arguments)
        pooled, winners, cross = columns(outputs, count)
        with without_autocast(maps[0]):
            covariances = [
                c if mean is None or w is None else torch.matmul(c, w.mT)
                for c, mean, w in zip(cross, means, projections, strict=True)
            ]
        ctx.set_materialize_grads(False)
        kept = [c for c, w in zip(cross, projections, strict=True) if w is not None]
        save(ctx, [*read, *means, *projections, *weights, *winners, *kept], tensors)
        ctx.backend, ctx.pools, ctx.count = backend, pools, count
        ctx.wants_x = any(ctx.needs_input_grad[2 : 2 + count])
        through = [x.view_as(x) for x in maps]
        means = [x.new_empty(0) if m is None else m.view_as(m) for x, m in zip(maps, means, strict=True)]
        return (*through, *means, *covariances, *pooled)

    @staticmethod
    @first_order
    def backward(ctx, *grads):
        count, saved = ctx.count, list(ctx.saved_tensors)
        maps, means, projections, weights, winners = columns(saved[: 5 * count], count)
        kept = iter(saved[5 * count :])
        cross = [None if w is None else next(kept) for w in projections]
        incoming, dmeans, dcovariances, dpooled = columns(grads, count)
        # A compiled graph hands over zeros where eager hands over nothing, also for outputs that are not there.
        dmeans = [None if m is None else g for m, g in zip(means, dmeans, strict=True)]
        dcovariances = [None if m is None else g for m, g in zip(means, dcovariances, strict=True)]
        with without_autocast(maps[0]):
            inner, shifts, dprojections = zip(
                *map(_affine, maps, projections, cross, dcovariances, dmeans), strict=True
            )
        dx = [own_memory(g, x) for g, x in zip(incoming, maps, strict=True)] if ctx.wants_x else []
        dpooled = [None if w is None or g is None else g.contiguous() for w, g in zip(weights, dpooled, strict=True)]
        # Outputs that the op fills: torch.compile takes no op that changes some arguments and returns others.
        dweights = [x.new_empty(0) if w is None else torch.empty_like(w) for x, w in zip(maps, weights, strict=True)]
        kernel("non_local_statistics_backward_", ctx.backend)(
            dx,
            dweights,
            maps,
            means,
            projections,
            list(inner),
            list(shifts),
            weights,
            winners,
            dpooled,
            list(ctx.pools),
        )
        dweights = [None if g is None else dw for g, dw in zip(dpooled, dweights, strict=True)]
        dbiases = [None if g is None else g.sum((0, 2)) for g in dpooled]
        return None, None, *(dx or [None] * count), *[None] * count, *dprojections, *dweights, *dbiases


def _affine(
    x: Tensor,
    projection: Tensor | None,
    cross: Tensor | None,  # cov(projection x, x) (N, r, C), where there is a projection
    dcovariance: Tensor | None,
    dmean: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``inner`` and ``shift`` of ``dx = projection^T inner (x - mean) + shift``, and the projection's own gradient."""
    pixels = x.shape[2] * x.shape[3]
    shift = None if dmean is None else (dmean / pixels).contiguous()
    if dcovariance is None:
        return None, shift, None
    symmetric = dcovariance + dcovariance.mT
    inner = symmetric / pixels
    inner = inner if projection is None else torch.matmul(inner, projection)  # (N, r, C)
    return inner.contiguous(), shift, None if cross is None else torch.bmm(symmetric, cross).sum(0)


def own_memory(grad: Tensor | None, x: Tensor) -> Tensor:
    """Memory in the layout of x's gradient that holds what flows in from elsewhere, and may be changed."""
    layout = present(matrix_layout(x))
    if grad is None:
        return torch.zeros_like(x, memory_format=layout)
    if torch.compiler.is_compiling():
        return grad.to(x.dtype).clone(memory_format=layout)
    return grad.to(x.dtype).contiguous(memory_format=layout)


def _fake_forward(maps, means, projections, weights, biases, pools):
    pooled, winners, cross = [], [], []
    for index, (x, mean, projection, weight) in enumerate(zip(maps, means, projections, weights, strict=True)):
        images, channels, height, width = x.shape
        dtype, (rows, cols) = accumulation_dtype(x), pools[4 * index : 4 * index + 2]
        shape = (0,) if weight is None else (images, weight.shape[0], (height // rows) * (width // cols))
        pooled.append(x.new_empty(shape, dtype=dtype))
        winners.append(x.new_empty(shape, dtype=torch.int32))
        shape = (images, channels if projection is None else projection.shape[0], channels)
        cross.append(x.new_empty((0,) if mean is None else shape, dtype=dtype))
    return [*pooled, *winners, *cross]


register(
    "non_local_statistics_forward",
    "(Tensor[] x, Tensor?[] mean, Tensor?[] projection, Tensor?[] weight, Tensor?[] bias, int[] pool) -> Tensor[]",
    _fake_forward,
    compiled=("cpu",),
    triton="non_local_statistics",
)
register(
    "non_local_statistics_backward_",
    "(Tensor(a!)[] gradient, Tensor(b!)[] grad_weight, Tensor[] x, Tensor?[] mean, Tensor?[] projection, "
    "Tensor?[] inner, Tensor?[] shift, Tensor?[] weight, Tensor[] winners, Tensor?[] grad_pooled, int[] pool) -> ()",
    lambda *_: None,
    compiled=("cpu",),
    triton="non_local_statistics",
)
