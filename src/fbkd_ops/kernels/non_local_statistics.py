"""Triton kernels of what a non-local block needs to know of a whole map, and of their gradients.

The 1x1 convolution that is pooled exists as one row of pixels at a time, in registers, where each column's best value
so far stays. A covariance is that of x itself: being symmetric, it is computed up to the tiles on its diagonal, and a
projection is applied to the small matrix that comes out. In the backward pass the two matrices beside x are multiplied
out first, and the pooled values' gradients, at the pixels that won, are made in registers as a product's operand.

The convolution of a 16-bit map has 16-bit operands, its weight rounded to them. So has the gradient of a bfloat16 map;
beside float16, whose range a gradient could leave, and in a covariance, a 16-bit map is multiplied as TF32. For other
dtypes see products.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import matrix_view
from .._numerics import accumulation_dtype, without_autocast
from ..types import present
from .products import (
    ALIGNED,
    Images,
    across,
    add_product,
    add_up,
    dense_tile,
    in_dtypes,
    indices,
    multiply,
    precision,
    splits_of,
    sum_of_splits,
)
from .pyramid import (
    Level,
    add_tiles,
    aligned_to_16_bytes,
    find_level,
    find_tile,
    in_place_of_none,
    launch,
    launch_by_constants,
    pick,
    pick_all,
    pick_sizes,
    store_rounded,
    tile_pointers,
    vector_length,
    whole_vectors,
)

__all__ = ["non_local_statistics_backward_", "non_local_statistics_forward"]

_Pool = tuple[int, int, int, int]  # height and width of a cell, and of the first pool's in a nested order
_Cells = tuple[int, int, int, int, int, int]  # a pool, and rows and columns of its cells

# A level's code path has two bits: the map's pixels lie side by side (else its channels), and maps and matrices are
# read 16 bytes at a time.
PLANAR = tl.constexpr(2)
UNVISITED = tl.constexpr((1 << 31) - 1)  # comes after every candidate
FINISH_TILES, FINISH_OUTPUTS = 8, 256


class PoolSizes(NamedTuple):
    """A level's sizes in pool_convolutions."""

    channels: int
    pixels: int
    width: int
    stride: int  # of the map, from image to image
    pitch: int
    outputs: int  # p
    cell_height: int
    cell_width: int
    first_height: int  # of the first pool's cells in a nested order
    first_width: int
    cell_rows: int
    cell_cols: int
    cells_of_tile: int
    tiles_of_row: int
    channel_tiles: int


class CovarianceSizes(NamedTuple):
    """A level's sizes in covariance_tiles."""

    channels: int
    pixels: int
    width: int
    stride: int
    pitch: int
    channel_tiles: int
    splits: int
    tiles_of_split: int


class GradientSizes(NamedTuple):
    """A level's sizes in add_map_gradients."""

    channels: int
    pixels: int
    width: int
    stride: int
    pitch: int
    outputs: int
    cell_height: int
    cell_width: int
    first_height: int
    first_width: int
    cell_rows: int
    cell_cols: int
    pixel_tiles: int
    channel_tiles: int
    matrix_given: int
    shift_given: int


class WeightSizes(NamedTuple):
    """A level's sizes in pool_weight_gradients."""

    channels: int
    pixels: int
    width: int
    stride: int
    pitch: int
    outputs: int
    cell_height: int
    cell_width: int
    first_height: int
    first_width: int
    cell_rows: int
    cell_cols: int
    row_tiles: int
    col_tiles: int
    tiles_of_image: int
    tiles: int
    tiles_of_split: int


@triton.jit
def pool_convolutions(
    x,  # a level: (N, C, H, W)
    weight,  # a level: (p, C)
    bias,  # a level: (p,)
    pooled,  # a level: (N, p, cells)
    winners,  # a level: (N, p, cells)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Fold some cells of a row per program; per lane a column of a cell, or every PIXELS-th of a wider cell."""
    level, path, program = find_level(sizes)
    size = PoolSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, weight, bias), level)
    outputs, cell_height, cell_width, cell_cols = small(
        (size.outputs, size.cell_height, size.cell_width, size.cell_cols)
    )
    cells_of_tile, tiles_of_row = small((size.cells_of_tile, size.tiles_of_row))
    image, tile, channel_tile = find_tile(program, size.cell_rows * tiles_of_row, size.channel_tiles)
    tile = tile.to(tl.int32)
    cell_row, first_cell = tile // tiles_of_row, tile % tiles_of_row * cells_of_tile
    lane, channel = tl.arange(0, PIXELS), indices(channel_tile, CHANNELS)
    corner = cell_row * cell_height * size.width.to(tl.int32) + first_cell * cell_width
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            best, order = fold_columns(
                inputs, size, image, corner, lane, channel, PATHS[index], PRECISION, PIXELS, CHANNELS, INNER
            )
            best, order = fold_cells(best, order, lane, cell_width, PIXELS)
            inside = ((lane < cells_of_tile) & (first_cell + lane < cell_cols))[:, None] & (channel < outputs)[None, :]
            first = (image * outputs + channel) * (size.cell_rows * cell_cols) + cell_row * cell_cols + first_cell
            at = first[None, :] + lane[:, None]
            tl.store(pick(pooled, level) + at, best, mask=inside)
            winner = corner + (lane * cell_width)[:, None] + pixel_in_cell(size, order)
            tl.store(pick(winners, level) + at, winner, mask=inside)


@triton.jit
def fold_columns(
    inputs,
    size,
    image,
    corner,
    lane,
    channel,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Return the best of each column ``(pixels, p)`` of a tile's cells, and when it was visited."""
    x, weight, bias = inputs
    BY_PIXEL: tl.constexpr = (ALIGNED & PATH) and (PLANAR & PATH)
    VECTOR: tl.constexpr = vector_length(x.dtype.element_ty)
    channels = whole_vectors(size.channels.to(tl.int32), ALIGNED & PATH, VECTOR)
    width = size.width.to(tl.int32)
    outputs, cell_height, cell_width = small((size.outputs, size.cell_height, size.cell_width))
    offset, chunks = lane % cell_width, tl.cdiv(cell_width, PIXELS)
    shift = tl.load(bias + channel, mask=channel < outputs, other=0.0)
    best = tl.full((PIXELS, CHANNELS), float("-inf"), shift.dtype)
    order = tl.full((PIXELS, CHANNELS), UNVISITED, tl.int32)
    for step in range(cell_height * chunks):
        row, chunk = step // chunks, step % chunks
        start = whole_vectors(corner + row * width + chunk * PIXELS, BY_PIXEL, VECTOR)
        end = whole_vectors((corner // width + row + 1) * width, BY_PIXEL, VECTOR)  # of the row of pixels
        value = add_product(
            tl.zeros((PIXELS, CHANNELS), shift.dtype),
            Images(x, size.stride, size.pitch),
            Images(weight, 0, channels),
            image,
            start + lane,
            channel,
            (end, outputs, channels),
            PLANAR=PLANAR & PATH,
            TRANSPOSED=False,
            IS_ALIGNED=ALIGNED & PATH,
            OPERAND=weight.dtype.element_ty,
            PRECISION=PRECISION,
            INNER=INNER,
        )
        value += shift[None, :]
        column = chunk * PIXELS + offset
        rank = order_in_cell(size, row, column)[:, None]
        wins = precedes(value, rank, best, order) & (column < cell_width)[:, None]
        best, order = tl.where(wins, value, best), tl.where(wins, rank, order)
    return best, order


@triton.jit
def fold_cells(best, order, lane, cell_width, PIXELS: tl.constexpr):
    """Return the best of each cell, cell by cell, from the columns that lie in ``cell_width`` lanes each."""
    width = tl.minimum(cell_width, PIXELS)
    distance = 1
    while distance < width:
        source = tl.minimum(lane + distance, PIXELS - 1)[:, None].broadcast_to(best.shape)
        value, rank = tl.gather(best, source, 0), tl.gather(order, source, 0)
        wins = precedes(value, rank, best, order) & (lane % width + distance < width)[:, None]
        best, order = tl.where(wins, value, best), tl.where(wins, rank, order)
        distance *= 2
    first_lane = tl.minimum(lane * width, PIXELS - 1)[:, None].broadcast_to(best.shape)
    return tl.gather(best, first_lane, 0), tl.gather(order, first_lane, 0)


@triton.jit
def precedes(value, rank, best, order):
    """Whether a candidate replaces another: the last NaN, else the greatest value, and of equal ones the first."""
    greater = (value > best) | ((value == best) & (rank < order))
    return tl.where(value != value, (best == best) | (rank > order), greater)


@triton.jit
def order_in_cell(size, row, column):
    """When a cell's pixel is visited: the first pool's cells, one after the other."""
    cell_width, first_height, first_width = small((size.cell_width, size.first_height, size.first_width))
    outer = row // first_height * (cell_width // first_width) + column // first_width
    return (outer * first_height + row % first_height) * first_width + column % first_width


@triton.jit
def pixel_in_cell(size, order):
    """How many pixels after the cell's first one the pixel lies that is visited at ``order``."""
    cell_width, first_height, first_width = small((size.cell_width, size.first_height, size.first_width))
    across_cell = cell_width // first_width
    column, rest = order % first_width, order // first_width
    row, outer = rest % first_height, rest // first_height
    row, column = outer // across_cell * first_height + row, outer % across_cell * first_width + column
    return row * size.width.to(tl.int32) + column


@triton.jit
def covariance_tiles(
    x,  # a level: (N, C, H, W)
    mean,  # a level: (N, C)
    partials,  # a level, in whole tiles: (N * splits, C, C), without those above the diagonal
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums over pixels of ``(x - mean) (x - mean)^T``, up to the tiles on the diagonal."""
    level, path, program = find_level(sizes)
    size = CovarianceSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, mean), level)
    part, row_tile, col_tile = find_tile(program, size.channel_tiles, size.channel_tiles)
    row, col = indices(row_tile, CHANNELS), indices(col_tile, CHANNELS)
    pitch = size.channel_tiles * CHANNELS
    for index in tl.static_range(len(PATHS)):
        if (path == PATHS[index]) & (row_tile >= col_tile):
            extents = map_extents(inputs[0], size, PATHS[index])
            image, first = part // size.splits, part % size.splits * size.tiles_of_split
            total = tl.zeros((CHANNELS, CHANNELS), inputs[1].dtype.element_ty)
            for step in range(0, tl.minimum(size.tiles_of_split, tl.cdiv(size.pixels, PIXELS) - first)):
                pixel = indices(first + step, PIXELS)
                left = centred_tile(inputs, size, extents, image, pixel, row, False, PATHS[index])
                right = centred_tile(inputs, size, extents, image, pixel, col, True, PATHS[index])
                total = multiply(left, right, total, PRECISION)
            sums = pick(partials, level)
            at = tile_pointers(sums, part, pitch * pitch, pitch, row[:, None], col[None, :], True, False)
            tl.store(at, total)


@triton.jit
def centred_tile(inputs, size, extents, image, pixel, channel, PIXELS_FIRST: tl.constexpr, PATH: tl.constexpr):
    """Return a tile of ``x - mean``, ``(pixels, channels)`` or transposed; zeros outside."""
    x, mean = inputs
    channels, pixels = extents
    value = load_tile(x, size, extents, image, pixel, channel, PIXELS_FIRST, PATH).to(mean.dtype.element_ty)
    centre = tl.load(mean + image * channels + channel, mask=channel < channels, other=0.0)
    return tl.where(across(pixel < pixels, PIXELS_FIRST), value - across(centre, not PIXELS_FIRST), 0.0)


@triton.jit
def finish_covariances(
    covariance,  # a level: (N, C, C)
    partials,  # a level: (N, splits, C, C), with a pitch
    sizes,
    PATHS: tl.constexpr,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Add up the partial sums, divide by the number of pixels, and mirror what is below the diagonal."""
    level, _, program = find_level(sizes)
    channels, pixels, splits, pitch, blocks = pick_sizes(sizes, level)
    image, row, block = find_tile(program, channels, blocks)
    col = block * OUTPUTS + tl.arange(0, OUTPUTS)
    at = pick(partials, level) + (image * splits * pitch + row) * pitch + col
    value = add_tiles(at, splits, pitch * pitch, col <= row, TILES, OUTPUTS) / pixels
    matrix = pick(covariance, level) + image * channels * channels
    tl.store(matrix + row * channels + col, value, mask=col <= row)
    tl.store(matrix + col * channels + row, value, mask=col <= row)


@triton.jit
def add_map_gradients(
    x,  # a level: (N, C, H, W)
    matrix,  # a level: (N, C, C)
    shift,  # a level: (N, C)
    weight,  # a level: (p, C)
    winners,  # a level: (N, p, cells)
    grad_pooled,  # a level: (N, p, cells)
    gradient,  # a level: (N, C, H, W), densely packed
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Add ``matrix x + shift`` and the pooled values' ``G weight`` to each map's gradient."""
    level, path, program = find_level(sizes)
    size = GradientSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, matrix, shift, weight), level)
    pool = pick_all((winners, grad_pooled), level)
    image, pixel_tile, channel_tile = find_tile(program, size.pixel_tiles, size.channel_tiles)
    pixel, channel = indices(pixel_tile, PIXELS), indices(channel_tile, CHANNELS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = map_extents(inputs[0], size, PATHS[index])
            total = gradient_tile(inputs, pool, size, extents, image, pixel, channel, PATHS[index], PRECISION, INNER)
            IS_ALIGNED: tl.constexpr = ALIGNED & PATHS[index]
            IS_PLANAR: tl.constexpr = PLANAR & PATHS[index]
            channels, pixels = extents
            dense = pick(gradient, level)
            at, inside = dense_tile(dense, image, pixel, channel, pixels, channels, IS_ALIGNED, IS_PLANAR)
            total += tl.load(at, mask=inside, other=0.0).to(total.dtype)
            store_rounded(at, total, inside)


@triton.jit
def gradient_tile(
    inputs,
    pool,
    size,
    extents,
    image,
    pixel,
    channel,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """Return a tile ``(pixels, channels)`` of ``matrix x + shift`` and of the pooled values' ``G weight``."""
    x, matrix, shift, weight = inputs
    channels, pixels = extents
    outputs, matrix_given = small((size.outputs, size.matrix_given))
    operand: tl.constexpr = weight.dtype.element_ty
    total = add_product(
        tl.zeros((pixel.shape[0], channel.shape[0]), shift.dtype.element_ty),
        Images(x, size.stride, size.pitch),
        Images(matrix, channels.to(tl.int64) * channels, channels),
        image,
        pixel,
        channel,
        (pixels, channels, channels * matrix_given),
        PLANAR=PLANAR & PATH,
        TRANSPOSED=False,
        IS_ALIGNED=ALIGNED & PATH,
        OPERAND=operand,
        PRECISION=PRECISION,
        INNER=INNER,
    )
    for first in range(0, outputs, INNER):
        k = first + tl.arange(0, INNER)
        scattered = scattered_tile(pool, size, image, pixel, k, True).to(operand)
        at = tile_pointers(weight, 0, 0, channels, k[:, None], channel[None, :], ALIGNED & PATH, False)
        inside = (k < outputs)[:, None] & (channel < channels)[None, :]
        total = multiply(scattered, tl.load(at, mask=inside, other=0.0), total, PRECISION)
    inside = (channel < channels) & (size.shift_given != 0)
    return total + tl.load(shift + image * channels + channel, mask=inside, other=0.0)[None, :]


@triton.jit
def pool_weight_gradients(
    x,  # a level: (N, C, H, W)
    winners,  # a level: (N, p, cells)
    grad_pooled,  # a level: (N, p, cells)
    partials,  # a level, in whole tiles: (splits, p, C)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums over pixels of ``G^T x^T``."""
    level, path, program = find_level(sizes)
    size = WeightSizes(*pick_sizes(sizes, level))
    pool = pick_all((winners, grad_pooled), level)
    split, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    row, col = indices(row_tile, INNER), indices(col_tile, CHANNELS)
    dtype: tl.constexpr = pool[1].dtype.element_ty
    first, end = split * size.tiles_of_split, tl.minimum((split + 1) * size.tiles_of_split, size.tiles)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = map_extents(pick(x, level), size, PATHS[index])
            operand: tl.constexpr = tl.bfloat16 if pick(x, level).dtype.element_ty == tl.bfloat16 else dtype
            total = tl.zeros((INNER, CHANNELS), dtype)
            for tile in range(first, end):
                image, pixel = tile // size.tiles_of_image, indices(tile % size.tiles_of_image, PIXELS)
                scattered = scattered_tile(pool, size, image, pixel, row, False).to(operand)
                features = load_tile(pick(x, level), size, extents, image, pixel, col, True, PATHS[index]).to(operand)
                total = multiply(scattered, features, total, PRECISION)
            pitch = size.col_tiles * CHANNELS
            stride = size.row_tiles * INNER * pitch
            at = tile_pointers(pick(partials, level), split, stride, pitch, row[:, None], col[None, :], True, False)
            tl.store(at, total)


@triton.jit
def scattered_tile(pool, size, image, pixel, channel, PIXELS_FIRST: tl.constexpr):
    """Return a tile of G, ``(pixels, p)`` or transposed: a cell's gradient at its winner, and zeros elsewhere."""
    winners, grad_pooled = pool
    width, outputs = small((size.width, size.outputs))
    cell_height, cell_width, cell_rows, cell_cols = small(
        (size.cell_height, size.cell_width, size.cell_rows, size.cell_cols)
    )
    cell_row, cell_col = pixel // width // cell_height, pixel % width // cell_width
    in_cell = (cell_row < cell_rows) & (cell_col < cell_cols)
    cell, channel = across(cell_row * cell_cols + cell_col, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    at = (image * outputs + channel) * (size.cell_rows * cell_cols) + cell
    inside = across(in_cell, PIXELS_FIRST) & (channel < outputs)
    won = tl.load(winners + at, mask=inside, other=-1) == across(pixel, PIXELS_FIRST)
    return tl.load(grad_pooled + at, mask=won, other=0.0)


@triton.jit
def load_tile(x, size, extents, image, pixel, channel, PIXELS_FIRST: tl.constexpr, PATH: tl.constexpr):
    """Return a tile of x, ``(pixels, channels)`` or transposed; zeros outside."""
    channels, pixels = extents
    row, col = across(pixel, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    at = tile_pointers(x, image, size.stride, size.pitch, row, col, ALIGNED & PATH, PLANAR & PATH)
    return tl.load(at, mask=(row < pixels) & (col < channels), other=0.0)


@triton.jit
def map_extents(x, size, PATH: tl.constexpr):
    """Return channels and pixels, known to be whole vectors where 16 bytes are read at a time along them.

    Extents, unlike offsets, fit 32 bits, which halves the registers of a tile's indices.
    """
    VECTOR: tl.constexpr = vector_length(x.dtype.element_ty)
    channels = whole_vectors(size.channels.to(tl.int32), ALIGNED & PATH, VECTOR)
    pixels = whole_vectors(size.pixels.to(tl.int32), (ALIGNED & PATH) and (PLANAR & PATH), VECTOR)
    return channels, pixels


@triton.jit
def small(extents):
    """Extents in 32 bits."""
    return [extent.to(tl.int32) for extent in extents]


class _Blocks(NamedTuple):
    """Extents of a program's tiles, and its warps."""

    PIXELS: int
    CHANNELS: int  # of the result
    INNER: int  # channels of one step; pool_weight_gradients: rows of the result; covariance_tiles: unused
    num_warps: int


# By the bytes of an operand and by whether everything is read 16 bytes at a time, which takes fewer registers. The
# largest tiles without spills on sm_80, sm_90 and sm_100, as compiled.
POOL_PIXELS = 64
_POOL = {
    (2, True): _Blocks(POOL_PIXELS, 64, 64, 8),
    (2, False): _Blocks(POOL_PIXELS, 64, 64, 8),
    (4, True): _Blocks(POOL_PIXELS, 64, 16, 8),
    (4, False): _Blocks(POOL_PIXELS, 32, 16, 4),
    (8, True): _Blocks(POOL_PIXELS, 64, 16, 8),
    (8, False): _Blocks(POOL_PIXELS, 64, 16, 8),
}
_COVARIANCE = {
    (4, True): _Blocks(32, 64, 0, 4),
    (4, False): _Blocks(32, 64, 0, 8),
    (8, True): _Blocks(16, 64, 0, 4),
    (8, False): _Blocks(16, 64, 0, 4),
}
_GRADIENT = {
    (2, True): _Blocks(64, 128, 32, 8),
    (2, False): _Blocks(64, 128, 32, 8),
    (4, True): _Blocks(64, 128, 16, 8),
    (4, False): _Blocks(64, 64, 16, 4),
    (8, True): _Blocks(32, 64, 16, 4),
    (8, False): _Blocks(32, 64, 16, 4),
}
_WEIGHT = {
    (2, True): _Blocks(32, 128, 64, 8),
    (2, False): _Blocks(32, 128, 64, 8),
    (4, True): _Blocks(32, 64, 32, 4),
    (4, False): _Blocks(32, 64, 32, 4),
    (8, True): _Blocks(16, 32, 64, 4),
    (8, False): _Blocks(16, 32, 32, 4),
}
_Table = dict[tuple[int, bool], _Blocks]


def _blocks(table: _Table, operand: torch.dtype, path: int) -> _Blocks:
    return table[operand.itemsize, bool(path & ALIGNED.value)]


def _gradient_operand(x: Tensor) -> torch.dtype:
    """Of the products with a gradient."""
    return x.dtype if x.dtype == torch.bfloat16 else accumulation_dtype(x)


def _path(x: Tensor, others: tuple[Tensor, ...], *pixel_extents: int) -> int:
    """Return the code path of a level.

    Args:
        x: the map.
        others: what else is read or written 16 bytes at a time; its extents are the map's, its elements not smaller.
        pixel_extents: where the rows of a tile begin, in pixels.
    """
    view = matrix_view(x)
    extents = x.shape[1], *(pixel_extents if view.rows_are_channels else ())
    aligned = aligned_to_16_bytes(x, view.image_stride, view.row_stride, *extents)
    aligned = aligned and all(aligned_to_16_bytes(other) for other in others)
    return PLANAR.value * view.rows_are_channels + ALIGNED.value * aligned


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _map_sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """Return the sizes that all kernels take."""
    view = matrix_view(x)
    return x.shape[1], _pixels(x), x.shape[3], view.image_stride, view.row_stride


def _cells(x: Tensor, pool: _Pool) -> _Cells:
    """Return the pool, and rows and columns of its cells."""
    return *pool, x.shape[2] // pool[0], x.shape[3] // pool[1]


def _by_level(pools: list[int]) -> list[_Pool]:
    return [(pools[at], pools[at + 1], pools[at + 2], pools[at + 3]) for at in range(0, len(pools), 4)]


def _launch(kernel, levels: list[Level], table: _Table, operands: list[torch.dtype]) -> None:
    constants = [_constants(level, table, operand) for level, operand in zip(levels, operands, strict=True)]
    launch_by_constants(kernel, levels, constants)


def _constants(level: Level, table: _Table, operand: torch.dtype) -> dict:
    allowed = "tf32" if level.pointers[0].element_size() == 2 else precision()
    return {"PRECISION": allowed, **_blocks(table, operand, level.path)._asdict()}


def non_local_statistics_forward(
    maps: list[Tensor],  # (N, C, H, W)
    means: list[Tensor | None],  # (N, C)
    projections: list[Tensor | None],  # (r, C)
    weights: list[Tensor | None],  # (p, C)
    biases: list[Tensor | None],  # (p,)
    pools: list[int],  # 4 a level: height and width of a cell, and of the first pool's in a nested order
) -> list[Tensor]:
    """Return all levels' largest values of ``weight @ x + bias`` in each cell ``(N, p, cells)``.

    Then the pixels that they come from, then the covariances of ``projection @ x`` with x ``(N, r, C)``. Empty where
    nothing is asked for.
    """
    pooled, winners = _pool(maps, weights, biases, _by_level(pools))
    covariances = _covariances(maps, means)
    with without_autocast(maps[0]):
        cross = [
            covariance if mean is None or projection is None else torch.matmul(projection, covariance)
            for covariance, mean, projection in zip(covariances, means, projections, strict=True)
        ]
    return [*pooled, *winners, *cross]


def _pool(
    maps: list[Tensor],
    weights: list[Tensor | None],
    biases: list[Tensor | None],
    pools: list[_Pool],
) -> tuple[list[Tensor], list[Tensor]]:
    pooled, winners, levels = [], [], []
    weights = in_dtypes(weights, [x.dtype for x in maps])
    for x, weight, bias, pool in zip(maps, weights, biases, pools, strict=True):
        shape: tuple[int, ...] = (0,)
        if weight is not None:
            *_, rows, cols = cells = _cells(x, pool)
            shape = x.shape[0], weight.shape[0], rows * cols
        pooled.append(x.new_empty(shape, dtype=accumulation_dtype(x)))
        winners.append(x.new_empty(shape, dtype=torch.int32))
        if weight is not None:
            levels.append(_pool_level(x, weight, present(bias), pooled[-1], winners[-1], cells))
    _launch(pool_convolutions, levels, _POOL, [level.pointers[0].dtype for level in levels])
    return pooled, winners


def _pool_level(x: Tensor, weight: Tensor, bias: Tensor, pooled: Tensor, winners: Tensor, cells: _Cells) -> Level:
    _, width, _, _, rows, cols = cells
    cells_of_tile = max(POOL_PIXELS // width, 1)
    path = _path(x, (weight,), x.shape[3], cells_of_tile * width)
    tiles_of_row = triton.cdiv(cols, cells_of_tile)
    channel_tiles = triton.cdiv(weight.shape[0], _blocks(_POOL, x.dtype, path).CHANNELS)
    sizes = PoolSizes(*_map_sizes(x), weight.shape[0], *cells, cells_of_tile, tiles_of_row, channel_tiles)
    programs = x.shape[0] * rows * tiles_of_row * channel_tiles
    return Level(programs, (x, weight, bias, pooled, winners), sizes, path)


def _covariances(maps: list[Tensor], means: list[Tensor | None]) -> list[Tensor]:
    """Of each map ``(N, C, C)``; empty where there is no mean."""
    covariances, levels, finish = [], [], []
    for x, mean in zip(maps, means, strict=True):
        shape = (0,) if mean is None else (*x.shape[:2], x.shape[1])
        covariances.append(x.new_empty(shape, dtype=accumulation_dtype(x)))
        if mean is not None:
            tiles, sums = _covariance_levels(x, mean, covariances[-1])
            levels.append(tiles)
            finish.append(sums)
    _launch(covariance_tiles, levels, _COVARIANCE, [level.pointers[1].dtype for level in levels])
    launch(finish_covariances, finish, TILES=FINISH_TILES, OUTPUTS=FINISH_OUTPUTS)
    return covariances


def _covariance_levels(x: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Level, Level]:
    """Return the level of the kernel that makes partial sums, and of the one that adds them up."""
    images, channels, path = *x.shape[:2], _path(x, (), _pixels(x))
    blocks = _blocks(_COVARIANCE, mean.dtype, path)
    tiles = triton.cdiv(channels, blocks.CHANNELS)
    used = images * tiles * (tiles + 1) // 2  # up to the diagonal
    splits, tiles_of_split = splits_of(triton.cdiv(_pixels(x), blocks.PIXELS), used, blocks.PIXELS)
    pitch = tiles * blocks.CHANNELS
    partials = x.new_empty(images * splits * pitch * pitch, dtype=mean.dtype)
    sizes = CovarianceSizes(*_map_sizes(x), tiles, splits, tiles_of_split)
    parts = Level(images * splits * tiles * tiles, (x, mean, partials), sizes, path)
    output_blocks = triton.cdiv(channels, FINISH_OUTPUTS)
    sums = channels, _pixels(x), splits, pitch, output_blocks
    return parts, Level(images * channels * output_blocks, (covariance, partials), sums)


def non_local_statistics_backward_(
    gradients: list[Tensor],  # (N, C, H, W), densely packed, an empty one is not wanted; an empty list: none is
    grad_weights: list[Tensor],  # (p, C), to fill
    maps: list[Tensor],  # (N, C, H, W)
    means: list[Tensor | None],  # (N, C)
    projections: list[Tensor | None],  # (r, C)
    inner: list[Tensor | None],  # (N, r, C)
    shifts: list[Tensor | None],  # (N, C)
    weights: list[Tensor | None],  # (p, C)
    winners: list[Tensor],  # (N, p, cells)
    grad_pooled: list[Tensor | None],  # (N, p, cells)
    pools: list[int],
) -> None:
    """Add to each gradient ``projection^T inner (x - mean) + shift``, in place.

    Where a pooled value came from, add ``weight^T`` times that value's gradient too. Fill the weights' own gradients
    where the pooled values have any.
    """
    by_level = _by_level(pools)
    operands = [_gradient_operand(x) for x in maps]
    if gradients:
        matrices = in_dtypes([_product(p, i) for p, i in zip(projections, inner, strict=True)], operands)
        offsets = _offsets(matrices, means, shifts)
        columns = gradients, maps, matrices, offsets, in_dtypes(weights, operands), winners, grad_pooled, by_level
        levels = [_gradient_level(*level) for level in zip(*columns, strict=True)]
        wanted = [index for index, gradient in enumerate(gradients) if gradient.numel()]
        _launch(add_map_gradients, [levels[i] for i in wanted], _GRADIENT, [operands[i] for i in wanted])
    pooled = [
        _weight_levels(gradient, x, won, given, pool)
        for gradient, x, won, given, pool in zip(grad_weights, maps, winners, grad_pooled, by_level, strict=True)
        if given is not None
    ]
    operands = [_gradient_operand(partial.pointers[0]) for partial, _ in pooled]
    _launch(pool_weight_gradients, [partial for partial, _ in pooled], _WEIGHT, operands)
    add_up([total for _, total in pooled])


def _product(projection: Tensor | None, inner: Tensor | None) -> Tensor | None:
    """``projection^T inner (N, C, C)``."""
    if projection is None or inner is None:
        return inner
    with without_autocast(inner):
        return torch.matmul(projection.mT, inner)


def _offsets(
    matrices: list[Tensor | None], means: list[Tensor | None], shifts: list[Tensor | None]
) -> list[Tensor | None]:
    """``shift - matrix mean (N, C)``, of matrices that are rounded already: the same ones meet x."""
    matrices = in_dtypes(matrices, [None if mean is None else mean.dtype for mean in means])
    offsets = list(shifts)
    for index, (matrix, mean, shift) in enumerate(zip(matrices, means, shifts, strict=True)):
        if matrix is not None:
            column, beta = present(mean)[:, :, None], 0 if shift is None else 1
            added = column if shift is None else shift[:, :, None]
            with without_autocast(matrix):
                centre = torch.baddbmm(added, matrix, column, beta=beta, alpha=-1)
            offsets[index] = centre[:, :, 0]
    return offsets


def _gradient_level(
    gradient: Tensor,
    x: Tensor,
    matrix: Tensor | None,
    shift: Tensor | None,
    weight: Tensor | None,
    winners: Tensor,
    grad_pooled: Tensor | None,
    pool: _Pool,
) -> Level:
    operand = _gradient_operand(x)
    given = matrix is not None, shift is not None
    outputs, cells = (0, _cells(x, (1, 1, 1, 1))) if grad_pooled is None else (grad_pooled.shape[1], _cells(x, pool))
    factors = in_place_of_none((matrix, weight), x, operand)
    path = _path(x, (gradient, *factors), _pixels(x))
    blocks = _blocks(_GRADIENT, operand, path)
    tiles = triton.cdiv(_pixels(x), blocks.PIXELS), triton.cdiv(x.shape[1], blocks.CHANNELS)
    shift, grad_pooled = in_place_of_none((shift, grad_pooled), x, accumulation_dtype(x))
    programs = x.shape[0] * tiles[0] * tiles[1] if any(given) or outputs else 0
    pointers = x, factors[0], shift, factors[1], winners, grad_pooled, gradient
    sizes = GradientSizes(*_map_sizes(x), outputs, *cells, *tiles, *given)
    return Level(programs, pointers, sizes, path)


def _weight_levels(
    gradient: Tensor, x: Tensor, winners: Tensor, grad_pooled: Tensor, pool: _Pool
) -> tuple[Level, Level]:
    """Return the level of the kernel that makes partial sums, and of the one that adds them up."""
    path, (outputs, channels) = _path(x, (), _pixels(x)), gradient.shape
    blocks = _blocks(_WEIGHT, _gradient_operand(x), path)
    rows, cols = triton.cdiv(outputs, blocks.INNER), triton.cdiv(channels, blocks.CHANNELS)
    tiles_of_image = triton.cdiv(_pixels(x), blocks.PIXELS)
    tiles = x.shape[0] * tiles_of_image
    splits, tiles_of_split = splits_of(tiles, rows * cols, blocks.PIXELS)
    pitch, stride = cols * blocks.CHANNELS, rows * blocks.INNER * cols * blocks.CHANNELS
    partials = x.new_empty(splits * stride, dtype=grad_pooled.dtype)
    tiles_of_level = rows, cols, tiles_of_image, tiles, tiles_of_split
    sizes = WeightSizes(*_map_sizes(x), outputs, *_cells(x, pool), *tiles_of_level)
    parts = Level(splits * rows * cols, (x, winners, grad_pooled, partials), sizes, path)
    return parts, sum_of_splits(gradient, partials, 0, splits, stride, pitch)
