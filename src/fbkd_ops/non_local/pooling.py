"""How phi and g of a non-local block are max-pooled: by a stride that is clamped to the map, in one pool or two."""

import torch.nn.functional as F
from torch import Tensor

from .parameters import BlockSettings

__all__ = ["max_pooled", "pool_cells"]


def pool_cells(x: Tensor, settings: BlockSettings) -> tuple[int, int, int, int]:
    """Height and width of the cells that ``x (N, C, H, W)`` is pooled by, and of the first pool's cells."""
    kernels = _pool_kernels(x, settings)
    if not kernels:
        return 1, 1, 1, 1
    first, last = kernels[0], kernels[-1] if len(kernels) > 1 else (1, 1)
    return first[0] * last[0], first[1] * last[1], *first


def max_pooled(x: Tensor, settings: BlockSettings) -> Tensor:
    """``x (N, c, H, W)`` max-pooled, ``(N, c, K)``. Rows and columns beyond the last whole cell are left out."""
    for kernel in _pool_kernels(x, settings):
        x = F.max_pool2d(x, kernel)
    return x.flatten(2)


def _pool_kernels(x: Tensor, settings: BlockSettings) -> list[tuple[int, int]]:
    """Return the kernels of the pools that together pool ``x`` by the stride.

    ``nested`` pools by 2 first and by the rest then: the same cells, but among equal values another winner.
    """
    height, width = x.shape[2:]
    total = min(settings.stride, height), min(settings.stride, width)
    if total == (1, 1):
        return []
    if settings.pool_order == "single":
        return [total]
    first = 2 if total[0] % 2 == 0 else 1, 2 if total[1] % 2 == 0 else 1
    return [first, (total[0] // first[0], total[1] // first[1])]
