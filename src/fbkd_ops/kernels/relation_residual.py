"""Triton kernels of the relation term's squared residual, and its gradients.

``e = t + U W t - P s + v`` exists a tile at a time in registers: the forward kernel's epilogue turns a tile of products
into one partial sum and, where e is kept, into a tile of e. ``U W``, ``(Ct, Ct)`` an image, is multiplied out first:
one product with t takes the place of a launch that writes ``W t`` for this one to read, and levels with and without a
projection are the same. It costs a third more multiplications where ``W t`` has a quarter of the channels of t. In the
backward pass the gradient of ``U W`` is ``E t^T``, and those of U and W are products of small matrices.

The operands of features that share a 16-bit dtype are of that dtype, matrices and e rounded to it; those of others
are float32 or float64, see products.py. ``E = 2 grad e`` is never stored: grad scales float32 sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_gradient, empty_residual, matrix_view
from .._numerics import accumulation_dtype, without_autocast
from .products import (
    STUDENT_PLANAR,
    TEACHER_PLANAR,
    Images,
    Pair,
    PixelSplits,
    add_product,
    add_up,
    dense_tile,
    in_dtypes,
    indices,
    known_extents,
    launch_products,
    map_tile,
    pairs_of,
    residual_by_map,
    residual_by_matrix,
    split_pixels,
    store_partials,
)
from .pyramid import (
    ALIGNMENT,
    Level,
    add_partial_sums,
    find_level,
    find_tile,
    pick,
    pick_all,
    pick_sizes,
    store_rounded,
)

__all__ = ["relation_residual_backward", "relation_residual_forward"]


class SumSizes(NamedTuple):
    """A level's sizes in residual_sums."""

    student_channels: int
    teacher_channels: int
    pixels: int
    student_stride: int  # from image to image
    student_pitch: int
    teacher_stride: int
    teacher_pitch: int
    first: int  # of the level's partial sums
    pixel_tiles: int
    channel_tiles: int


class StudentSizes(NamedTuple):
    """A level's sizes in student_residual_gradients."""

    student_channels: int
    teacher_channels: int
    pixels: int
    slot: int  # of the level's grad
    pixel_tiles: int
    channel_tiles: int


class ProductSizes(NamedTuple):
    """A product's sizes in residual_products, whose ``student_channels`` are those of the map x."""

    student_channels: int
    teacher_channels: int
    pixels: int
    stride: int  # of x, from image to image
    pitch: int
    slot: int
    factor: int
    parts: int
    splits: int
    row_tiles: int
    col_tiles: int
    tiles_of_image: int
    tiles_of_split: int


@triton.jit
def residual_sums(
    student,  # a level: (N, Cs, H, W)
    student_matrix,  # a level: P (N, Ct, Cs)
    teacher,  # a level: (N, Ct, H, W)
    teacher_matrix,  # a level: U W (N, Ct, Ct)
    offset,  # a level: (N, Ct)
    residual,  # a level: (N, Ct, H, W), densely packed in the teacher's layout
    partials,  # one a program
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    KEEP: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums of ``e^2``, and e."""
    level, path, program = find_level(sizes)
    size = SumSizes(*pick_sizes(sizes, level))
    inputs = pick_all((student, student_matrix, teacher, teacher_matrix, offset), level)
    image, pixel_tile, channel_tile = find_tile(program, size.pixel_tiles, size.channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = known_extents(size, PATHS[index], inputs[0], inputs[1], inputs[2])
            value = residual_tile(inputs, size, extents, image, pixel, channel, PATHS[index], PRECISION, INNER)
            tl.store(partials + size.first + program, tl.sum(value * value).to(partials.dtype.element_ty))
            if KEEP:
                _, teacher_channels, pixels = extents
                PLANAR: tl.constexpr = TEACHER_PLANAR & PATHS[index]
                ALIGN: tl.constexpr = ALIGNMENT & PATHS[index]
                kept = pick(residual, level)
                at, inside = dense_tile(kept, image, pixel, channel, pixels, teacher_channels, ALIGN, PLANAR)
                store_rounded(at, value, inside)


@triton.jit
def student_residual_gradients(
    residual,  # a level: (N, Ct, H, W), densely packed in the teacher's layout
    student_matrix,  # a level: P (N, Ct, Cs)
    gradient,  # a level: (N, Cs, H, W), densely packed in the student's layout
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``-P^T E``."""
    level, path, program = find_level(sizes)
    size = StudentSizes(*pick_sizes(sizes, level))
    residual, student_matrix, gradient = pick_all((residual, student_matrix, gradient), level)
    image, pixel_tile, channel_tile = find_tile(program, size.pixel_tiles, size.channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            PLANAR: tl.constexpr = STUDENT_PLANAR & PATHS[index]
            ALIGN: tl.constexpr = ALIGNMENT & PATHS[index]
            extents = known_extents(size, PATHS[index], residual, student_matrix, gradient)
            channels, teacher_channels, pixels = extents
            matrix = Images(student_matrix, teacher_channels.to(tl.int64) * channels, channels)
            product = residual_by_matrix(
                residual, matrix, image, pixel, channel, extents, PATHS[index], PRECISION, INNER
            )
            at, inside = dense_tile(gradient, image, pixel, channel, pixels, channels, ALIGN, PLANAR)
            store_rounded(at, -2 * tl.load(grad + size.slot).to(product.dtype) * product, inside)


@triton.jit
def residual_products(
    residual,  # a product: (N, Ct, H, W), densely packed in the teacher's layout
    x,  # a product: (N, C, H, W)
    partials,  # a product, in whole tiles: (N * splits, Ct, C), then (N * splits, Ct) for the sums of E
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums over pixels of ``factor / 2 * E x^T`` and of ``factor / 2 * E``."""
    level, path, program = find_level(sizes)
    size = ProductSizes(*pick_sizes(sizes, level))
    residual, x, partials = pick_all((residual, x, partials), level)
    dtype: tl.constexpr = partials.dtype.element_ty
    part, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    row, col = indices(row_tile, ROWS), indices(col_tile, COLS)
    first = part % size.splits * size.tiles_of_split
    tiles = tl.minimum(size.tiles_of_split, size.tiles_of_image - first)
    scale = size.factor.to(dtype) * tl.load(grad + size.slot).to(dtype)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            product, total = residual_by_map(
                residual,
                Images(x, size.stride, size.pitch),
                None,
                part // size.splits,
                first,
                tiles,
                row,
                col,
                known_extents(size, PATHS[index], residual, x, x),
                dtype,
                INNER,
                PATHS[index],
                PRECISION,
            )
            rows, cols = size.row_tiles * ROWS, size.col_tiles * COLS
            product, total, is_first = scale * product, scale * total, col_tile == 0
            store_partials(partials, part, size.parts, row, col, rows, cols, product, total, is_first)


@triton.jit
def residual_tile(
    inputs, size, extents, image, pixel, channel, PATH: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr
):
    """Return a tile ``(pixels, teacher channels)`` of e; zeros outside."""
    student_channels, teacher_channels, pixels = extents
    student, student_matrix, teacher, teacher_matrix, offset = inputs
    operand: tl.constexpr = student_matrix.dtype.element_ty
    value = tl.zeros((pixel.shape[0], channel.shape[0]), offset.dtype.element_ty)
    value = add_product(
        value,
        Images(student, size.student_stride, size.student_pitch),
        Images(student_matrix, teacher_channels.to(tl.int64) * student_channels, student_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, student_channels),
        PLANAR=STUDENT_PLANAR & PATH,
        TRANSPOSED=False,
        ALIGN=ALIGNMENT & PATH,
        OPERAND=operand,
        PRECISION=PRECISION,
        INNER=INNER,
    )
    teachers = Images(teacher, size.teacher_stride, size.teacher_pitch)
    value = add_product(
        -value,
        teachers,
        Images(teacher_matrix, teacher_channels.to(tl.int64) * teacher_channels, teacher_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, teacher_channels),
        PLANAR=TEACHER_PLANAR & PATH,
        TRANSPOSED=False,
        ALIGN=ALIGNMENT & PATH,
        OPERAND=operand,
        PRECISION=PRECISION,
        INNER=INNER,
    )
    ALIGN: tl.constexpr = ALIGNMENT & PATH
    at, inside = map_tile(teachers, image, pixel, channel, pixels, teacher_channels, ALIGN, TEACHER_PLANAR & PATH)
    value += tl.load(at, mask=inside, other=0.0).to(value.dtype)
    col = channel[None, :]
    value += tl.load(offset + image * teacher_channels + col, mask=col < teacher_channels, other=0.0)
    return tl.where(inside, value, 0.0)


def relation_residual_forward(
    students: list[Tensor],  # (N, Cs, H, W)
    student_matrices: list[Tensor],  # P (N, Ct, Cs)
    teachers: list[Tensor],  # (N, Ct, H, W)
    teacher_matrices: list[Tensor],  # U (N, Ct, c), or (N, Ct, Ct) without a projection
    teacher_projections: list[Tensor | None],  # W (c, Ct)
    offsets: list[Tensor],  # v (N, Ct)
    keep: bool,
) -> list[Tensor]:
    """``sum(e**2)`` of each level, ``(levels,)``; then, to keep, e of each level in the teacher's layout."""
    pairs = pairs_of(students, teachers)
    products = [
        _product(matrix, projection) for matrix, projection in zip(teacher_matrices, teacher_projections, strict=True)
    ]
    operands = [pair.operand for pair in pairs]
    matrices = in_dtypes([*student_matrices, *products], operands * 2)
    student_matrices, products = matrices[: len(pairs)], matrices[len(pairs) :]
    residuals = [empty_residual(*features) for features in zip(students, teachers, strict=True)] if keep else []
    levels, first = [], 0
    unused = [pair.teacher for pair in pairs]
    columns = zip(pairs, student_matrices, products, offsets, residuals or unused, strict=True)
    for pair, student_matrix, product, offset, residual in columns:
        levels.append(_sums_level(pair, student_matrix, product, offset, residual, first))
        first += levels[-1].programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students, *teachers))
    launch_products(residual_sums, pairs, levels, partials, KEEP=keep)
    return [add_partial_sums(partials, [level.programs for level in levels]), *residuals]


def _product(teacher_matrix: Tensor, projection: Tensor | None) -> Tensor:
    """``U W (N, Ct, Ct)``."""
    with without_autocast(teacher_matrix):
        return teacher_matrix if projection is None else torch.matmul(teacher_matrix, projection)


def _sums_level(
    pair: Pair,
    student_matrix: Tensor,
    teacher_matrix: Tensor,
    offset: Tensor,
    residual: Tensor,  # if it is not kept, any tensor
    first: int,
) -> Level:
    path = pair.path(student_matrix, teacher_matrix, residual)
    blocks = pair.blocks(residual_sums, path)
    _, channels, pixels = pair.extents
    tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
    student, teacher = matrix_view(pair.student), matrix_view(pair.teacher)
    strides = student.image_stride, student.row_stride, teacher.image_stride, teacher.row_stride
    pointers = pair.student, student_matrix, pair.teacher, teacher_matrix, offset, residual
    sizes = SumSizes(*pair.extents, *strides, first, *tiles)
    return Level(pair.images * tiles[0] * tiles[1], pointers, sizes, path)


def relation_residual_backward(
    students: list[Tensor],
    student_matrices: list[Tensor],
    teachers: list[Tensor],
    teacher_matrices: list[Tensor],
    teacher_projections: list[Tensor | None],
    offsets: list[Tensor],
    residuals: list[Tensor],  # e as the forward pass kept it; empty: it is computed again
    grad: Tensor,  # (levels,)
    student_gradient: bool,
) -> list[Tensor]:
    """All gradients of the students, if wanted, then of P, of U, of W (empty where it is None) and of v."""
    if not residuals:
        matrices = student_matrices, teachers, teacher_matrices, teacher_projections, offsets
        _, *residuals = relation_residual_forward(students, *matrices, True)
    pairs = pairs_of(students, teachers)
    gradients = [empty_gradient(student) for student in students] if student_gradient else []
    _write_student_gradients(pairs, student_matrices, residuals, gradients, grad)
    by_student, by_teacher, by_offset = _parameter_gradients(pairs, student_matrices, offsets, residuals, grad)
    factors = zip(by_teacher, teacher_matrices, teacher_projections, strict=True)
    by_matrix, by_projection = zip(*(_factor_gradients(*level) for level in factors), strict=True)
    return [*gradients, *by_student, *by_matrix, *by_projection, *by_offset]


def _write_student_gradients(
    pairs: list[Pair],
    student_matrices: list[Tensor],
    residuals: list[Tensor],
    gradients: list[Tensor],  # empty: not wanted
    grad: Tensor,
) -> None:
    if not gradients:
        return
    levels, matrices = [], in_dtypes(student_matrices, [pair.operand for pair in pairs])
    for slot, (pair, matrix, residual, gradient) in enumerate(zip(pairs, matrices, residuals, gradients, strict=True)):
        path = pair.path(matrix, residual, gradient)
        blocks = pair.blocks(student_residual_gradients, path)
        channels, _, pixels = pair.extents
        tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
        sizes = StudentSizes(*pair.extents, slot, *tiles)
        levels.append(Level(pair.images * tiles[0] * tiles[1], (residual, matrix, gradient), sizes, path))
    launch_products(student_residual_gradients, pairs, levels, grad)


def _parameter_gradients(
    pairs: list[Pair], student_matrices: list[Tensor], offsets: list[Tensor], residuals: list[Tensor], grad: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each level: ``-sum E s^T (N, Ct, Cs)``, ``sum E t^T (N, Ct, Ct)`` and ``sum E (N, Ct)``."""
    by_student, by_offset = [torch.empty_like(x) for x in student_matrices], [torch.empty_like(x) for x in offsets]
    by_teacher = [x.new_empty((*x.shape, x.shape[1])) for x in offsets]
    launched, sums = [], []
    for side, factor, gradients in ((0, -2, by_student), (1, 2, by_teacher)):
        for slot, (pair, residual, gradient) in enumerate(zip(pairs, residuals, gradients, strict=True)):
            path = _products_path(pair, residual, pair[side])
            splits = split_pixels(pair, pair[side].shape[1], pair.blocks(residual_products, path))
            partials = splits.partials(residual, pair.dtype)
            launched.append(_products_level(pair, residual, pair[side], partials, splits, slot, factor, path))
            sums.append(splits.product(gradient, partials))
            if side == 1:
                sums.append(splits.total(by_offset[slot], partials))
    launch_products(residual_products, pairs * 2, launched, grad)
    add_up(sums)
    return by_student, by_teacher, by_offset


def _products_level(
    pair: Pair, residual: Tensor, x: Tensor, partials: Tensor, splits: PixelSplits, slot: int, factor: int, path: int
) -> Level:
    view, (_, channels, pixels) = matrix_view(x), pair.extents
    strides = view.image_stride, view.row_stride
    sizes = ProductSizes(x.shape[1], channels, pixels, *strides, slot, factor, *splits.sizes)
    return Level(splits.programs, (residual, x, partials), sizes, path)


def _products_path(pair: Pair, residual: Tensor, x: Tensor) -> int:
    shared = pair.path(residual) & (TEACHER_PLANAR.value | ALIGNMENT.value)
    return STUDENT_PLANAR.value * matrix_view(x).rows_are_channels + shared


def _factor_gradients(
    product: Tensor,  # (N, Ct, Ct)
    teacher_matrix: Tensor,
    projection: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of U and W, given that of ``U W``."""
    if projection is None:
        return product, product.new_empty(0)
    stacked = teacher_matrix.flatten(0, 1)  # (N Ct, c)
    with without_autocast(product):
        return torch.matmul(product, projection.mT), torch.matmul(stacked.mT, product.flatten(0, 1))
