"""Triton kernels of the relation term's squared residual, and its gradients.

``e = t + U W t - P s + v`` exists a tile at a time in registers: the forward kernel's epilogue turns a tile of products
into one partial sum and, where e is kept, into a tile of e. ``U W``, ``(Ct, Ct)`` an image, is multiplied out first:
one product with t takes the place of a launch that writes ``W t`` for this one to read, and levels with and without a
projection are the same. It costs a third more multiplications where ``W t`` has a quarter of the channels of t. In the
backward pass the gradient of ``U W`` is ``E t^T``, and those of U and W are products of small matrices.

The operands of features that share a 16-bit dtype are of that dtype, matrices and e rounded to it; those of others
are float32 or float64, see products.py. ``E = 2 grad e`` is never stored: grad scales float32 sums.
"""

from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_gradient, matrix_layout, matrix_view
from .._numerics import accumulation_dtype, residual_dtype, without_autocast
from .products import (
    ALIGNED,
    STUDENT_PLANAR,
    TEACHER_PLANAR,
    Images,
    add_product,
    add_up,
    dense_tile,
    fit_for_products,
    indices,
    known_extents,
    map_tile,
    precision,
    residual_by_map,
    residual_by_matrix,
    splits_of,
    store_partials,
    sum_of_splits,
)
from .pyramid import (
    Level,
    add_partial_sums,
    aligned_to_16_bytes,
    find_level,
    find_tile,
    launch,
    pick,
    pick_all,
    pick_sizes,
    store_rounded,
)

__all__ = ["relation_residual_backward", "relation_residual_forward"]

# A level's sizes: student channels (in residual_products: the map's), teacher channels, pixels; from index 3 on the
# kernel's own.


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
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    inputs = pick_all((student, student_matrix, teacher, teacher_matrix, offset), level)
    first, pixel_tiles, channel_tiles = size[7:10]
    image, pixel_tile, channel_tile = find_tile(program, pixel_tiles, channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = known_extents(size, PATHS[index], inputs[0], inputs[1], inputs[2])
            value = residual_tile(inputs, size, extents, image, pixel, channel, PATHS[index], PRECISION, INNER)
            tl.store(partials + first + program, tl.sum(value * value).to(partials.dtype.element_ty))
            if KEEP:
                _, teacher_channels, pixels = extents
                PLANAR: tl.constexpr = TEACHER_PLANAR & PATHS[index]
                IS_ALIGNED: tl.constexpr = ALIGNED & PATHS[index]
                kept = pick(residual, level)
                at, inside = dense_tile(kept, image, pixel, channel, pixels, teacher_channels, IS_ALIGNED, PLANAR)
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
    size = pick_sizes(sizes, level)
    residual, student_matrix, gradient = pick_all((residual, student_matrix, gradient), level)
    slot, pixel_tiles, channel_tiles = size[3:6]
    image, pixel_tile, channel_tile = find_tile(program, pixel_tiles, channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            PLANAR: tl.constexpr = STUDENT_PLANAR & PATHS[index]
            IS_ALIGNED: tl.constexpr = ALIGNED & PATHS[index]
            extents = known_extents(size, PATHS[index], residual, student_matrix, gradient)
            channels, teacher_channels, pixels = extents
            matrix = Images(student_matrix, teacher_channels.to(tl.int64) * channels, channels)
            product = residual_by_matrix(
                residual, matrix, image, pixel, channel, extents, PATHS[index], PRECISION, INNER
            )
            at, inside = dense_tile(gradient, image, pixel, channel, pixels, channels, IS_ALIGNED, PLANAR)
            store_rounded(at, -2 * tl.load(grad + slot).to(product.dtype) * product, inside)


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
    size = pick_sizes(sizes, level)
    residual, x, partials = pick_all((residual, x, partials), level)
    dtype: tl.constexpr = partials.dtype.element_ty
    image_stride, pitch, slot, factor, parts, splits, row_tiles, col_tiles, tiles_of_image, tiles_of_split = size[3:13]
    part, row_tile, col_tile = find_tile(program, row_tiles, col_tiles)
    row, col = indices(row_tile, ROWS), indices(col_tile, COLS)
    first = part % splits * tiles_of_split
    tiles = tl.minimum(tiles_of_split, tiles_of_image - first)
    scale = factor.to(dtype) * tl.load(grad + slot).to(dtype)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            product, total = residual_by_map(
                residual,
                Images(x, image_stride, pitch),
                None,
                part // splits,
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
            rows, cols = row_tiles * ROWS, col_tiles * COLS
            product, total, is_first = scale * product, scale * total, col_tile == 0
            store_partials(partials, part, parts, row, col, rows, cols, product, total, is_first)


@triton.jit
def residual_tile(
    inputs, size, extents, image, pixel, channel, PATH: tl.constexpr, PRECISION: tl.constexpr, INNER: tl.constexpr
):
    """A tile ``(pixels, teacher channels)`` of e; zeros outside."""
    student_channels, teacher_channels, pixels = extents
    image_stride, pitch, teacher_stride, teacher_pitch = size[3:7]
    student, student_matrix, teacher, teacher_matrix, offset = inputs
    operand: tl.constexpr = student_matrix.dtype.element_ty
    value = tl.zeros((pixel.shape[0], channel.shape[0]), offset.dtype.element_ty)
    value = add_product(
        value,
        Images(student, image_stride, pitch),
        Images(student_matrix, teacher_channels.to(tl.int64) * student_channels, student_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, student_channels),
        STUDENT_PLANAR & PATH,
        False,
        ALIGNED & PATH,
        operand,
        PRECISION,
        INNER,
    )
    teachers = Images(teacher, teacher_stride, teacher_pitch)
    value = add_product(
        -value,
        teachers,
        Images(teacher_matrix, teacher_channels.to(tl.int64) * teacher_channels, teacher_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, teacher_channels),
        TEACHER_PLANAR & PATH,
        False,
        ALIGNED & PATH,
        operand,
        PRECISION,
        INNER,
    )
    IS_ALIGNED: tl.constexpr = ALIGNED & PATH
    at, inside = map_tile(teachers, image, pixel, channel, pixels, teacher_channels, IS_ALIGNED, TEACHER_PLANAR & PATH)
    value += tl.load(at, mask=inside, other=0.0).to(value.dtype)
    col = channel[None, :]
    value += tl.load(offset + image * teacher_channels + col, mask=col < teacher_channels, other=0.0)
    return tl.where(inside, value, 0.0)


class _Blocks(NamedTuple):
    """Extents of a program's tile of a product, of one step of its sum, and its warps."""

    ROWS: int  # pixels; in residual_products: teacher channels
    COLS: int  # channels
    INNER: int  # channels; in residual_products: pixels
    num_warps: int


# By the bytes of an operand and by whether everything is read 16 bytes at a time, which takes fewer registers. The
# largest tiles without spills on sm_80, sm_90 and sm_100, as compiled: registers are the limit.
_SUMS = {
    (2, True): _Blocks(128, 128, 64, 8),
    (2, False): _Blocks(128, 64, 32, 8),
    (4, True): _Blocks(128, 64, 16, 8),
    (4, False): _Blocks(64, 64, 16, 8),
    (8, True): _Blocks(64, 64, 16, 8),
    (8, False): _Blocks(64, 64, 16, 8),
}
_STUDENT = {
    (2, True): _Blocks(128, 128, 64, 8),
    (2, False): _Blocks(128, 64, 32, 8),
    (4, True): _Blocks(128, 128, 16, 8),
    (4, False): _Blocks(128, 64, 16, 8),
    (8, True): _Blocks(64, 64, 16, 8),
    (8, False): _Blocks(64, 64, 16, 8),
}
_PRODUCTS = _STUDENT | {(4, True): _Blocks(128, 64, 16, 8)}


class _Pair(NamedTuple):
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
        """The code path of a level whose kernel also reads or writes the other tensors."""
        views = [matrix_view(feature) for feature in self]
        planar = [view.rows_are_channels for view in views]
        student_channels, teacher_channels, pixels = self.extents
        extents = [student_channels, teacher_channels, *([pixels] if any(planar) else [])]
        aligned = all(aligned_to_16_bytes(x, *extents) for x in (*self, *others)) and all(
            aligned_to_16_bytes(x, view.image_stride, view.row_stride) for x, view in zip(self, views)
        )
        return STUDENT_PLANAR.value * planar[0] + TEACHER_PLANAR.value * planar[1] + ALIGNED.value * aligned

    def kind(self, path: int) -> tuple[int, bool]:
        """Which of a kernel's blocks a level takes."""
        return self.operand.itemsize, bool(path & ALIGNED.value)


def _pairs(students: list[Tensor], teachers: list[Tensor]) -> list[_Pair]:
    dtypes = [accumulation_dtype(*pair) for pair in zip(students, teachers)]
    features = zip(students, teachers, dtypes)
    return [_Pair(fit_for_products(s, dtype), fit_for_products(t, dtype)) for s, t, dtype in features]


def _launch(kernel, pairs: list[_Pair], levels: list[Level], blocks: dict, *shared: Tensor, **constants) -> None:
    for kind, block in blocks.items():
        chosen = [level for level, pair in zip(levels, pairs) if pair.kind(level.path) == kind]
        launch(kernel, chosen, *shared, by_path=True, PRECISION=precision(), **constants, **block._asdict())


def relation_residual_forward(
    students: list[Tensor],  # (N, Cs, H, W)
    student_matrices: list[Tensor],  # P (N, Ct, Cs)
    teachers: list[Tensor],  # (N, Ct, H, W)
    teacher_matrices: list[Tensor],  # U (N, Ct, c), or (N, Ct, Ct) without a projection
    teacher_projections: list[Optional[Tensor]],  # W (c, Ct)
    offsets: list[Tensor],  # v (N, Ct)
    keep: bool,
) -> list[Tensor]:
    """``sum(e**2)`` of each level, ``(levels,)``; then, to keep, e of each level in the teacher's layout."""
    pairs = _pairs(students, teachers)
    products = [_product(matrix, projection) for matrix, projection in zip(teacher_matrices, teacher_projections)]
    residuals = [_empty_residual(*features) for features in zip(students, teachers)] if keep else []
    levels, first = [], 0
    unused = [pair.teacher for pair in pairs]
    for pair, *tensors in zip(pairs, student_matrices, products, offsets, residuals or unused):
        levels.append(_sums_level(pair, *tensors, first))
        first += levels[-1].programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students, *teachers))
    _launch(residual_sums, pairs, levels, _SUMS, partials, KEEP=keep)
    return [add_partial_sums(partials, [level.programs for level in levels]), *residuals]


def _empty_residual(student: Tensor, teacher: Tensor) -> Tensor:
    return torch.empty_like(teacher, dtype=residual_dtype(student, teacher), memory_format=matrix_layout(teacher))


def _product(teacher_matrix: Tensor, projection: Optional[Tensor]) -> Tensor:
    """``U W (N, Ct, Ct)``."""
    with without_autocast(teacher_matrix):
        return teacher_matrix if projection is None else torch.matmul(teacher_matrix, projection)


def _sums_level(
    pair: _Pair,
    student_matrix: Tensor,
    teacher_matrix: Tensor,
    offset: Tensor,
    residual: Tensor,  # if it is not kept, any tensor
    first: int,
) -> Level:
    student_matrix, teacher_matrix = student_matrix.to(pair.operand), teacher_matrix.to(pair.operand)
    path = pair.path(student_matrix, teacher_matrix, residual)
    blocks = _SUMS[pair.kind(path)]
    _, channels, pixels = pair.extents
    tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
    strides = [stride for view in map(matrix_view, pair) for stride in (view.image_stride, view.row_stride)]
    pointers = pair.student, student_matrix, pair.teacher, teacher_matrix, offset, residual
    return Level(pair.images * tiles[0] * tiles[1], pointers, (*pair.extents, *strides, first, *tiles), path)


def relation_residual_backward(
    students: list[Tensor],
    student_matrices: list[Tensor],
    teachers: list[Tensor],
    teacher_matrices: list[Tensor],
    teacher_projections: list[Optional[Tensor]],
    offsets: list[Tensor],
    residuals: list[Tensor],  # e as the forward pass kept it; empty: it is computed again
    grad: Tensor,  # (levels,)
    student_gradient: bool,
) -> list[Tensor]:
    """All gradients of the students, if wanted, then of P, of U, of W (empty where it is None) and of v."""
    if not residuals:
        matrices = student_matrices, teachers, teacher_matrices, teacher_projections, offsets
        _, *residuals = relation_residual_forward(students, *matrices, True)
    pairs = _pairs(students, teachers)
    gradients = [empty_gradient(student) for student in students] if student_gradient else []
    _write_student_gradients(pairs, student_matrices, residuals, gradients, grad)
    by_student, by_teacher, by_offset = _parameter_gradients(pairs, student_matrices, offsets, residuals, grad)
    matrices = zip(by_teacher, teacher_matrices, teacher_projections)
    by_matrix, by_projection = zip(*(_factor_gradients(*level) for level in matrices))
    return [*gradients, *by_student, *by_matrix, *by_projection, *by_offset]


def _write_student_gradients(
    pairs: list[_Pair],
    student_matrices: list[Tensor],
    residuals: list[Tensor],
    gradients: list[Tensor],  # empty: not wanted
    grad: Tensor,
) -> None:
    levels = []
    for slot, (pair, matrix, residual, gradient) in enumerate(zip(pairs, student_matrices, residuals, gradients)):
        matrix = matrix.to(pair.operand)
        path = pair.path(matrix, residual, gradient)
        blocks = _STUDENT[pair.kind(path)]
        channels, _, pixels = pair.extents
        tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
        sizes = *pair.extents, slot, *tiles
        levels.append(Level(pair.images * tiles[0] * tiles[1], (residual, matrix, gradient), sizes, path))
    _launch(student_residual_gradients, pairs, levels, _STUDENT, grad)


def _parameter_gradients(
    pairs: list[_Pair], student_matrices: list[Tensor], offsets: list[Tensor], residuals: list[Tensor], grad: Tensor
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Of each level: ``-sum E s^T (N, Ct, Cs)``, ``sum E t^T (N, Ct, Ct)`` and ``sum E (N, Ct)``."""
    by_student, by_offset = [torch.empty_like(x) for x in student_matrices], [torch.empty_like(x) for x in offsets]
    by_teacher = [x.new_empty((*x.shape, x.shape[1])) for x in offsets]
    partials = [
        _partials(pair, residual, pair[side], slot, factor)
        for side, factor in enumerate((-2, 2))
        for slot, (pair, residual) in enumerate(zip(pairs, residuals))
    ]
    _launch(residual_products, pairs * 2, [of_one.level for of_one in partials], _PRODUCTS, grad)
    sums = [of_one.product(gradient) for of_one, gradient in zip(partials, [*by_student, *by_teacher])]
    sums += [of_one.total(gradient) for of_one, gradient in zip(partials[len(pairs) :], by_offset)]
    add_up(sums)
    return by_student, by_teacher, by_offset


class _Partials(NamedTuple):
    """A level of residual_products, and how its partial sums are added."""

    level: Level
    images: int
    splits: int  # of an image
    rows: int  # in whole tiles
    pitch: int

    def product(self, gradient: Tensor) -> Level:
        """For the sum of ``E x^T``, ``(N, Ct, C)``."""
        return sum_of_splits(gradient, self.level.pointers[2], 0, self.splits, self.rows * self.pitch, self.pitch)

    def total(self, gradient: Tensor) -> Level:
        """For the sum of E, ``(N, Ct)``."""
        first = self.images * self.splits * self.rows * self.pitch
        return sum_of_splits(gradient[:, None], self.level.pointers[2], first, self.splits, self.rows, self.rows)


def _partials(pair: _Pair, residual: Tensor, x: Tensor, slot: int, factor: int) -> _Partials:
    view, shared = matrix_view(x), pair.path(residual) & (TEACHER_PLANAR.value | ALIGNED.value)
    path = STUDENT_PLANAR.value * view.rows_are_channels + shared
    blocks = _PRODUCTS[pair.kind(path)]
    _, channels, pixels = pair.extents
    row_tiles, col_tiles = triton.cdiv(channels, blocks.ROWS), triton.cdiv(x.shape[1], blocks.COLS)
    tiles = triton.cdiv(pixels, blocks.INNER)
    splits, tiles_of_split = splits_of(tiles, pair.images * row_tiles * col_tiles, blocks.INNER)
    parts, rows, pitch = pair.images * splits, row_tiles * blocks.ROWS, col_tiles * blocks.COLS
    memory = x.new_empty(parts * rows * (pitch + 1), dtype=pair.dtype)
    strides = view.image_stride, view.row_stride
    sizes = x.shape[1], channels, pixels, *strides, slot, factor, parts, splits, row_tiles, col_tiles
    level = Level(parts * row_tiles * col_tiles, (residual, x, memory), (*sizes, tiles, tiles_of_split), path)
    return _Partials(level, pair.images, splits, rows, pitch)


def _factor_gradients(
    product: Tensor,  # (N, Ct, Ct)
    teacher_matrix: Tensor,
    projection: Optional[Tensor],
) -> tuple[Tensor, Tensor]:
    """Gradients of U and W, given that of ``U W``."""
    if projection is None:
        return product, product.new_empty(0)
    stacked = teacher_matrix.flatten(0, 1)  # (N Ct, c)
    with without_autocast(product):
        return torch.matmul(product, projection.mT), torch.matmul(stacked.mT, product.flatten(0, 1))
