"""Matrix products on the tensor cores: what the kernels that are made of them and their launchers share.

Operands that share a 16-bit dtype keep it. float32 operands are multiplied as TF32 where PyTorch may do so, and else as
three TF32 products that together keep float32's precision; float64 has tensor cores of its own. Sums are float32, or
float64. A sum over the pixels of a level is split among programs, whose partial sums are added in a fixed order.

Both ops that square a residual of two maps keep it in their forward pass and multiply it twice in their backward pass:
by a matrix for the student's gradient (:func:`residual_by_matrix`), by a map for that of a matrix
(:func:`residual_by_map`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import matrix_layout, matrix_view
from .._numerics import accumulation_dtype, residual_dtype
from .pyramid import (
    ALIGNMENT,
    SIXTEEN_BYTES,
    Level,
    add_tiles,
    alignment,
    find_level,
    find_tile,
    launch,
    launch_by_constants,
    load_mask,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
    vector_length,
    whole_vectors,
)
from .tiles import Blocks, blocks_of, most_programs, precision

__all__ = [
    "STUDENT_PLANAR",
    "TEACHER_PLANAR",
    "Extents",
    "Images",
    "Pair",
    "PixelWeights",
    "across",
    "add_product",
    "add_splits",
    "add_up",
    "dense_tile",
    "fit_for_products",
    "in_dtypes",
    "indices",
    "known_extents",
    "launch_products",
    "map_tile",
    "multiply",
    "pairs_of",
    "residual_by_map",
    "residual_by_matrix",
    "split_pixels",
    "splits_of",
    "store_partials",
    "sum_of_splits",
]

Found = TypeVar("Found", Tensor, Tensor | None)

# The code path of a level with two maps: the ALIGNMENT of everything, and two bits: the student's pixels lie side by
# side (else its channels), and the teacher's do.
STUDENT_PLANAR, TEACHER_PLANAR = tl.constexpr(8), tl.constexpr(4)
# Triton's interpreter would multiply the bit patterns of bfloat16.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
SPLIT_PIXELS = 1024  # the fewest of a partial sum
SPLITS_AT_ONCE, FINISH_OUTPUTS = 8, 256


class Extents(NamedTuple):
    """Extents of a level in a kernel; of a product with another map, ``student_channels`` are that map's."""

    student_channels: tl.tensor
    teacher_channels: tl.tensor
    pixels: tl.tensor


class Images(NamedTuple):
    """One matrix or map per image in a kernel, with strides in elements."""

    data: tl.tensor
    stride: tl.tensor  # from image to image
    pitch: tl.tensor  # from row to row of a matrix; of a map from channel to channel, or from pixel to pixel


class PixelWeights(NamedTuple):
    """Factors of an image's pixels in a kernel; ones where the mask is absent."""

    mask: tl.tensor  # (N, H, W)
    given: tl.tensor
    scale: tl.tensor  # times the mask


@triton.jit
def indices(tile, BLOCK: tl.constexpr):
    """Return the indices ``(BLOCK,)`` of a tile's elements."""
    return tile.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def across(index, FIRST: tl.constexpr):
    """Return ``index`` along the first of two dimensions, or along the second."""
    return index[:, None] if FIRST else index[None, :]


@triton.jit
def known_extents(size, PATH: tl.constexpr, a, b, c):
    """Extents of ``size``, whose divisors the compiler knows where several elements of a, b and c are read at a time.

    Extents, unlike offsets, fit 32 bits, which halves the registers of a tile's indices.
    """
    VECTOR: tl.constexpr = vector_length(ALIGNMENT & PATH, a.dtype.element_ty, b.dtype.element_ty, c.dtype.element_ty)
    BY_PIXEL: tl.constexpr = (STUDENT_PLANAR | TEACHER_PLANAR) & PATH
    student_channels = whole_vectors(size.student_channels.to(tl.int32), VECTOR)
    teacher_channels = whole_vectors(size.teacher_channels.to(tl.int32), VECTOR)
    return Extents(
        student_channels, teacher_channels, whole_vectors(size.pixels.to(tl.int32), VECTOR if BY_PIXEL else 1)
    )


@triton.jit
def map_tile(x, image, pixel, channel, pixels, channels, ALIGN: tl.constexpr, PLANAR: tl.constexpr):
    """Where a tile ``(pixels, channels)`` of a map lies, and what of it is inside."""
    row, col = pixel[:, None], channel[None, :]
    at = tile_pointers(x.data, image, x.stride, x.pitch, row, col, ALIGN, PLANAR)
    return at, (row < pixels) & (col < channels)


@triton.jit
def dense_tile(x, image, pixel, channel, pixels, channels, ALIGN: tl.constexpr, PLANAR: tl.constexpr):
    """Return the pointers of a tile of a densely packed map, and what of it is inside; see :func:`map_tile`."""
    x = Images(x, channels.to(tl.int64) * pixels, pixels if PLANAR else channels)
    return map_tile(x, image, pixel, channel, pixels, channels, ALIGN, PLANAR)


@triton.jit
def add_product(
    total,  # (pixels, channels)
    x,  # Images: maps of ``inner`` channels
    matrix,  # Images: matrices (channels, inner), or (TRANSPOSED) (inner, channels)
    image,
    pixel,
    channel,
    extents,  # pixels, channels, inner
    PLANAR: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    ALIGN: tl.constexpr,
    OPERAND: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """``total`` plus a tile of ``matrix @ x``, whose operands are OPERANDs."""
    pixels, channels, inner = extents
    col = channel[None, :]
    for first in range(0, inner, INNER):
        k = first + tl.arange(0, INNER)
        at, inside = map_tile(x, image, pixel, k, pixels, inner, ALIGN, PLANAR)
        features = tl.load(at, mask=inside, other=0.0).to(OPERAND)
        row = k[:, None]
        at = tile_pointers(matrix.data, image, matrix.stride, matrix.pitch, row, col, ALIGN, not TRANSPOSED)
        factors = tl.load(at, mask=(row < inner) & (col < channels), other=0.0).to(OPERAND)
        total = multiply(features, factors, total, PRECISION)
    return total


@triton.jit
def multiply(left, right, total, PRECISION: tl.constexpr):
    """``total + left @ right``."""
    if INTERPRETED:
        left, right = left.to(total.dtype), right.to(total.dtype)
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def residual_by_matrix(
    residual,  # (N, Ct, H, W), densely packed in the teacher's layout
    matrix,  # Images: (Ct, Cs)
    image,
    pixel,
    channel,
    extents,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """Return a tile ``(pixels, student channels)`` of ``matrix^T @ residual``."""
    student_channels, teacher_channels, pixels = extents
    operand: tl.constexpr = residual.dtype.element_ty
    total: tl.constexpr = tl.float64 if operand == tl.float64 else tl.float32
    pitch = pixels if TEACHER_PLANAR & PATH else teacher_channels
    return add_product(
        tl.zeros((pixel.shape[0], channel.shape[0]), total),
        Images(residual, teacher_channels.to(tl.int64) * pixels, pitch),
        matrix,
        image,
        pixel,
        channel,
        (pixels, student_channels, teacher_channels),
        PLANAR=TEACHER_PLANAR & PATH,
        TRANSPOSED=True,
        ALIGN=ALIGNMENT & PATH,
        OPERAND=operand,
        PRECISION=PRECISION,
        INNER=INNER,
    )


@triton.jit
def residual_by_map(
    residual,  # (N, Ct, H, W), densely packed in the teacher's layout
    x,  # Images: maps of ``extents.student_channels`` channels
    weights,  # PixelWeights, or None for ones
    image,
    first,  # tile of INNER pixels
    tiles,
    row,  # teacher channels
    col,  # channels of x
    extents,
    DTYPE: tl.constexpr,
    INNER: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """``e x^T (teacher channels, channels of x)`` and the sum of e over a range of an image's pixels, e weighted.

    Weights and sums are DTYPEs; the product's operand e is rounded to the residual's dtype once it is weighted.
    """
    channels, teacher_channels, pixels = extents
    total = tl.zeros((row.shape[0], col.shape[0]), DTYPE)
    errors = tl.zeros((row.shape[0],), DTYPE)
    for step in range(0, tiles):
        pixel = indices(first + step, INNER)
        PLANAR: tl.constexpr = TEACHER_PLANAR & PATH
        at, inside = dense_tile(residual, image, pixel, row, pixels, teacher_channels, ALIGNMENT & PATH, PLANAR)
        error = tl.load(at, mask=inside, other=0.0).T
        wide = error.to(DTYPE)
        if weights is not None:
            factor = load_mask(weights.mask, image * pixels + pixel, pixel < pixels, weights.given)
            wide *= (weights.scale * factor)[None, :]
            error = wide.to(error.dtype)
        errors += tl.sum(wide, axis=1)
        at, inside = map_tile(x, image, pixel, col, pixels, channels, ALIGNMENT & PATH, STUDENT_PLANAR & PATH)
        total = multiply(error, tl.load(at, mask=inside, other=0.0).to(error.dtype), total, PRECISION)
    return total, errors


@triton.jit
def store_partials(
    partials,  # in whole tiles: (parts, rows, cols) for products, then (parts, rows) for sums
    part,
    parts,
    row,
    col,
    rows,
    cols,
    product,
    total,
    with_total,
):
    """Store a part's tile of a product, and (``with_total``: once for each tile of rows) the sums of its rows."""
    at = tile_pointers(partials, part, rows * cols, cols, row[:, None], col[None, :], SIXTEEN_BYTES, False)
    tl.store(at, product)
    tl.store(partials + parts * rows * cols + part * rows + row, total, mask=(row >= 0) & with_total)


@triton.jit
def add_splits(
    gradient,  # a level and parameter: (images, rows, length)
    partials,  # a level and parameter: (images, splits, rows, length), with strides, from the offset ``first`` on
    sizes,
    PATHS: tl.constexpr,
    TILES: tl.constexpr,
    OUTPUTS: tl.constexpr,
):
    """Add up the partial sums that the splits of a gradient's pixels left."""
    level, _, program = find_level(sizes)
    first, splits, stride, rows, pitch, length, blocks = pick_sizes(sizes, level)
    image, row, block = find_tile(program, rows, blocks)
    output = block * OUTPUTS + tl.arange(0, OUTPUTS)
    at = pick(partials, level) + first + image * splits * stride + row * pitch + output
    total = add_tiles(at, splits, stride, output < length, TILES, OUTPUTS)
    store_rounded(pick(gradient, level) + (image * rows + row) * length + output, total, output < length)


def splits_of(like: Tensor, tiles: int, programs: int, block: int, most_pixels: int | None = None) -> tuple[int, int]:
    """Return the number of splits of a level's pixels, and the tiles of each; from the level's shape and the GPU alone.

    Args:
        like: a tensor on the GPU.
        tiles: of pixels, in all images over which is summed.
        programs: with one split.
        block: pixels of a tile.
        most_pixels: of a split; None for any number.
    """
    most = max(most_programs(like) // max(programs, 1), 1)
    tiles_of_split = max(triton.cdiv(SPLIT_PIXELS, block), triton.cdiv(tiles, most))
    if most_pixels is not None:
        tiles_of_split = min(tiles_of_split, triton.cdiv(most_pixels, block))
    return triton.cdiv(tiles, tiles_of_split), tiles_of_split


def sum_of_splits(gradient: Tensor, partials: Tensor, first: int, splits: int, stride: int, pitch: int) -> Level:
    """Return a level of :func:`add_up` for a gradient ``([images,] rows, length)``, from its kernel's arguments."""
    *images, rows, length = gradient.shape
    blocks = triton.cdiv(length, FINISH_OUTPUTS)
    sizes = first, splits, stride, rows, pitch, length, blocks
    return Level(math.prod(images) * rows * blocks, (gradient, partials), sizes)


def add_up(levels: list[Level]) -> None:
    """Run the levels made by :func:`sum_of_splits`."""
    launch(add_splits, levels, TILES=SPLITS_AT_ONCE, OUTPUTS=FINISH_OUTPUTS)


def fit_for_products(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` for kernels that multiply in ``dtype``: as float64 in place of 16 bits, which Triton 3.8 cannot compile.

    ``x`` is read in place, and so is the copy: where images overlap, the strides that ``to`` chooses could not be.
    """
    if dtype != torch.float64 or x.element_size() != 2:
        return x
    return x.to(dtype, memory_format=matrix_layout(x))


def in_dtypes(tensors: Sequence[Found], dtypes: Sequence[torch.dtype | None]) -> list[Found]:
    """Each tensor in its dtype, contiguous if it had another, with one copy for all of these."""
    results: list[Found] = []
    copies, sources = [], []
    for tensor, dtype in zip(tensors, dtypes, strict=True):
        if tensor is not None and tensor.dtype != dtype:
            copies.append(tensor.new_empty(tensor.shape, dtype=dtype))
            sources.append(tensor)
            tensor = copies[-1]
        results.append(tensor)
    if copies:
        torch._foreach_copy_(copies, sources)
    return results


class Pair(NamedTuple):
    """Both features of a level."""

    student: Tensor  # (N, Cs, H, W)
    teacher: Tensor  # (N, Ct, H, W)

    @property
    def dtype(self) -> torch.dtype:
        return accumulation_dtype(self.student, self.teacher)

    @property
    def operand(self) -> torch.dtype:
        return residual_dtype(self.student, self.teacher)

    @property
    def images(self) -> int:
        return self.student.shape[0]

    @property
    def extents(self) -> tuple[int, int, int]:
        """Student channels, teacher channels, pixels."""
        return self.student.shape[1], self.teacher.shape[1], self.student.shape[2] * self.student.shape[3]

    def path(self, *others: Tensor) -> int:
        """Return the code path of a level whose kernel also reads or writes the other tensors."""
        views = [matrix_view(feature) for feature in self]
        planar = [view.rows_are_channels for view in views]
        student_channels, teacher_channels, pixels = self.extents
        extents = [student_channels, teacher_channels, *([pixels] if any(planar) else [])]
        aligned = [alignment(x, *extents) for x in (*self, *others)]
        aligned += [alignment(x, view.image_stride, view.row_stride) for x, view in zip(self, views, strict=True)]
        return STUDENT_PLANAR.value * planar[0] + TEACHER_PLANAR.value * planar[1] + min(aligned)

    def blocks(self, kernel, path: int) -> Blocks:
        """Return the extents of the kernel's tiles."""
        return blocks_of(kernel, self.student, self.operand, path & ALIGNMENT.value == SIXTEEN_BYTES.value)


def pairs_of(students: list[Tensor], teachers: list[Tensor]) -> list[Pair]:
    """Return each level's features in a form that products can read."""
    dtypes = [accumulation_dtype(*pair) for pair in zip(students, teachers, strict=True)]
    features = zip(students, teachers, dtypes, strict=True)
    return [Pair(fit_for_products(s, dtype), fit_for_products(t, dtype)) for s, t, dtype in features]


def launch_products(kernel, pairs: list[Pair], levels: list[Level], *shared: Tensor, **constants) -> None:
    """Launch the kernel for all levels, each with its pair's :meth:`Pair.blocks`."""
    own = [pair.blocks(kernel, level.path)._asdict() for level, pair in zip(levels, pairs, strict=True)]
    launch_by_constants(kernel, levels, own, *shared, PRECISION=precision(), **constants)


class PixelSplits(NamedTuple):
    """How a sum over pixels of products ``(rows, cols)`` is shared by programs: every image is split by itself.

    A program makes a tile of one split's sum, which :func:`store_partials` stores.
    """

    images: int
    splits: int  # of an image
    row_tiles: int
    col_tiles: int
    tiles_of_image: int  # of pixels
    tiles_of_split: int
    blocks: Blocks

    @property
    def parts(self) -> int:
        return self.images * self.splits

    @property
    def programs(self) -> int:
        return self.parts * self.row_tiles * self.col_tiles

    @property
    def sizes(self) -> tuple[int, ...]:
        """For a kernel: parts, splits, tiles of rows and of columns, tiles of pixels of an image and of a split."""
        return self.parts, *self[1:6]

    @property
    def rows(self) -> int:
        """Rows of a partial sum, in whole tiles."""
        return self.row_tiles * self.blocks.ROWS

    @property
    def cols(self) -> int:
        return self.col_tiles * self.blocks.COLS

    def partials(self, like: Tensor, dtype: torch.dtype) -> Tensor:
        return like.new_empty(self.parts * self.rows * (self.cols + 1), dtype=dtype)

    def product(self, gradient: Tensor, partials: Tensor) -> Level:
        """For :func:`add_up`: the sum of the products, ``(images, rows, cols)`` or of all images ``(rows, cols)``."""
        splits = self.splits if gradient.dim() == 3 else self.parts
        return sum_of_splits(gradient, partials, 0, splits, self.rows * self.cols, self.cols)

    def total(self, gradient: Tensor, partials: Tensor) -> Level:
        """For :func:`add_up`: the sum of the residuals, ``(images, rows)`` or of all images ``(rows,)``."""
        splits = self.splits if gradient.dim() == 2 else self.parts
        first = self.parts * self.rows * self.cols
        return sum_of_splits(gradient.unsqueeze(-2), partials, first, splits, self.rows, self.rows)


def split_pixels(pair: Pair, channels: int, blocks: Blocks) -> PixelSplits:
    """For products of a residual and a map of ``channels`` channels."""
    _, teacher_channels, pixels = pair.extents
    row_tiles, col_tiles = triton.cdiv(teacher_channels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
    tiles = triton.cdiv(pixels, blocks.INNER)
    splits, tiles_of_split = splits_of(pair.student, tiles, pair.images * row_tiles * col_tiles, blocks.INNER)
    return PixelSplits(pair.images, splits, row_tiles, col_tiles, tiles, tiles_of_split, blocks)
