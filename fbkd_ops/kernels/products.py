"""Matrix products on the tensor cores: what the kernels that are made of them and their launchers share.

Operands that share a 16-bit dtype keep it. float32 operands are multiplied as TF32 where PyTorch may do so, and else as
three TF32 products that together keep float32's precision; float64 has tensor cores of its own. Sums are float32, or
float64. A sum over the pixels of a level is split among programs, whose partial sums are added in a fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .pyramid import (
    Level,
    add_tiles,
    find_level,
    find_tile,
    launch,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
)

__all__ = [
    "ALIGNED",
    "STUDENT_PLANAR",
    "TEACHER_PLANAR",
    "across",
    "add_product",
    "add_splits",
    "add_up",
    "dense_tile",
    "error_product",
    "fit_for_products",
    "indices",
    "multiply",
    "precision",
    "splits_of",
    "sum_of_splits",
]

# The code path of a level with two maps has three bits: the student's pixels lie side by side (else its channels), the
# teacher's do, and everything is read 16 bytes at a time.
STUDENT_PLANAR, TEACHER_PLANAR, ALIGNED = tl.constexpr(4), tl.constexpr(2), tl.constexpr(1)
# Triton's interpreter would multiply the bit patterns of bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Pixels of a partial sum, and the most programs with one: enough to fill a large GPU.
SPLIT_PIXELS, SPLIT_PROGRAMS = 1024, 512
SPLITS_AT_ONCE, FINISH_OUTPUTS = 8, 256


@triton.jit
def indices(tile, BLOCK: tl.constexpr):
    return tile.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def across(index, FIRST: tl.constexpr):
    return index[:, None] if FIRST else index[None, :]


@triton.jit
def dense_tile(x, image, pixel, channel, pixels, channels, IS_ALIGNED: tl.constexpr, PLANAR: tl.constexpr):
    """Where a tile ``(pixels, channels)`` of a densely packed map lies, and what of it is inside."""
    pitch = pixels if PLANAR else channels
    row, col = pixel[:, None], channel[None, :]
    at = tile_pointers(x, image, channels.to(tl.int64) * pixels, pitch, row, col, IS_ALIGNED, PLANAR)
    return at, (row < pixels) & (col < channels)


@triton.jit
def add_product(
    total,  # (pixels, channels), or the other way round
    x,  # pointer, image stride and pitch of a map of ``inner`` channels
    matrix,  # pointer, image stride and pitch: (channels, inner), or (TRANSPOSED) (inner, channels)
    image,
    pixel,
    channel,
    extents,  # pixels, channels, inner
    PIXELS_FIRST: tl.constexpr,
    PLANAR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    IS_ALIGNED: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """``total`` plus a tile of ``matrix @ x``, whose operands are OPERANDs."""
    pixels, channels, inner = extents
    row, col = across(pixel, PIXELS_FIRST), across(channel, not PIXELS_FIRST)
    for first in range(0, inner, INNER):
        k = first + tl.arange(0, INNER)
        k_of_x, k_of_matrix = across(k, not PIXELS_FIRST), across(k, PIXELS_FIRST)
        at = tile_pointers(x[0], image, x[1], x[2], row, k_of_x, IS_ALIGNED, PLANAR)
        features = tl.load(at, mask=(row < pixels) & (k_of_x < inner), other=0.0).to(OPERAND)
        at = tile_pointers(matrix[0], image, matrix[1], matrix[2], col, k_of_matrix, IS_ALIGNED, TRANSPOSED)
        factors = tl.load(at, mask=(col < channels) & (k_of_matrix < inner), other=0.0).to(OPERAND)
        left, right = (features, factors) if PIXELS_FIRST else (factors, features)
        total = multiply(left, right, total, PRECISION)
    return total


@triton.jit
def error_product(error, factor, total, PRECISION: tl.constexpr):
    """``total + error @ factor`` with all of a float32 error's bits, unless TF32 is allowed.

    A factor of 16 bits is exact in the tensor cores' formats, and only the error has to be split: into three
    bfloat16, 24 bits, beside bfloat16; into two TF32, 22 bits, beside float16, whose range the error could leave.
    """
    SPLIT: tl.constexpr = PRECISION == "tf32x3" and error.dtype == tl.float32
    if SPLIT and factor.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            part = error.to(tl.bfloat16)
            total = multiply(part, factor, total, PRECISION)
            error -= part.to(tl.float32)
    elif SPLIT and factor.dtype == tl.float16:
        part = (error.to(tl.int32, bitcast=True) & -8192).to(tl.float32, bitcast=True)
        total = multiply(part, factor.to(tl.float32), total, "tf32")
        total = multiply(error - part, factor.to(tl.float32), total, "tf32")
    else:
        total = multiply(error, factor.to(error.dtype), total, PRECISION)
    return total


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``."""
    if INTERPRETED:
        left, right = left.to(total.dtype), right.to(total.dtype)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def add_splits(
    gradient,  # a level and parameter: (images, rows, length)
    partials,  # a level and parameter: (images, splits, rows, length), with strides, from the offset ``first`` on
    sizes,
    PATHS: tl.constexpr,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    level, _, program = find_level(sizes)
    first, splits, stride, rows, pitch, length, blocks = pick_sizes(sizes, level)
    image, row, block = find_tile(program, rows, blocks)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    at = pick(partials, level) + first + image * splits * stride + row * pitch + output
    total = add_tiles(at, splits, stride, output < length, TILES, OUTPUTS)
    store_rounded(pick(gradient, level) + (image * rows + row) * length + output, total, output < length)


def splits_of(tiles: int, programs: int, block: int) -> tuple[int, int]:
    """Number of splits of a level's pixels, and the tiles of each; from the level's shape alone.

    Args:
        tiles: of pixels, in all images over which is summed.
        programs: with one split.
        block: pixels of a tile.
    """
    most = max(SPLIT_PROGRAMS // max(programs, 1), 1)
    tiles_of_split = max(triton.cdiv(SPLIT_PIXELS, block), triton.cdiv(tiles, most))
    return triton.cdiv(tiles, tiles_of_split), tiles_of_split


def sum_of_splits(gradient: Tensor, partials: Tensor, first: int, splits: int, stride: int, pitch: int) -> Level:
    """A level of :func:`add_up` for a gradient ``([images,] rows, length)``; the arguments are those of its kernel."""
    *images, rows, length = gradient.shape
    blocks = triton.cdiv(length, FINISH_OUTPUTS)
    sizes = first, splits, stride, rows, pitch, length, blocks
    return Level(math.prod(images) * rows * blocks, (gradient, partials), sizes)


def add_up(levels: list[Level]) -> None:
    """Runs the levels made by :func:`sum_of_splits`."""
    launch(add_splits, levels, TILES=SPLITS_AT_ONCE, OUTPUTS=FINISH_OUTPUTS)


def fit_for_products(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` for kernels that multiply in ``dtype``: as float64 in place of 16 bits, which Triton 3.8 cannot compile."""
    return x.to(dtype) if dtype == torch.float64 and x.element_size() == 2 else x


def precision() -> str:
    """Triton's name of the precision in which PyTorch lets float32 matrices be multiplied."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"
