"""Triton kernels of the correlation of two feature maps' channels, and of the loss's gradient.

Both maps are read as pairs.py says. Everything is computed in float64: the loss of two maps that nearly agree is a
small difference of large sums.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import MatrixView, empty_gradient, matrix_view
from .._numerics import accumulation_dtype
from ..ops.channel_correlation import COEFFICIENTS
from .pairs import CHANNEL_WARPS, CHANNELS, PIXELS, channel_constants, channel_level, load_pair
from .pyramid import (
    ALIGNMENT,
    Level,
    add_partial_sums,
    add_tiles,
    find_level,
    launch,
    launch_by_constants,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
)

__all__ = ["channel_correlation_backward", "channel_correlation_forward"]

# Of a channel of both maps, each shifted by its first element: the sums of student and teacher, of their squares and
# of their products.
SUMS = tl.constexpr(5)
TILES = 64  # whose sums are added in one step


class Sizes(NamedTuple):
    """A level's sizes where its maps are read."""

    rows: int
    cols: int
    stride: int  # of the student, from image to image
    pitch: int
    teacher_stride: int
    teacher_pitch: int
    row_tiles: int
    col_tiles: int
    student_step: int  # from channel to channel
    teacher_step: int
    slot: int  # of the level in the result
    first: int  # of the level's partial sums


class FinishSizes(NamedTuple):
    """A level's sizes where its sums are added up."""

    channels: int
    parts: int  # partial sums of a channel
    elements: int  # of a channel, in all images
    student_step: int  # from channel to channel
    teacher_step: int
    slot: int  # of the level's first channel in the losses
    first: int  # of the level's partial sums


@triton.jit
def sum_products(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    partials,  # a level: (tiles of pixels, 5, channels)
    sizes,
    PATHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AXIS: tl.constexpr,  # of the pixels
):
    """Write the sums of a pair."""
    level, path, program = find_level(sizes)
    size = Sizes(*pick_sizes(sizes, level))
    maps = pick(student, level), pick(teacher, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            pair = load_pair(maps, program, size, PATHS[index], ROWS, COLS)
            store_sums(maps, partials, pair, size, AXIS)


@triton.jit
def finish_channels(
    student,  # a level: (images, channels, pixels)
    teacher,  # a level: (images, channels, pixels)
    coefficients,  # a level: (6, channels)
    partials,  # a level: (parts, 5, channels)
    losses,  # a level: (channels,)
    sizes,
    PATHS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the coefficients of a block of channels, and what each adds to the loss."""
    level, _, program = find_level(sizes)
    size = FinishSizes(*pick_sizes(sizes, level))
    channel = program * BLOCK + tl.arange(0, BLOCK)
    inside = channel < size.channels
    at = partials + size.first + channel
    pitch = SUMS * size.channels
    count = size.elements.to(tl.float64)
    degrees = tl.maximum(count - 1, 1)
    s_mean = add_tiles(at, size.parts, pitch, inside, PARTS, BLOCK) / count
    t_mean = add_tiles(at + size.channels, size.parts, pitch, inside, PARTS, BLOCK) / count
    ss = add_tiles(at + 2 * size.channels, size.parts, pitch, inside, PARTS, BLOCK) - count * s_mean * s_mean
    tt = add_tiles(at + 3 * size.channels, size.parts, pitch, inside, PARTS, BLOCK) - count * t_mean * t_mean
    st = add_tiles(at + 4 * size.channels, size.parts, pitch, inside, PARTS, BLOCK) - count * s_mean * t_mean
    # Rounding may leave less than 0 of a sum of squares; NaN stays.
    ss, tt = tl.where(ss < 0, 0.0, ss), tl.where(tt < 0, 0.0, tt)
    deviation = tl.sqrt(ss / degrees)
    a, b = deviation + EPS, tl.sqrt(tt / degrees) + EPS
    scale = 1 / (size.channels.to(tl.float64) * count)
    loss = scale / 2 * (ss / (a * a) + tt / (b * b) - 2 * (st / (a * b)))
    tl.store(losses + size.slot + channel, loss, mask=inside)
    # d(deviation)/ds = (s - mean) / (degrees * deviation). Where the channel is constant ss and st are 0.
    divisor = a * degrees * tl.where(deviation == 0, 1.0, deviation)
    through_deviation = (ss / (a * a) - st / (a * b)) / divisor
    of_student = scale * (1 / (a * a) - through_deviation)
    shift = tl.load(pick(student, level) + channel * size.student_step, mask=inside, other=0.0).to(tl.float64)
    result = pick(coefficients, level) + channel
    tl.store(result, shift + s_mean, mask=inside)
    shift = tl.load(pick(teacher, level) + channel * size.teacher_step, mask=inside, other=0.0).to(tl.float64)
    tl.store(result + size.channels, shift + t_mean, mask=inside)
    tl.store(result + 2 * size.channels, of_student, mask=inside)
    tl.store(result + 3 * size.channels, -scale * (1 / (a * b)), mask=inside)
    tl.store(result + 4 * size.channels, ss, mask=inside)
    tl.store(result + 5 * size.channels, tt, mask=inside)


@triton.jit
def correlation_gradients(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    coefficients,  # a level: (6, channels)
    gradient,  # a level: (images, rows, cols), densely packed
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AXIS: tl.constexpr,
):
    """Write the gradients of the students."""
    level, path, program = find_level(sizes)
    size = Sizes(*pick_sizes(sizes, level))
    maps = pick(student, level), pick(teacher, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            pair = load_pair(maps, program, size, PATHS[index], ROWS, COLS)
            results = pick(coefficients, level), pick(gradient, level), grad
            store_gradient(results, pair, size, ALIGNMENT & PATHS[index], AXIS)


@triton.jit
def store_sums(maps, partials, pair, size, AXIS: tl.constexpr):
    """Store the tile's five sums of each channel."""
    student, teacher = maps
    if AXIS == 1:
        channel, channels, part = pair.row, size.rows, pair.image * size.col_tiles + pair.col_tile
    else:
        channel, channels, part = pair.col, size.cols, pair.image * size.row_tiles + pair.row_tile
    inside = channel < channels
    both = pair.row_inside[:, None] & pair.col_inside[None, :]
    s_shift = tl.load(student + channel * size.student_step, mask=inside, other=0.0).to(tl.float64)
    t_shift = tl.load(teacher + channel * size.teacher_step, mask=inside, other=0.0).to(tl.float64)
    u = tl.where(both, pair.student.to(tl.float64) - tl.expand_dims(s_shift, AXIS), 0.0)
    v = tl.where(both, pair.teacher.to(tl.float64) - tl.expand_dims(t_shift, AXIS), 0.0)
    at = partials + size.first + part * SUMS * channels + channel
    tl.store(at, tl.sum(u, axis=AXIS), mask=inside)
    tl.store(at + channels, tl.sum(v, axis=AXIS), mask=inside)
    tl.store(at + 2 * channels, tl.sum(u * u, axis=AXIS), mask=inside)
    tl.store(at + 3 * channels, tl.sum(v * v, axis=AXIS), mask=inside)
    tl.store(at + 4 * channels, tl.sum(u * v, axis=AXIS), mask=inside)


@triton.jit
def store_gradient(results, pair, size, ALIGN: tl.constexpr, AXIS: tl.constexpr):
    """Store the tile of the student's gradient."""
    coefficients, gradient, grad = results
    if AXIS == 1:
        channel, channels = pair.row, size.rows
    else:
        channel, channels = pair.col, size.cols
    inside, at = channel < channels, coefficients + channel
    s_mean = tl.expand_dims(tl.load(at, mask=inside, other=0.0), AXIS)
    t_mean = tl.expand_dims(tl.load(at + channels, mask=inside, other=0.0), AXIS)
    of_student = tl.expand_dims(tl.load(at + 2 * channels, mask=inside, other=0.0), AXIS)
    of_teacher = tl.expand_dims(tl.load(at + 3 * channels, mask=inside, other=0.0), AXIS)
    s, t = pair.student.to(tl.float64) - s_mean, pair.teacher.to(tl.float64) - t_mean
    sum_of_both = of_student * s + of_teacher * t
    value = tl.load(grad + size.slot).to(tl.float64) * sum_of_both
    row, col = pair.row[:, None], pair.col[None, :]
    at = tile_pointers(gradient, pair.image, size.rows * size.cols, size.cols, row, col, ALIGN, False)
    store_rounded(at, value, pair.row_inside[:, None] & pair.col_inside[None, :])


def _steps(view: MatrixView, teacher_view: MatrixView) -> tuple[int, int]:
    """Return the distances from channel to channel of student and teacher."""
    views = view, teacher_view
    student_step, teacher_step = (each.row_stride if each.rows_are_channels else 1 for each in views)
    return student_step, teacher_step


def _level(student: Tensor, teacher: Tensor, outputs: tuple[Tensor, ...], slot: int, first: int) -> Level:
    steps = _steps(matrix_view(student), matrix_view(teacher))
    return channel_level(student, teacher, outputs, Sizes, *steps, slot, first)


def _launch(kernel, levels: list[Level], shared: Tensor) -> None:
    constants = [channel_constants(matrix_view(level.pointers[0])) for level in levels]
    # Without fused products the gradient of equal maps is 0.
    launch_by_constants(kernel, levels, constants, shared, num_warps=CHANNEL_WARPS, enable_fp_fusion=False)


def channel_correlation_forward(students: list[Tensor], teachers: list[Tensor], eps: float) -> list[Tensor]:
    """Each level's loss, ``(levels,)``, then its coefficients ``(6, C)``; see ops/channel_correlation.py.

    Args:
        students, teachers: ``(N, C, H, W)``.
        eps: what is added to each standard deviation.
    """
    channels = [student.shape[1] for student in students]
    parts = [_parts(student) for student in students]
    counts = [SUMS.value * count * width for count, width in zip(parts, channels, strict=True)]
    *firsts, partial_count = accumulate(counts, initial=0)
    *slots, channel_count = accumulate(channels, initial=0)
    partials = students[0].new_empty(partial_count, dtype=torch.float64)
    losses = students[0].new_zeros(channel_count, dtype=torch.float64)
    coefficients = [_empty_coefficients(student) for student in students]
    places = list(zip(students, teachers, firsts, strict=True))
    levels = [_level(student, teacher, (), 0, first) for student, teacher, first in places]
    _launch(sum_products, levels, partials)
    finish = [
        _finish_level(*place) for place in zip(students, teachers, coefficients, parts, slots, firsts, strict=True)
    ]
    launch(finish_channels, finish, partials, losses, EPS=eps, BLOCK=CHANNELS, PARTS=TILES)
    sums = add_partial_sums(losses, channels)
    return [sums.to(accumulation_dtype(*students, *teachers)), *coefficients]


def _empty_coefficients(student: Tensor) -> Tensor:
    """Return memory for a level's coefficients: zeros where no program will write them."""
    make = student.new_empty if student.numel() else student.new_zeros
    return make((COEFFICIENTS, student.shape[1]), dtype=torch.float64)


def _parts(student: Tensor) -> int:
    """Return how many tiles of pixels all images have."""
    return student.shape[0] * triton.cdiv(student.shape[2] * student.shape[3], PIXELS)


def _finish_level(student: Tensor, teacher: Tensor, result: Tensor, parts: int, slot: int, first: int) -> Level:
    images, channels, height, width = student.shape
    steps = _steps(matrix_view(student), matrix_view(teacher))
    sizes = FinishSizes(channels, parts, images * height * width, *steps, slot, first)
    return Level(triton.cdiv(channels, CHANNELS) if parts else 0, (student, teacher, result), sizes)


def channel_correlation_backward(
    students: list[Tensor],
    teachers: list[Tensor],
    coefficients: list[Tensor],
    grad: Tensor,  # (levels,)
) -> list[Tensor]:
    """Gradient of each level's student."""
    gradients = [empty_gradient(student) for student in students]
    outputs = zip(coefficients, gradients, strict=True)
    levels = [
        _level(student, teacher, output, slot, 0)
        for slot, (student, teacher, output) in enumerate(zip(students, teachers, outputs, strict=True))
    ]
    _launch(correlation_gradients, levels, grad)
    return gradients
