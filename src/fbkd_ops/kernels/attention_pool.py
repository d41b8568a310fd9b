"""Triton kernels of the attention pool, for GPUs where the CUDA library is not built.

The decomposition of csrc/cuda: one read of ``x`` gives the sums of each tile's rows and columns, a second
kernel adds the tiles in a fixed order. No atomics, so that results repeat bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import MatrixView, matrix_layout, matrix_view
from .._numerics import accumulation_dtype
from .pyramid import (
    Level,
    add_tiles,
    alignment,
    find_level,
    find_tile,
    in_place_of_none,
    launch,
    pick,
    pick_sizes,
    scaled_gradient,
    tile_pointers,
    vector_length,
    whole_vectors,
)

__all__ = ["attention_pool_backward", "attention_pool_forward"]

# 8 x 256 elements are 16 a thread of 4 warps: 16-byte loads in every dtype, both accumulators in registers.
BLOCK_ROWS = 8
BLOCK_COLS = 256
# Rows of a tile: many where that leaves enough tiles to fill a large GPU, else few.
MANY_ROWS, FEW_ROWS, ENOUGH_TILES = 128, 32, 512
FINISH_TILES, FINISH_OUTPUTS = 16, 32


class SumSizes(NamedTuple):
    """A level's sizes in sum_tiles."""

    images: int
    rows: int
    cols: int
    stride: int  # from image to image
    pitch: int
    row_tiles: int
    col_tiles: int
    tile_rows: int


class GradientSizes(NamedTuple):
    """A level's sizes in input_gradients."""

    rows: int
    cols: int
    stride: int
    pitch: int
    row_tiles: int
    col_tiles: int
    row_abs_given: int
    row_plain_given: int
    col_abs_given: int
    col_plain_given: int


@triton.jit
def sum_tiles(
    x,  # a level: (images, rows, cols)
    partials,  # a level: row_abs, row_plain (images, col_tiles, rows), col_abs, col_plain (images, row_tiles, cols)
    sizes,
    PATHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write the sums of x and of its magnitude over each tile's rows and columns."""
    level, path, program = find_level(sizes)
    size = SumSizes(*pick_sizes(sizes, level))
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            sum_tile(pick(x, level), pick(partials, level), program, size, PATHS[index], BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def sum_tile(x, partials, program, size, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    images, rows, cols = size.images, size.rows, size.cols
    image, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    dtype: tl.constexpr = partials.dtype.element_ty
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    col_inside = col < whole_vectors(cols, vector_length(ALIGN, x.dtype.element_ty))
    row_sums = partials + (image * size.col_tiles + col_tile) * rows
    col_sums = partials + 2 * images * size.col_tiles * rows + (image * size.row_tiles + row_tile) * cols
    total_abs = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype)
    total_plain = tl.zeros((BLOCK_ROWS, BLOCK_COLS), dtype)
    for first in range(0, size.tile_rows, BLOCK_ROWS):
        row = row_tile * size.tile_rows + first + tl.arange(0, BLOCK_ROWS)
        at = tile_pointers(x, image, size.stride, size.pitch, row[:, None], col[None, :], ALIGN, False)
        value = tl.load(at, mask=(row < rows)[:, None] & col_inside[None, :], other=0.0).to(dtype)
        magnitude = tl.abs(value)
        total_abs += magnitude
        total_plain += value
        tl.store(row_sums + row, tl.sum(magnitude, axis=1), mask=row < rows)
        tl.store(row_sums + images * size.col_tiles * rows + row, tl.sum(value, axis=1), mask=row < rows)
    tl.store(col_sums + col, tl.sum(total_abs, axis=0), mask=col_inside)
    tl.store(col_sums + images * size.row_tiles * cols + col, tl.sum(total_plain, axis=0), mask=col_inside)


@triton.jit
def finish_means(
    mean_abs,  # a level and direction: (images, length)
    mean_plain,  # likewise
    partials,  # a level and direction: abs, plain (images, tiles, length)
    sizes,
    PATHS: tl.constexpr,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Write the means, from the sums of all tiles."""
    level, _, program = find_level(sizes)
    first, images, blocks, tiles, length, count = pick_sizes(sizes, level)
    _, image, block = find_tile(program, images, blocks)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    inside = output < length
    at = pick(partials, level) + first + image * tiles * length + output
    mean = add_tiles(at, tiles, length, inside, TILES, OUTPUTS) / count
    tl.store(pick(mean_abs, level) + image * length + output, mean, mask=inside)
    mean = add_tiles(at + images * tiles * length, tiles, length, inside, TILES, OUTPUTS) / count
    tl.store(pick(mean_plain, level) + image * length + output, mean, mask=inside)


@triton.jit
def input_gradients(
    x,  # a level: (images, rows, cols)
    dx,  # a level: (images, rows, cols), densely packed
    row_abs,  # a level: (images, rows)
    row_plain,  # likewise
    col_abs,  # a level: (images, cols)
    col_plain,  # likewise
    sizes,
    PATHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """Write the gradient of x, from those of its four means."""
    level, path, program = find_level(sizes)
    size = GradientSizes(*pick_sizes(sizes, level))
    grads = pick(row_abs, level), pick(row_plain, level), pick(col_abs, level), pick(col_plain, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            input_gradient(pick(x, level), pick(dx, level), grads, program, size, PATHS[index], BLOCK_ROWS, BLOCK_COLS)


@triton.jit
def input_gradient(
    x, dx, grads, program, size, ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr
):
    row_abs, row_plain, col_abs, col_plain = grads
    rows, cols = size.rows, size.cols
    image, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    col = col_tile * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    row_inside = row < rows
    col_inside = col < whole_vectors(cols, vector_length(ALIGN, x.dtype.element_ty))
    row_at, col_at = image * rows + row, image * cols + col
    by_row = scaled_gradient(row_plain, row_at, row_inside, size.row_plain_given, cols)
    by_col = scaled_gradient(col_plain, col_at, col_inside, size.col_plain_given, rows)
    gradient = by_row[:, None] + by_col[None, :]
    inside = row_inside[:, None] & col_inside[None, :]
    if size.row_abs_given + size.col_abs_given > 0:
        at = tile_pointers(x, image, size.stride, size.pitch, row[:, None], col[None, :], ALIGN, False)
        value = tl.load(at, mask=inside, other=0.0).to(gradient.dtype)
        sign = (value > 0).to(gradient.dtype) - (value < 0).to(gradient.dtype)
        by_row = scaled_gradient(row_abs, row_at, row_inside, size.row_abs_given, cols)
        by_col = scaled_gradient(col_abs, col_at, col_inside, size.col_abs_given, rows)
        gradient += sign * (by_row[:, None] + by_col[None, :])
    at = tile_pointers(dx, image, rows * cols, cols, row[:, None], col[None, :], ALIGN, False)
    tl.store(at, gradient.to(dx.dtype.element_ty), mask=inside)


def _tile_rows(view: MatrixView) -> int:
    col_tiles = triton.cdiv(view.cols, BLOCK_COLS)
    tiles = view.images * triton.cdiv(view.rows, MANY_ROWS) * col_tiles
    return MANY_ROWS if tiles >= ENOUGH_TILES else FEW_ROWS


def _path(x: Tensor, view: MatrixView) -> int:
    return alignment(x, view.image_stride, view.row_stride, view.cols)


def _empty_means(x: Tensor) -> list[Tensor]:
    images, channels, height, width = x.shape
    dtype = accumulation_dtype(x)
    return [x.new_empty(shape, dtype=dtype) for shape in ((images, height, width), (images, channels)) * 2]


def _forward_level(x: Tensor, means: list[Tensor]) -> tuple[Level, list[Level]]:
    """Return the sums of the tiles, and both directions' means."""
    view = matrix_view(x)
    images, rows, cols, tile_rows = view.images, view.rows, view.cols, _tile_rows(view)
    row_tiles, col_tiles = triton.cdiv(rows, tile_rows), triton.cdiv(cols, BLOCK_COLS)
    by_row, by_col = 2 * images * col_tiles * rows, 2 * images * row_tiles * cols
    partials = x.new_empty(by_row + by_col, dtype=means[0].dtype)
    sizes = SumSizes(images, rows, cols, view.image_stride, view.row_stride, row_tiles, col_tiles, tile_rows)
    sums = Level(images * row_tiles * col_tiles, (x, partials), sizes, _path(x, view))
    row_means, col_means = (means[1::2], means[::2]) if view.rows_are_channels else (means[::2], means[1::2])
    finish = [
        _direction(row_means, partials, 0, images, col_tiles, rows, cols),
        _direction(col_means, partials, by_row, images, row_tiles, cols, rows),
    ]
    return sums, finish


def _direction(
    means: list[Tensor], partials: Tensor, first: int, images: int, tiles: int, length: int, count: int
) -> Level:
    blocks = triton.cdiv(length, FINISH_OUTPUTS)
    return Level(images * blocks, (*means, partials), (first, images, blocks, tiles, length, count))


def attention_pool_forward(xs: list[Tensor]) -> list[Tensor]:
    """For each level: spatial attention ``(N, H, W)``, channel attention ``(N, C)``, spatial mean, channel mean."""
    means = [_empty_means(x) for x in xs]
    levels = [_forward_level(x, outputs) for x, outputs in zip(xs, means, strict=True)]
    launch(sum_tiles, [sums for sums, _ in levels], BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS)
    directions = [direction for _, finish in levels for direction in finish]
    launch(finish_means, directions, TILES=FINISH_TILES, OUTPUTS=FINISH_OUTPUTS)
    return [mean for outputs in means for mean in outputs]


def _backward_level(x: Tensor, dx: Tensor, grads: list[Tensor | None]) -> Level:
    view = matrix_view(x)
    by_row, by_col = (grads[1::2], grads[::2]) if view.rows_are_channels else (grads[::2], grads[1::2])
    ordered = [*by_row, *by_col]
    tiles = triton.cdiv(view.rows, BLOCK_ROWS), triton.cdiv(view.cols, BLOCK_COLS)
    given = (grad is not None for grad in ordered)
    sizes = GradientSizes(view.rows, view.cols, view.image_stride, view.row_stride, *tiles, *given)
    pointers = x, dx, *in_place_of_none(ordered, x, accumulation_dtype(x))
    return Level(view.images * tiles[0] * tiles[1], pointers, sizes, _path(x, view))


def attention_pool_backward(xs: list[Tensor], grads: list[Tensor | None]) -> list[Tensor]:
    """Gradient of each level's ``x`` from those of its four means (None: absent).

    ``x`` is read only where a gradient of an attention map is given.
    """
    dxs = [torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=matrix_layout(x)) for x in xs]
    levels = [
        _backward_level(x, dx, grads[4 * at : 4 * at + 4]) for at, (x, dx) in enumerate(zip(xs, dxs, strict=True))
    ]
    launch(input_gradients, levels, BLOCK_ROWS=BLOCK_ROWS, BLOCK_COLS=BLOCK_COLS)
    return dxs
