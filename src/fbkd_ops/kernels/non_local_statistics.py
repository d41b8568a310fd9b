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
    Images,
    across,
    add_product,
    add_up,
    dense_tile,
    in_dtypes,
    indices,
    map_tile,
    multiply,
    splits_of,
    sum_of_splits,
)
from .pyramid import (
    ALIGNMENT,
    SIXTEEN_BYTES,
    Level,
    add_tiles,
    alignment,
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
from .tiles import blocks_of, precision

__all__ = ["non_local_statistics_backward_", "non_local_statistics_forward"]

_Pool = tuple[int, int, int, int]  # height and width of a cell, and of the first pool's in a nested order

# A level's code path: the ALIGNMENT of maps and matrices, and a bit that says that the map's pixels lie side by side
# (else its channels).
PLANAR = tl.constexpr(4)
UNVISITED = tl.constexpr((1 << 31) - 1)  # comes after every candidate
FINISH_TILES, FINISH_OUTPUTS = 8, 256
MOST_RESIDENT = 256  # channels of 16-bit weights that stay in shared memory for a program's life
COVARIANCE_PIXELS = 2048  # the most that tensor cores, which truncate their sums, add up without a rounded addition
NARROW = 4  # pixels of a cell's row, where fewer are narrow
ONE_ROW_CELL = 64  # pixels side by side of a map without cells


class PoolSizes(NamedTuple):
    """A level's sizes in pool_convolutions."""

    channels: int
    pixels: int
    stride: int  # of the map, from image to image
    pitch: int
    width: int
    cell_height: int
    cell_width: int
    first_height: int  # of the first pool's cells in a nested order
    first_width: int
    cell_rows: int  # of whole cells
    cell_cols: int
    grid_cols: int  # of cells, in the order in which tiles take them
    outputs: int  # p
    cell_tiles: int
    channel_tiles: int


class CovarianceSizes(NamedTuple):
    """A level's sizes in covariance_tiles."""

    channels: int
    pixels: int
    stride: int
    pitch: int
    channel_tiles: int
    splits: int
    tiles_of_split: int


class GradientSizes(NamedTuple):
    """A level's sizes in add_map_gradients."""

    channels: int
    pixels: int
    stride: int
    pitch: int
    width: int
    cell_height: int
    cell_width: int
    first_height: int
    first_width: int
    cell_rows: int
    cell_cols: int
    grid_cols: int
    height: int
    outputs: int
    steps: int
    channel_tiles: int
    matrix_given: int
    shift_given: int


class WeightSizes(NamedTuple):
    """A level's sizes in pool_weight_gradients."""

    channels: int
    pixels: int
    stride: int
    pitch: int
    width: int
    cell_height: int
    cell_width: int
    first_height: int
    first_width: int
    cell_rows: int
    cell_cols: int
    grid_cols: int
    outputs: int
    row_tiles: int
    col_tiles: int
    steps_of_image: int
    steps: int
    steps_of_split: int


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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Convolve and pool ``ROWS / WIDTH`` cells per program, whose columns have WIDTH lanes, from row to row.

    WIDE cells are wider than a tile, which takes their columns one part after the other. RESIDENT weights are read
    once: INNER has all channels.
    """
    level, path, program = find_level(sizes)
    size = PoolSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, weight, bias), level)
    outputs, cell_width = small((size.outputs, size.cell_width))
    cells = (size.cell_rows * size.cell_cols).to(tl.int32)
    image, tile, channel_tile = find_tile(program, size.cell_tiles, size.channel_tiles)
    CELLS: tl.constexpr = ROWS // WIDTH
    first, channel = tile.to(tl.int32) * CELLS, indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            lanes = first, 0, cell_width
            best, order = fold_columns(
                inputs, size, image, lanes, channel, PATHS[index], PRECISION, ROWS, COLS, INNER, WIDTH, RESIDENT
            )
            if WIDE:
                for start in range(ROWS, cell_width, ROWS):
                    lanes = first, start, cell_width
                    value, rank = fold_columns(
                        inputs,
                        size,
                        image,
                        lanes,
                        channel,
                        PATHS[index],
                        PRECISION,
                        ROWS,
                        COLS,
                        INNER,
                        WIDTH,
                        False,
                    )
                    wins = precedes(value, rank, best, order)
                    best, order = tl.where(wins, value, best), tl.where(wins, rank, order)
            best, order = fold_cells(best, order, CELLS, WIDTH)
            cell = first + tl.arange(0, CELLS)
            inside = (cell < cells)[:, None] & (channel < outputs)[None, :]
            at = (image * outputs + channel)[None, :] * cells + cell[:, None]
            tl.store(pick(pooled, level) + at, best, mask=inside)
            tl.store(
                pick(winners, level) + at, first_pixel(size, cell)[:, None] + pixel_in_cell(size, order), mask=inside
            )


@triton.jit
def fold_columns(
    inputs,
    size,
    image,
    lanes,  # the tile's first cell, its first column of each cell, and where the columns end
    channel,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    RESIDENT: tl.constexpr,
):
    """Return the best value ``(pixels, p)`` of each column of a tile's cells, and when it was visited."""
    x, weight, bias = inputs
    first, start, end = lanes
    channels, pixels = map_extents(x, size, PATH)
    outputs, cell_height = small((size.outputs, size.cell_height))
    column = start + tl.arange(0, ROWS) % WIDTH
    shift = tl.load(bias + channel, mask=channel < outputs, other=0.0)
    maps, matrices = Images(x, size.stride, size.pitch), Images(weight, 0, channels)
    best = tl.full((ROWS, COLS), float("-inf"), shift.dtype)
    best_row = tl.zeros((ROWS, COLS), tl.int32)
    if RESIDENT:
        factors = matrix_tile(matrices, tl.arange(0, INNER), channel, (channels, outputs), PATH)
    for row in range(cell_height):
        value = tl.zeros((ROWS, COLS), shift.dtype)
        pixel = lane_pixels(x, size, first, row, start, PATH, ROWS, WIDTH)
        if RESIDENT:
            k = tl.arange(0, INNER)
            at, inside = map_tile(maps, image, pixel, k, pixels, channels, ALIGNMENT & PATH, PLANAR & PATH)
            value = multiply(tl.load(at, mask=inside, other=0.0), factors, value, PRECISION)
        else:
            value = add_product(
                value,
                maps,
                matrices,
                image,
                pixel,
                channel,
                (pixels, outputs, channels),
                PLANAR=PLANAR & PATH,
                TRANSPOSED=False,
                ALIGN=ALIGNMENT & PATH,
                OPERAND=weight.dtype.element_ty,
                PRECISION=PRECISION,
                INNER=INNER,
            )
        value += shift[None, :]
        wins = (value > best) | (value != value)  # rows are visited in order: of equal values the first stays
        best, best_row = tl.where(wins, value, best), tl.where(wins, row, best_row)
    in_cell = (column < end)[:, None]
    rank = order_in_cell(size, best_row, column[:, None])
    return tl.where(in_cell, best, float("-inf")), tl.where(in_cell, rank, UNVISITED)


@triton.jit
def lane_pixels(x, size, first, row, start, PATH: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the pixels ``(PIXELS,)`` of one row of a tile's cells, WIDTH of each cell from its column ``start`` on."""
    VECTOR: tl.constexpr = lane_vector(vector_length(ALIGNMENT & PATH, x.dtype.element_ty), PLANAR & PATH, WIDTH)
    lane = tl.arange(0, PIXELS)
    width = size.width.to(tl.int32) // VECTOR * VECTOR
    pixel = first_pixel(size, first + lane // WIDTH) + row * width + start + lane % WIDTH
    return tl.max_contiguous(tl.multiple_of(pixel, [VECTOR]), [VECTOR])


@triton.constexpr_function
def lane_vector(at_once, is_planar, width):
    """Return how many pixels are read at a time where ``width`` lanes lie side by side."""
    return min(at_once, width) if is_planar else 1


@triton.jit
def first_pixel(size, cell):
    """Return the pixel at which each cell begins."""
    width, cell_height, cell_width, grid_cols = small((size.width, size.cell_height, size.cell_width, size.grid_cols))
    return cell // grid_cols * cell_height * width + cell % grid_cols * cell_width


@triton.jit
def fold_cells(best, order, CELLS: tl.constexpr, WIDTH: tl.constexpr):
    """Return each cell's best value ``(cells, p)``, and when it was visited, from those of its WIDTH columns."""
    best = best.reshape(CELLS, WIDTH, best.shape[1])
    order = order.reshape(best.shape)
    is_nan = best != best
    last_nan = tl.max(tl.where(is_nan, order, -1), axis=1)
    greatest = tl.max(tl.where(is_nan, float("-inf"), best), axis=1)
    first = tl.min(tl.where(best == greatest[:, None, :], order, UNVISITED), axis=1)
    return tl.where(last_nan < 0, greatest, float("nan")), tl.where(last_nan < 0, first, last_nan)


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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums over pixels of ``(x - mean) (x - mean)^T``, up to the tiles on the diagonal."""
    level, path, program = find_level(sizes)
    size = CovarianceSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, mean), level)
    part, row_tile, col_tile = find_tile(program, size.channel_tiles, size.channel_tiles)
    row, col = indices(row_tile, ROWS), indices(col_tile, COLS)
    pitch = size.channel_tiles * ROWS
    for index in tl.static_range(len(PATHS)):
        if (path == PATHS[index]) & (row_tile >= col_tile):
            image, first = part // size.splits, part % size.splits * size.tiles_of_split
            tiles = tl.minimum(size.tiles_of_split, tl.cdiv(size.pixels, INNER) - first)
            span = first, tiles, row, col, row_tile == col_tile
            total = covariance_tile(inputs, size, image, span, PATHS[index], PRECISION, INNER)
            sums = pick(partials, level)
            at = tile_pointers(sums, part, pitch * pitch, pitch, row[:, None], col[None, :], SIXTEEN_BYTES, False)
            tl.store(at, total)


@triton.jit
def covariance_tile(inputs, size, image, span, PATH: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr):
    """Return the sum over the span's pixels of ``(x - mean) (x - mean)^T (rows, columns)``."""
    first, tiles, row, col, is_diagonal = span
    extents = map_extents(inputs[0], size, PATH)
    total = tl.zeros((row.shape[0], col.shape[0]), inputs[1].dtype.element_ty)
    if is_diagonal:  # the same channels twice: read once
        for step in range(0, tiles):
            left = centred_tile(inputs, size, extents, image, indices(first + step, INNER), row, False, PATH)
            total = multiply(left, left.T, total, PRECISION)
    else:
        for step in range(0, tiles):
            left = centred_tile(inputs, size, extents, image, indices(first + step, INNER), row, False, PATH)
            right = centred_tile(inputs, size, extents, image, indices(first + step, INNER), col, True, PATH)
            total = multiply(left, right, total, PRECISION)
    return total / (centring_scale(inputs[0].dtype.element_ty) * centring_scale(inputs[0].dtype.element_ty))


@triton.constexpr_function
def centring_scale(dtype):
    """Return a power of two, times which the difference of two numbers of a 16-bit dtype is finite in that dtype."""
    return 0.5 if dtype.primitive_bitwidth == 16 else 1.0


@triton.jit
def centred_tile(inputs, size, extents, image, pixel, channel, PIXELS_FIRST: tl.constexpr, PATH: tl.constexpr):
    """Return a tile of ``x - mean``, ``(pixels, channels)`` or transposed; zeros outside.

    Of a 16-bit map it is rounded to that dtype, scaled by :func:`centring_scale`.
    """
    x, mean = inputs
    channels, pixels = extents
    operand: tl.constexpr = x.dtype.element_ty
    value = load_tile(x, size, extents, image, pixel, channel, PIXELS_FIRST, PATH).to(mean.dtype.element_ty)
    centre = tl.load(mean + image * channels + channel, mask=channel < channels, other=0.0)
    value = tl.where(across(pixel < pixels, PIXELS_FIRST), value - across(centre, not PIXELS_FIRST), 0.0)
    if operand.primitive_bitwidth == 16:
        value = (centring_scale(operand) * value).to(operand)
    return value


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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add ``matrix x + shift`` and the pooled values' ``G weight`` to each map's gradient."""
    level, path, program = find_level(sizes)
    size = GradientSizes(*pick_sizes(sizes, level))
    inputs = pick_all((x, matrix, shift, weight), level)
    pool = pick_all((winners, grad_pooled), level)
    image, step, channel_tile = find_tile(program, size.steps, size.channel_tiles)
    first, row, start = step_in_cells(size, step.to(tl.int32), ROWS, WIDTH)
    channel = indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = map_extents(inputs[0], size, PATHS[index])
            pixel = lane_pixels(inputs[0], size, first, row, start, PATHS[index], ROWS, WIDTH)
            in_grid = lanes_inside(inputs[0], size, first, row, start, PATHS[index], ROWS, WIDTH)
            total = gradient_tile(
                inputs, pool, size, extents, image, first, pixel, channel, PATHS[index], PRECISION, INNER, WIDTH
            )
            ALIGN: tl.constexpr = ALIGNMENT & PATHS[index]
            IS_PLANAR: tl.constexpr = PLANAR & PATHS[index]
            channels, pixels = extents
            dense = pick(gradient, level)
            at, inside = dense_tile(dense, image, pixel, channel, pixels, channels, ALIGN, IS_PLANAR)
            inside = inside & in_grid[:, None]
            total += tl.load(at, mask=inside, other=0.0).to(total.dtype)
            store_rounded(at, total, inside)


@triton.jit
def gradient_tile(
    inputs,
    pool,
    size,
    extents,
    image,
    first,
    pixel,
    channel,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
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
        ALIGN=ALIGNMENT & PATH,
        OPERAND=operand,
        PRECISION=PRECISION,
        INNER=INNER,
    )
    for begin in range(0, outputs, INNER):
        k = begin + tl.arange(0, INNER)
        scattered = scattered_tile(pool, size, image, first, pixel, k, True, WIDTH).to(operand)
        at = tile_pointers(weight, 0, 0, channels, k[:, None], channel[None, :], ALIGNMENT & PATH, False)
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
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Partial sums over pixels of ``G^T x^T``."""
    level, path, program = find_level(sizes)
    size = WeightSizes(*pick_sizes(sizes, level))
    pool = pick_all((winners, grad_pooled), level)
    split, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    output, channel = indices(row_tile, ROWS), indices(col_tile, COLS)
    dtype: tl.constexpr = pool[1].dtype.element_ty
    begin, end = split * size.steps_of_split, tl.minimum((split + 1) * size.steps_of_split, size.steps)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            maps = pick(x, level)
            extents = map_extents(maps, size, PATHS[index])
            operand: tl.constexpr = tl.bfloat16 if maps.dtype.element_ty == tl.bfloat16 else dtype
            total = tl.zeros((ROWS, COLS), dtype)
            for passed in range(0, end - begin):
                step = begin + passed
                image, step = step // size.steps_of_image, (step % size.steps_of_image).to(tl.int32)
                first, row, start = step_in_cells(size, step, INNER, WIDTH)
                pixel = lane_pixels(maps, size, first, row, start, PATHS[index], INNER, WIDTH)
                scattered = scattered_tile(pool, size, image, first, pixel, output, False, WIDTH).to(operand)
                features = load_tile(maps, size, extents, image, pixel, channel, True, PATHS[index]).to(operand)
                total = multiply(scattered, features, total, PRECISION)
            pitch = size.col_tiles * COLS
            stride = size.row_tiles * ROWS * pitch
            row, col = output[:, None], channel[None, :]
            at = tile_pointers(pick(partials, level), split, stride, pitch, row, col, SIXTEEN_BYTES, False)
            tl.store(at, total)


@triton.jit
def step_in_cells(size, step, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile's first cell, row and first column: cells after cells, each tile row by row, part by part."""
    cell_height, cell_width = small((size.cell_height, size.cell_width))
    parts = tl.cdiv(cell_width, WIDTH)
    tile, rest = step // (cell_height * parts), step % (cell_height * parts)
    return tile * (PIXELS // WIDTH), rest // parts, rest % parts * WIDTH


@triton.jit
def lanes_inside(x, size, first, row, start, PATH: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Whether each lane's pixel is one of its own cell, and of the map."""
    width, height, cell_height, cell_width, grid_cols = small(
        (size.width, size.height, size.cell_height, size.cell_width, size.grid_cols)
    )
    lane = tl.arange(0, PIXELS)
    cell, column = first + lane // WIDTH, start + lane % WIDTH
    in_map = (cell // grid_cols * cell_height + row < height) & (cell % grid_cols * cell_width + column < width)
    VECTOR: tl.constexpr = lane_vector(vector_length(ALIGNMENT & PATH, x.dtype.element_ty), PLANAR & PATH, WIDTH)
    return tl.max_constancy(in_map & (column < cell_width), [VECTOR])


@triton.jit
def scattered_tile(pool, size, image, first, pixel, channel, PIXELS_FIRST: tl.constexpr, WIDTH: tl.constexpr):
    """Return a tile of G, ``(pixels, p)`` or transposed: a cell's gradient at its winner, and zeros elsewhere."""
    winners, grad_pooled = pool
    outputs, cell_rows, cell_cols, grid_cols = small((size.outputs, size.cell_rows, size.cell_cols, size.grid_cols))
    CELLS: tl.constexpr = pixel.shape[0] // WIDTH
    OUTPUTS: tl.constexpr = channel.shape[0]
    in_grid = first + tl.arange(0, CELLS)
    cell_row, cell_col = in_grid // grid_cols, in_grid % grid_cols
    whole = across((cell_row < cell_rows) & (cell_col < cell_cols), PIXELS_FIRST)
    cell, channel = across(cell_row * cell_cols + cell_col, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    at, inside = (image * outputs + channel) * (cell_rows * cell_cols) + cell, whole & (channel < outputs)
    winner = tl.load(winners + at, mask=inside, other=-1)
    value = tl.load(grad_pooled + at, mask=inside, other=0.0)
    if PIXELS_FIRST:
        won = winner[:, None, :] == pixel.reshape(CELLS, WIDTH)[:, :, None]
        return tl.where(won, value[:, None, :], 0.0).reshape(CELLS * WIDTH, OUTPUTS)
    else:
        won = winner[:, :, None] == pixel.reshape(CELLS, WIDTH)[None, :, :]
        return tl.where(won, value[:, :, None], 0.0).reshape(OUTPUTS, CELLS * WIDTH)


@triton.jit
def load_tile(x, size, extents, image, pixel, channel, PIXELS_FIRST: tl.constexpr, PATH: tl.constexpr):
    """Return a tile of x, ``(pixels, channels)`` or transposed; zeros outside."""
    channels, pixels = extents
    row, col = across(pixel, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    at = tile_pointers(x, image, size.stride, size.pitch, row, col, ALIGNMENT & PATH, PLANAR & PATH)
    return tl.load(at, mask=(row < pixels) & (col < channels), other=0.0)


@triton.jit
def matrix_tile(matrix, row, col, extents, PATH: tl.constexpr):
    """Return a tile ``(columns, rows)`` of a matrix, transposed; zeros outside."""
    rows, cols = extents
    at = tile_pointers(matrix.data, 0, 0, matrix.pitch, row[:, None], col[None, :], ALIGNMENT & PATH, True)
    return tl.load(at, mask=(row < rows)[:, None] & (col < cols)[None, :], other=0.0)


@triton.jit
def map_extents(x, size, PATH: tl.constexpr):
    """Return channels and pixels, known to be whole vectors where several elements are read at a time along them.

    Extents, unlike offsets, fit 32 bits, which halves the registers of a tile's indices.
    """
    VECTOR: tl.constexpr = vector_length(ALIGNMENT & PATH, x.dtype.element_ty)
    channels = whole_vectors(size.channels.to(tl.int32), VECTOR)
    pixels = whole_vectors(size.pixels.to(tl.int32), VECTOR if PLANAR & PATH else 1)
    return channels, pixels


@triton.jit
def small(extents):
    """Extents in 32 bits."""
    return [extent.to(tl.int32) for extent in extents]


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
    aligned = [alignment(x, view.image_stride, view.row_stride, *extents), *map(alignment, others)]
    return PLANAR.value * view.rows_are_channels + min(aligned)


def _pixels(x: Tensor) -> int:
    return x.shape[2] * x.shape[3]


def _map_sizes(x: Tensor) -> tuple[int, int, int, int]:
    """Return the sizes that all kernels take."""
    view = matrix_view(x)
    return x.shape[1], _pixels(x), view.image_stride, view.row_stride


def _by_level(pools: list[int]) -> list[_Pool]:
    return [(pools[at], pools[at + 1], pools[at + 2], pools[at + 3]) for at in range(0, len(pools), 4)]


def _constants(kernel, x: Tensor, operand: torch.dtype, path: int, cell_width: int = NARROW) -> dict:
    """Return the constants of a level's launch; a tile of NARROW cells takes as many registers as an unaligned one."""
    allowed = "tf32" if x.element_size() == 2 else precision()
    aligned = path & ALIGNMENT.value == SIXTEEN_BYTES.value and cell_width >= NARROW
    return {"PRECISION": allowed, **blocks_of(kernel, x, operand, aligned)._asdict()}


class _Grid(NamedTuple):
    """A map cut into cells. A tile takes a row of pixels of some cells, in a grid that may have cut off ones too."""

    height: int
    width: int
    pool: _Pool
    cell_rows: int  # of whole cells
    cell_cols: int
    rows: int
    cols: int

    @property
    def cell_width(self) -> int:
        return self.pool[1]

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int, int, int]:
        """For a kernel, from the width on."""
        return self.width, *self.pool, self.cell_rows, self.cell_cols, self.cols

    def lanes(self, pixels: int) -> int:
        """Return how many pixels of a tile lie in one cell."""
        return min(triton.next_power_of_2(self.cell_width), pixels)

    def tiles(self, pixels: int) -> int:
        """Return how many tiles take a row of every cell, or a part of one that is wider than a tile."""
        return triton.cdiv(self.rows * self.cols, pixels // self.lanes(pixels))

    def steps(self, pixels: int) -> int:
        """Return how many tiles take every pixel of the grid."""
        return self.tiles(pixels) * self.pool[0] * triton.cdiv(self.cell_width, self.lanes(pixels))


def _whole_cells(x: Tensor, pool: _Pool) -> _Grid:
    height, width = x.shape[2:]
    rows, cols = height // pool[0], width // pool[1]
    return _Grid(height, width, pool, rows, cols, rows, cols)


def _all_pixels(x: Tensor, pool: _Pool | None) -> _Grid:
    """Return the grid of whole and cut off cells; without a pool, of one row of pixels in pieces of any length."""
    if pool is None:
        count = _pixels(x)
        return _Grid(1, count, (1, ONE_ROW_CELL, 1, 1), 0, 0, 1, triton.cdiv(count, ONE_ROW_CELL))
    whole = _whole_cells(x, pool)
    return whole._replace(rows=triton.cdiv(whole.height, pool[0]), cols=triton.cdiv(whole.width, pool[1]))


def _launch(kernel, levels: list[tuple[Level, dict]]) -> None:
    """Launch the kernel for all levels, each with its own constants."""
    launch_by_constants(kernel, [level for level, _ in levels], [constants for _, constants in levels])


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
        grid = _whole_cells(x, (1, 1, 1, 1) if weight is None else pool)
        shape: tuple[int, ...] = (0,)
        if weight is not None:
            shape = x.shape[0], weight.shape[0], grid.rows * grid.cols
        pooled.append(x.new_empty(shape, dtype=accumulation_dtype(x)))
        winners.append(x.new_empty(shape, dtype=torch.int32))
        if weight is not None:
            levels.append(_pool_level(x, weight, present(bias), pooled[-1], winners[-1], grid))
    _launch(pool_convolutions, levels)
    return pooled, winners


def _pool_level(
    x: Tensor, weight: Tensor, bias: Tensor, pooled: Tensor, winners: Tensor, grid: _Grid
) -> tuple[Level, dict]:
    """Return a level, and the constants of its launch."""
    path = _path(x, (weight,), grid.width, grid.cell_width)
    constants = _constants(pool_convolutions, x, x.dtype, path, grid.cell_width)
    inner = max(triton.next_power_of_2(x.shape[1]), 32)
    resident = x.element_size() == 2 and inner <= MOST_RESIDENT
    if resident:
        constants["INNER"] = inner
    lanes = grid.lanes(constants["ROWS"])
    constants |= {"WIDTH": lanes, "WIDE": grid.cell_width > lanes, "RESIDENT": resident}
    tiles = grid.tiles(constants["ROWS"]), triton.cdiv(weight.shape[0], constants["COLS"])
    sizes = PoolSizes(*_map_sizes(x), *grid.sizes, weight.shape[0], *tiles)
    return Level(x.shape[0] * tiles[0] * tiles[1], (x, weight, bias, pooled, winners), sizes, path), constants


def _covariances(maps: list[Tensor], means: list[Tensor | None]) -> list[Tensor]:
    """Of each map ``(N, C, C)``; empty where there is no mean."""
    covariances, levels, finish = [], [], []
    for x, mean in zip(maps, means, strict=True):
        shape = (0,) if mean is None else (*x.shape[:2], x.shape[1])
        covariances.append(x.new_empty(shape, dtype=accumulation_dtype(x)))
        if mean is not None:
            tiles, constants, sums = _covariance_levels(x, mean, covariances[-1])
            levels.append((tiles, constants))
            finish.append(sums)
    _launch(covariance_tiles, levels)
    launch(finish_covariances, finish, TILES=FINISH_TILES, OUTPUTS=FINISH_OUTPUTS)
    return covariances


def _covariance_levels(x: Tensor, mean: Tensor, covariance: Tensor) -> tuple[Level, dict, Level]:
    """Return the level of the kernel that makes partial sums, its constants, and the level of the one that adds up."""
    images, channels, path = *x.shape[:2], _path(x, (), _pixels(x))
    constants = _constants(covariance_tiles, x, x.dtype, path)
    side, block = constants["ROWS"], constants["INNER"]
    tiles = triton.cdiv(channels, side)
    used = images * tiles * (tiles + 1) // 2  # up to the diagonal
    splits, tiles_of_split = splits_of(x, triton.cdiv(_pixels(x), block), used, block, COVARIANCE_PIXELS)
    pitch = tiles * side
    partials = x.new_empty(images * splits * pitch * pitch, dtype=mean.dtype)
    sizes = CovarianceSizes(*_map_sizes(x), tiles, splits, tiles_of_split)
    parts = Level(images * splits * tiles * tiles, (x, mean, partials), sizes, path)
    output_blocks = triton.cdiv(channels, FINISH_OUTPUTS)
    sums = channels, _pixels(x), splits, pitch, output_blocks
    return parts, constants, Level(images * channels * output_blocks, (covariance, partials), sums)


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
        levels = [_gradient_level(*level) for level in zip(*columns, strict=True) if level[0].numel()]
        _launch(add_map_gradients, levels)
    pooled = [
        _weight_levels(gradient, x, won, given, pool)
        for gradient, x, won, given, pool in zip(grad_weights, maps, winners, grad_pooled, by_level, strict=True)
        if given is not None
    ]
    _launch(pool_weight_gradients, [(partial, constants) for partial, constants, _ in pooled])
    add_up([total for _, _, total in pooled])


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
) -> tuple[Level, dict]:
    operand = _gradient_operand(x)
    given = matrix is not None, shift is not None
    factors = in_place_of_none((matrix, weight), x, operand)
    outputs = 0 if grad_pooled is None else grad_pooled.shape[1]
    grid = _all_pixels(x, pool if outputs else None)
    path = _path(x, (gradient, *factors), _pixels(x), grid.width, grid.cell_width)
    constants = _constants(add_map_gradients, x, operand, path, grid.cell_width)
    constants["WIDTH"] = grid.lanes(constants["ROWS"])
    tiles = grid.steps(constants["ROWS"]), triton.cdiv(x.shape[1], constants["COLS"])
    shift, grad_pooled = in_place_of_none((shift, grad_pooled), x, accumulation_dtype(x))
    programs = x.shape[0] * tiles[0] * tiles[1] if any(given) or outputs else 0
    pointers = x, factors[0], shift, factors[1], winners, grad_pooled, gradient
    sizes = GradientSizes(*_map_sizes(x), *grid.sizes, grid.height, outputs, *tiles, *given)
    return Level(programs, pointers, sizes, path), constants


def _weight_levels(
    gradient: Tensor, x: Tensor, winners: Tensor, grad_pooled: Tensor, pool: _Pool
) -> tuple[Level, dict, Level]:
    """Return the level of the kernel that makes partial sums, its constants, and the level of the one that adds up."""
    grid, (outputs, channels) = _whole_cells(x, pool), gradient.shape
    path = _path(x, (), grid.width, grid.cell_width)
    constants = _constants(pool_weight_gradients, x, _gradient_operand(x), path, grid.cell_width)
    constants["WIDTH"] = grid.lanes(constants["INNER"])
    rows, cols = triton.cdiv(outputs, constants["ROWS"]), triton.cdiv(channels, constants["COLS"])
    steps_of_image = grid.steps(constants["INNER"])
    steps = x.shape[0] * steps_of_image
    splits, steps_of_split = splits_of(x, steps, rows * cols, constants["INNER"])
    pitch = cols * constants["COLS"]
    stride = rows * constants["ROWS"] * pitch
    partials = x.new_empty(splits * stride, dtype=grad_pooled.dtype)
    sizes = WeightSizes(*_map_sizes(x), *grid.sizes, outputs, rows, cols, steps_of_image, steps, steps_of_split)
    parts = Level(splits * rows * cols, (x, winners, grad_pooled, partials), sizes, path)
    return parts, constants, sum_of_splits(gradient, partials, 0, splits, stride, pitch)
