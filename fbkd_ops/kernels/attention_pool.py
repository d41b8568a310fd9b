"""Triton kernels of the attention pool, for GPUs where the CUDA library is not built.

The decomposition of csrc/cuda: one read of ``x`` gives the sums of each tile's rows and columns, a second
kernel adds the tiles in a fixed order. No atomics, so that results repeat bit for bit.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import matrix_layout, matrix_view
from .._numerics import accumulation_dtype

__all__ = ["attention_pool_backward", "attention_pool_forward"]

# 8 x 256 elements are 16 a thread of 4 warps: 16-byte loads in every dtype, both accumulators in registers.
BLOCK_ROWS = 8
BLOCK_COLS = 256
# Rows of a tile: many where that leaves enough tiles to fill a large GPU, else few.
MANY_ROWS, FEW_ROWS, ENOUGH_TILES = 128, 32, 512
FINISH_TILES, FINISH_OUTPUTS = 16, 32


@triton.jit
def sum_tiles(
    x,  # (images, rows, cols)
    row_abs,  # (images, col_tiles, rows)
    row_plain,  # (images, col_tiles, rows)
    col_abs,  # (images, row_tiles, cols)
    col_plain,  # (images, row_tiles, cols)
    rows,
    cols,
    image_stride,
    row_stride,
    row_tiles,
    col_tiles,
    ROW_TILE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // (row_tiles * col_tiles)
    row_tile = program // col_tiles % row_tiles
    col_tile = program % col_tiles
    dtype = row_abs.dtype.element_ty
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    total_abs = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype)
    total_plain = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype)
    for first in range(0, ROW_TILE, BLOCK_ROWS):
        row = row_tile * ROW_TILE + first + tl.arange(0, BLOCK_ROWS)
        inside = (row < rows)[:, None] & (col < cols)[None, :]
        offset = image * image_stride + row[:, None] * row_stride + col[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(dtype)
        magnitude = tl.abs(value)
        total_abs += magnitude
        total_plain += value
        at = (image * col_tiles + col_tile) * rows + row
        tl.store(row_abs + at, tl.sum(magnitude, axis=1), mask=row < rows)
        tl.store(row_plain + at, tl.sum(value, axis=1), mask=row < rows)
    at = (image * row_tiles + row_tile) * cols + col
    tl.store(col_abs + at, tl.sum(total_abs, axis=0), mask=col < cols)
    tl.store(col_plain + at, tl.sum(total_plain, axis=0), mask=col < cols)


@triton.jit
def finish_means(
    partial,  # (images, tiles, length)
    mean,  # (images, length)
    outputs,
    tiles,
    length,
    count,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    output = tl.program_id(0).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    base = output // length * tiles * length + output % length
    total = tl.zeros((TILES, OUTPUTS), mean.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES).to(tl.int64)
        inside = (tile < tiles)[:, None] & (output < outputs)[None, :]
        total += tl.load(partial + tile[:, None] * length + base[None, :], mask=inside, other=0.0)
    sums = tl.sum(total, axis=0)
    tl.store(mean + output, sums / count.to(sums.dtype), mask=output < outputs)


@triton.jit
def scaled_gradient(grad, at, inside, count, dtype: tl.constexpr, SHAPE: tl.constexpr):
    """Gradient of one element of a mean; zeros where the gradient is absent."""
    if grad is None:
        return tl.zeros((SHAPE,), dtype)
    return tl.load(grad + at, mask=inside, other=0.0).to(dtype) / count.to(dtype)


@triton.jit
def input_gradient(
    x,  # (images, rows, cols), None: not read
    dx,  # (images, rows, cols), densely packed
    row_abs,  # (images, rows) or None
    row_plain,  # (images, rows) or None
    col_abs,  # (images, cols) or None
    col_plain,  # (images, cols) or None
    rows,
    cols,
    image_stride,
    row_stride,
    row_tiles,
    col_tiles,
    DTYPE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    image = program // (row_tiles * col_tiles)
    row = program // col_tiles % row_tiles * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = program % col_tiles * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_inside, col_inside = row < rows, col < cols
    row_at, col_at = image * rows + row, image * cols + col
    by_row = scaled_gradient(row_plain, row_at, row_inside, cols, DTYPE, BLOCK_ROWS)
    by_col = scaled_gradient(col_plain, col_at, col_inside, rows, DTYPE, BLOCK_COLS)
    gradient = by_row[:, None] + by_col[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    if x is not None:
        offset = image * image_stride + row[:, None] * row_stride + col[None, :]
        value = tl.load(x + offset, mask=inside, other=0.0).to(DTYPE)
        sign = (value > 0).to(DTYPE) - (value < 0).to(DTYPE)
        by_row = scaled_gradient(row_abs, row_at, row_inside, cols, DTYPE, BLOCK_ROWS)
        by_col = scaled_gradient(col_abs, col_at, col_inside, rows, DTYPE, BLOCK_COLS)
        gradient += sign * (by_row[:, None] + by_col[None, :])
    offset = (image * rows + row)[:, None] * cols + col[None, :]
    tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=inside)


def _row_tile(view) -> int:
    col_tiles = triton.cdiv(view.cols, BLOCK_COLS)
    tiles = view.images * triton.cdiv(view.rows, MANY_ROWS) * col_tiles
    return MANY_ROWS if tiles >= ENOUGH_TILES else FEW_ROWS


def _finish(partial: Tensor, mean: Tensor, tiles: int, length: int, count: int) -> None:
    outputs = mean.numel()
    if outputs:
        grid = (triton.cdiv(outputs, FINISH_OUTPUTS),)
        finish_means[grid](partial, mean, outputs, tiles, length, count, TILES=FINISH_TILES, OUTPUTS=FINISH_OUTPUTS)


def attention_pool_forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Spatial attention ``(N, H, W)``, channel attention ``(N, C)``, spatial mean, channel mean."""
    images, channels, height, width = x.shape
    view, dtype = matrix_view(x), accumulation_dtype(x)
    row_tile = _row_tile(view)
    row_tiles, col_tiles = triton.cdiv(view.rows, row_tile), triton.cdiv(view.cols, BLOCK_COLS)
    by_row = x.new_empty((2, images * col_tiles * view.rows), dtype=dtype)
    by_col = x.new_empty((2, images * row_tiles * view.cols), dtype=dtype)
    spatial = [x.new_empty((images, height, width), dtype=dtype) for _ in range(2)]
    channel = [x.new_empty((images, channels), dtype=dtype) for _ in range(2)]
    row_means, col_means = (channel, spatial) if view.rows_are_channels else (spatial, channel)
    with torch.cuda.device_of(x):
        if x.numel():
            sum_tiles[(images * row_tiles * col_tiles,)](
                x,
                *(by_row[0], by_row[1], by_col[0], by_col[1]),
                *(view.rows, view.cols, view.image_stride, view.row_stride, row_tiles, col_tiles),
                ROW_TILE=row_tile,
                BLOCK_ROWS=BLOCK_ROWS,
                BLOCK_COLS=BLOCK_COLS,
            )
        for index in range(2):
            _finish(by_row[index], row_means[index], col_tiles, view.rows, view.cols)
            _finish(by_col[index], col_means[index], row_tiles, view.cols, view.rows)
    return spatial[0], channel[0], spatial[1], channel[1]


def attention_pool_backward(
    x: Tensor,  # (N, C, H, W)
    grad_spatial_attention: Optional[Tensor],  # (N, H, W)
    grad_channel_attention: Optional[Tensor],  # (N, C)
    grad_spatial_mean: Optional[Tensor],  # (N, H, W)
    grad_channel_mean: Optional[Tensor],  # (N, C)
) -> Tensor:
    """Gradient of ``x``, which is read only where a gradient of an attention map is given."""
    view = matrix_view(x)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=matrix_layout(x))
    if not x.numel():
        return dx
    spatial, channel = (grad_spatial_attention, grad_spatial_mean), (grad_channel_attention, grad_channel_mean)
    by_row, by_col = (channel, spatial) if view.rows_are_channels else (spatial, channel)
    reads = by_row[0] is not None or by_col[0] is not None
    row_tiles, col_tiles = triton.cdiv(view.rows, BLOCK_ROWS), triton.cdiv(view.cols, BLOCK_COLS)
    with torch.cuda.device_of(x):
        input_gradient[(view.images * row_tiles * col_tiles,)](
            x if reads else None,
            dx,
            *(*by_row, *by_col),
            *(view.rows, view.cols, view.image_stride, view.row_stride, row_tiles, col_tiles),
            DTYPE=tl.float64 if x.dtype == torch.float64 else tl.float32,
            BLOCK_ROWS=BLOCK_ROWS,
            BLOCK_COLS=BLOCK_COLS,
        )
    return dx
