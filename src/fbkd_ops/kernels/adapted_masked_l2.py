"""Triton kernels of the masked squared difference after a 1x1 adaptation, and its gradients.

``D = A S + a - T`` exists a tile at a time in registers: the forward kernel's epilogue turns a tile of products into
one partial sum and, where D is kept, into a tile of D. The backward pass makes both gradients of the kept D, or of one
that the same kernel computes again.

The operands of features that share a 16-bit dtype are of that dtype, A and D rounded to it; those of others are float32
or float64, see products.py. D is kept without its masks, which may be as large as the number of pixels or channels:

- ``dS = 2 grad Ms (Mc A)^T D``: the inner axis is the teacher's channels. ``Mc A`` is rounded once, an image at a time:
  float16 holds it up to ``65504 = 2048 * 32``, the largest mask of 2048 channels times a weight of 32. Ms and grad
  scale float32 sums.
- ``dA = sum 2 grad Mc (Ms D) S^T``: the inner axis is the pixels. ``Ms D`` is computed in float32 before it is rounded,
  for float16 with Ms divided by a power of two above its peak, so that no element is larger than that of D.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_gradient, empty_residual, matrix_view
from .._numerics import accumulation_dtype
from .products import (
    STUDENT_PLANAR,
    TEACHER_PLANAR,
    Images,
    Pair,
    PixelSplits,
    PixelWeights,
    add_product,
    add_up,
    dense_tile,
    fit_for_products,
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
    SIXTEEN_BYTES,
    Level,
    add_partial_sums,
    alignment,
    find_level,
    find_tile,
    in_place_of_none,
    load_mask,
    pick,
    pick_all,
    pick_sizes,
    scaled_gradient,
    store_rounded,
)

__all__ = ["adapted_masked_l2_backward", "adapted_masked_l2_forward"]

PEAK_PIXELS = tl.constexpr(1024)  # of a mask whose peak is sought, in one step


class SumSizes(NamedTuple):
    """A level's sizes in adapted_sums."""

    student_channels: int
    teacher_channels: int
    pixels: int
    student_stride: int  # from image to image
    student_pitch: int
    teacher_stride: int
    teacher_pitch: int
    spatial_given: int  # whether the mask is there
    channel_given: int
    first: int  # of the level's partial sums
    pixel_tiles: int
    channel_tiles: int


class StudentSizes(NamedTuple):
    """A level's sizes in student_gradients."""

    student_channels: int
    teacher_channels: int
    pixels: int
    student_stride: int
    student_pitch: int
    matrix_stride: int  # 0 where the images share the matrix
    slot: int  # of the level's grad
    spatial_given: int
    spatial_abs_given: int
    channel_abs_given: int
    spatial_plain_given: int
    channel_plain_given: int
    student_given: int
    pixel_tiles: int
    channel_tiles: int


class WeightSizes(NamedTuple):
    """A level's sizes in weight_gradients."""

    student_channels: int
    teacher_channels: int
    pixels: int
    student_stride: int
    student_pitch: int
    slot: int
    spatial_given: int
    channel_given: int
    parts: int
    splits: int
    row_tiles: int
    col_tiles: int
    tiles_of_image: int
    tiles_of_split: int


@triton.jit
def adapted_sums(
    student,  # a level: (N, Cs, H, W)
    weight,  # a level: (Ct, Cs)
    bias,  # a level: (Ct,)
    teacher,  # a level: (N, Ct, H, W)
    spatial_mask,  # a level: (N, H, W)
    channel_mask,  # a level: (N, Ct)
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
    """Partial sums of ``Ms Mc D^2``, and D."""
    level, path, program = find_level(sizes)
    size = SumSizes(*pick_sizes(sizes, level))
    inputs = pick_all((student, weight, bias, teacher), level)
    spatial_mask, channel_mask = pick_all((spatial_mask, channel_mask), level)
    image, pixel_tile, channel_tile = find_tile(program, size.pixel_tiles, size.channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            extents = known_extents(size, PATHS[index], inputs[0], inputs[1], inputs[3])
            _, channels, pixels = extents
            dtype: tl.constexpr = spatial_mask.dtype.element_ty
            difference = difference_tile(
                inputs, size, extents, image, pixel, channel, dtype, PATHS[index], PRECISION, INNER
            )
            by_pixel = load_mask(spatial_mask, image * pixels + pixel, pixel < pixels, size.spatial_given)
            by_channel = load_mask(channel_mask, image * channels + channel, channel < channels, size.channel_given)
            squares = difference * difference * by_channel[None, :] * by_pixel[:, None]
            tl.store(partials + size.first + program, tl.sum(squares).to(partials.dtype.element_ty))
            if KEEP:
                PLANAR: tl.constexpr = TEACHER_PLANAR & PATHS[index]
                kept = pick(residual, level)
                at, inside = dense_tile(kept, image, pixel, channel, pixels, channels, ALIGNMENT & PATHS[index], PLANAR)
                store_rounded(at, difference, inside)


@triton.jit
def student_gradients(
    residual,  # a level: D (N, Ct, H, W), densely packed in the teacher's layout
    matrix,  # a level: Mc A (N, Ct, Cs), or A (Ct, Cs)
    student,  # a level: (N, Cs, H, W)
    spatial_mask,  # a level: (N, H, W)
    gradient,  # a level: (N, Cs, H, W), densely packed
    grad_student,  # a level: (N, Cs, H, W), densely packed
    spatial_abs,  # a level: (N, H, W)
    channel_abs,  # a level: (N, Cs)
    spatial_plain,  # a level: (N, H, W)
    channel_plain,  # a level: (N, Cs)
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """``2 grad Ms (Mc A)^T D``, and what flows back to the student from elsewhere."""
    level, path, program = find_level(sizes)
    size = StudentSizes(*pick_sizes(sizes, level))
    residual, matrix, student = pick_all((residual, matrix, student), level)
    spatial_mask, gradient, grad_student = pick_all((spatial_mask, gradient, grad_student), level)
    pools = pick_all((spatial_abs, channel_abs, spatial_plain, channel_plain), level)
    image, pixel_tile, channel_tile = find_tile(program, size.pixel_tiles, size.channel_tiles)
    pixel, channel = indices(pixel_tile, ROWS), indices(channel_tile, COLS)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            PLANAR: tl.constexpr = STUDENT_PLANAR & PATHS[index]
            ALIGN: tl.constexpr = ALIGNMENT & PATHS[index]
            extents = known_extents(size, PATHS[index], residual, matrix, student)
            channels, _, pixels = extents
            matrices = Images(matrix, size.matrix_stride, channels)
            total = residual_by_matrix(
                residual, matrices, image, pixel, channel, extents, PATHS[index], PRECISION, INNER
            )
            weight = load_mask(spatial_mask, image * pixels + pixel, pixel < pixels, size.spatial_given)
            total *= (2 * tl.load(grad + size.slot).to(total.dtype) * weight)[:, None]
            total = add_pooled_gradients(total, student, pools, size, extents, image, pixel, channel, PATHS[index])
            at, inside = dense_tile(grad_student, image, pixel, channel, pixels, channels, ALIGN, PLANAR)
            total += tl.load(at, mask=inside & (size.student_given != 0), other=0.0).to(total.dtype)
            at, inside = dense_tile(gradient, image, pixel, channel, pixels, channels, ALIGN, PLANAR)
            store_rounded(at, total, inside)


@triton.jit
def weight_gradients(
    residual,  # a level: D (N, Ct, H, W), densely packed in the teacher's layout
    student,  # a level: (N, Cs, H, W)
    spatial_mask,  # a level: (N, H, W)
    channel_mask,  # a level: (N, Ct)
    partials,  # a level, in whole tiles: (N * splits, Ct, Cs) for the weight, then (N * splits, Ct) for the bias
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    INNER: tl.constexpr,
):
    """Partial sums over pixels of ``2 grad Mc (Ms D) S^T`` and of ``2 grad Mc (Ms D)``."""
    level, path, program = find_level(sizes)
    size = WeightSizes(*pick_sizes(sizes, level))
    residual, student, partials = pick_all((residual, student, partials), level)
    spatial_mask, channel_mask = pick_all((spatial_mask, channel_mask), level)
    dtype: tl.constexpr = partials.dtype.element_ty
    part, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    row, col = indices(row_tile, ROWS), indices(col_tile, COLS)
    image, first = part // size.splits, part % size.splits * size.tiles_of_split
    tiles = tl.minimum(size.tiles_of_split, size.tiles_of_image - first)
    begin, end = first * INNER, tl.minimum((first + tiles) * INNER, size.pixels)
    scale = tl.full((), 1.0, dtype)
    if residual.dtype.element_ty == tl.float16:
        scale = below_one(spatial_mask + image * size.pixels, begin, end, size.spatial_given)
    factor = 2 * tl.load(grad + size.slot).to(dtype) / scale
    at = image * size.teacher_channels + row
    factor *= load_mask(channel_mask, at, row < size.teacher_channels, size.channel_given)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            product, total = residual_by_map(
                residual,
                Images(student, size.student_stride, size.student_pitch),
                PixelWeights(spatial_mask, size.spatial_given, scale),
                image,
                first,
                tiles,
                row,
                col,
                known_extents(size, PATHS[index], residual, student, student),
                dtype,
                INNER,
                PATHS[index],
                PRECISION,
            )
            product, total, is_first = factor[:, None] * product, factor * total, col_tile == 0
            rows, cols = size.row_tiles * ROWS, size.col_tiles * COLS
            store_partials(partials, part, size.parts, row, col, rows, cols, product, total, is_first)


@triton.jit
def below_one(mask, begin, end, given):
    """Return a power of two, times which the float32 mask is below 1 on the pixels from ``begin`` to ``end``."""
    peak = tl.zeros((PEAK_PIXELS,), tl.float32)
    for first in range(begin, end, PEAK_PIXELS):
        pixel = first + tl.arange(0, PEAK_PIXELS)
        peak = tl.maximum(peak, tl.abs(tl.load(mask + pixel, mask=(pixel < end) & (given != 0), other=0.0)))
    peak = tl.where(given != 0, tl.max(peak, axis=0), 1.0)
    exponent = (peak.to(tl.int32, bitcast=True) >> 23) & 255
    return (tl.maximum(253 - exponent, 1) << 23).to(tl.float32, bitcast=True)


@triton.jit
def difference_tile(
    inputs,
    size,
    extents,
    image,
    pixel,
    channel,
    DTYPE: tl.constexpr,
    PATH: tl.constexpr,
    PRECISION: tl.constexpr,
    INNER: tl.constexpr,
):
    """Return a tile ``(pixels, teacher channels)`` of D; zeros outside."""
    student_channels, teacher_channels, pixels = extents
    student, weight, bias, teacher = inputs
    value = add_product(
        tl.zeros((pixel.shape[0], channel.shape[0]), DTYPE),
        Images(student, size.student_stride, size.student_pitch),
        Images(weight, 0, student_channels),
        image,
        pixel,
        channel,
        (pixels, teacher_channels, student_channels),
        PLANAR=STUDENT_PLANAR & PATH,
        TRANSPOSED=False,
        ALIGN=ALIGNMENT & PATH,
        OPERAND=weight.dtype.element_ty,
        PRECISION=PRECISION,
        INNER=INNER,
    )
    teachers = Images(teacher, size.teacher_stride, size.teacher_pitch)
    ALIGN: tl.constexpr = ALIGNMENT & PATH
    at, inside = map_tile(teachers, image, pixel, channel, pixels, teacher_channels, ALIGN, TEACHER_PLANAR & PATH)
    value += tl.load(bias + channel, mask=channel < teacher_channels, other=0.0).to(DTYPE)[None, :]
    value -= tl.load(at, mask=inside, other=0.0).to(DTYPE)
    return tl.where(inside, value, 0.0)


@triton.jit
def add_pooled_gradients(total, student, pools, size, extents, image, pixel, channel, PATH: tl.constexpr):
    """Return a tile ``(pixels, student channels)`` plus what the gradients of the student's four means add to it."""
    channels, _, pixels = extents
    spatial_abs, channel_abs, spatial_plain, channel_plain = pools
    row, col = pixel[:, None], channel[None, :]
    spatial_at, channel_at = image * pixels + row, image * channels + col
    total += scaled_gradient(spatial_plain, spatial_at, row < pixels, size.spatial_plain_given, channels)
    total += scaled_gradient(channel_plain, channel_at, col < channels, size.channel_plain_given, pixels)
    if size.spatial_abs_given + size.channel_abs_given > 0:
        students = Images(student, size.student_stride, size.student_pitch)
        at, inside = map_tile(
            students, image, pixel, channel, pixels, channels, ALIGNMENT & PATH, STUDENT_PLANAR & PATH
        )
        value = tl.load(at, mask=inside, other=0.0)
        by_pixel = scaled_gradient(spatial_abs, spatial_at, row < pixels, size.spatial_abs_given, channels)
        by_channel = scaled_gradient(channel_abs, channel_at, col < channels, size.channel_abs_given, pixels)
        absolute = by_pixel + by_channel
        total += tl.where(value > 0, absolute, tl.where(value < 0, -absolute, 0.0))
    return total


class _Adaptation(NamedTuple):
    """A level's features, and what takes the student's to the teacher's."""

    pair: Pair
    weight: Tensor  # (Ct, Cs)
    bias: Tensor  # (Ct,)
    spatial_mask: Tensor | None  # (N, H, W)
    channel_mask: Tensor | None  # (N, Ct)

    @property
    def masks(self) -> list[Tensor]:
        """Of pixels and of channels; where there is none, a tensor that is not read."""
        return in_place_of_none((self.spatial_mask, self.channel_mask), self.pair.student, self.pair.dtype)

    @property
    def masks_given(self) -> tuple[int, int]:
        return int(self.spatial_mask is not None), int(self.channel_mask is not None)

    @property
    def student_strides(self) -> tuple[int, int]:
        """From image to image, and from row to row."""
        view = matrix_view(self.pair.student)
        return view.image_stride, view.row_stride

    def masked_weight(self) -> Tensor:
        """``Mc A (N, Ct, Cs)``, or ``A (1, Ct, Cs)`` for all images, rounded once to the residual's dtype."""
        if self.channel_mask is None:
            return self.weight.to(self.pair.operand)[None]
        result = self.weight.new_empty((self.pair.images, *self.weight.shape), dtype=self.pair.operand)
        return torch.mul(self.channel_mask[:, :, None], self.weight, out=result)


def _adaptations(students, weights, biases, teachers, spatial_masks, channel_masks) -> list[_Adaptation]:
    parameters = zip(weights, biases, spatial_masks, channel_masks, strict=True)
    levels = zip(pairs_of(students, teachers), parameters, strict=True)
    return [
        _Adaptation(pair, weight.contiguous(), bias.contiguous(), *masks) for pair, (weight, bias, *masks) in levels
    ]


def adapted_masked_l2_forward(
    students: list[Tensor],  # (N, Cs, H, W)
    weights: list[Tensor],  # (Ct, Cs)
    biases: list[Tensor],  # (Ct,)
    teachers: list[Tensor],  # (N, Ct, H, W)
    spatial_masks: list[Tensor | None],  # (N, H, W)
    channel_masks: list[Tensor | None],  # (N, Ct)
    keep: bool,
) -> list[Tensor]:
    """``sum(Ms * Mc * (A S + a - T)**2)`` of each level, ``(levels,)``; then, if kept, each level's D."""
    levels = _adaptations(students, weights, biases, teachers, spatial_masks, channel_masks)
    residuals = _empty_residuals(students, teachers) if keep else []
    partials, counts = _write_residuals(levels, residuals)
    return [add_partial_sums(partials, counts), *residuals]


def _empty_residuals(students: list[Tensor], teachers: list[Tensor]) -> list[Tensor]:
    return [empty_residual(*features) for features in zip(students, teachers, strict=True)]


def _write_residuals(levels: list[_Adaptation], residuals: list[Tensor]) -> tuple[Tensor, list[int]]:
    """Write D of each level, unless the list is empty; the partial sums, and how many of them each level has."""
    launched, first = [], 0
    for level, residual in zip(levels, residuals or [level.pair.teacher for level in levels], strict=True):
        launched.append(_sums_level(level, residual, first))
        first += launched[-1].programs
    pairs = [level.pair for level in levels]
    dtype = accumulation_dtype(*(feature for pair in pairs for feature in pair))
    partials = pairs[0].student.new_empty(first, dtype=dtype)
    launch_products(adapted_sums, pairs, launched, partials, KEEP=bool(residuals))
    return partials, [level.programs for level in launched]


def _sums_level(level: _Adaptation, residual: Tensor, first: int) -> Level:
    pair, weight = level.pair, level.weight.to(level.pair.operand)
    path = pair.path(weight, residual)
    blocks = pair.blocks(adapted_sums, path)
    view = matrix_view(pair.teacher)
    _, channels, pixels = pair.extents
    tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
    strides = *level.student_strides, view.image_stride, view.row_stride
    sizes = SumSizes(*pair.extents, *strides, *level.masks_given, first, *tiles)
    pointers = pair.student, weight, level.bias, pair.teacher, *level.masks, residual
    return Level(pair.images * tiles[0] * tiles[1], pointers, sizes, path)


def adapted_masked_l2_backward(
    students: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    teachers: list[Tensor],
    spatial_masks: list[Tensor | None],
    channel_masks: list[Tensor | None],
    residuals: list[Tensor],  # D as the forward pass kept it; empty: it is computed again
    grad: Tensor,  # (levels,)
    pool_grads: list[Tensor | None],  # of the student's four means, 4 a level
    grad_students: list[Tensor | None],  # like the students, densely packed
) -> list[Tensor]:
    """All gradients of the students, then of the weights, then of the biases."""
    levels = _adaptations(students, weights, biases, teachers, spatial_masks, channel_masks)
    if not residuals:
        residuals = _empty_residuals(students, teachers)
        _write_residuals(levels, residuals)
    added = [(pool_grads[4 * slot : 4 * slot + 4], grad_students[slot]) for slot in range(len(levels))]
    gradients = _student_gradients(levels, residuals, added, grad) + _parameter_gradients(levels, residuals, grad)
    return [gradient.to(like.dtype) for gradient, like in zip(gradients, [*students, *weights, *biases], strict=True)]


def _student_gradients(
    levels: list[_Adaptation],
    residuals: list[Tensor],
    added: list[tuple[list[Tensor | None], Tensor | None]],  # gradients of the means and of the student
    grad: Tensor,
) -> list[Tensor]:
    gradients, launched = [], []
    for slot, (level, residual, (pool_grads, grad_student)) in enumerate(zip(levels, residuals, added, strict=True)):
        gradients.append(empty_gradient(level.pair.student))
        launched.append(_student_level(level, residual, gradients[-1], pool_grads, grad_student, slot))
    launch_products(student_gradients, [level.pair for level in levels], launched, grad)
    return gradients


def _student_level(
    level: _Adaptation,
    residual: Tensor,
    gradient: Tensor,
    pool_grads: list[Tensor | None],
    grad_student: Tensor | None,
    slot: int,
) -> Level:
    pair, matrix = level.pair, level.masked_weight()
    if grad_student is not None:
        grad_student = fit_for_products(grad_student, pair.dtype)
        if alignment(grad_student) != SIXTEEN_BYTES.value:
            grad_student = grad_student.clone()  # the kernel reads it as it writes the gradient
    given = (int(x is not None) for x in (*pool_grads, grad_student))
    path = pair.path(matrix, residual, gradient)
    blocks = pair.blocks(student_gradients, path)
    channels, _, pixels = pair.extents
    tiles = triton.cdiv(pixels, blocks.ROWS), triton.cdiv(channels, blocks.COLS)
    matrix_stride = 0 if level.channel_mask is None else level.weight.numel()
    sizes = *level.student_strides, matrix_stride, slot, level.masks_given[0], *given, *tiles
    pointers: tuple[Tensor, ...]
    pointers = residual, matrix, pair.student, level.masks[0], gradient
    pointers += gradient if grad_student is None else grad_student, *in_place_of_none(pool_grads, gradient, pair.dtype)
    return Level(pair.images * tiles[0] * tiles[1], pointers, StudentSizes(*pair.extents, *sizes), path)


def _parameter_gradients(levels: list[_Adaptation], residuals: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Gradients of all weights, then of all biases."""
    weights, biases = (
        [torch.empty_like(x) for x in group] for group in zip(*((of.weight, of.bias) for of in levels), strict=True)
    )
    launched, sums = [], []
    for slot, (level, residual, weight, bias) in enumerate(zip(levels, residuals, weights, biases, strict=True)):
        path = level.pair.path(residual)
        splits = split_pixels(level.pair, weight.shape[1], level.pair.blocks(weight_gradients, path))
        partials = splits.partials(residual, level.pair.dtype)
        launched.append(_weight_level(level, residual, splits, partials, slot, path))
        sums += [splits.product(weight, partials), splits.total(bias, partials)]
    launch_products(weight_gradients, [level.pair for level in levels], launched, grad)
    add_up(sums)
    return [*weights, *biases]


def _weight_level(
    level: _Adaptation, residual: Tensor, splits: PixelSplits, partials: Tensor, slot: int, path: int
) -> Level:
    sizes = WeightSizes(*level.pair.extents, *level.student_strides, slot, *level.masks_given, *splits.sizes)
    return Level(splits.programs, (residual, level.pair.student, *level.masks, partials), sizes, path)
