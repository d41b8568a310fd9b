"""Triton kernels of the divergence of two feature maps' channels as distributions over pixels, and of its gradient.

Both maps are read as pairs.py says. A tile is computed in the accumulation dtype, relative to its own maxima; tiles are
joined in float64.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import empty_gradient, matrix_view
from .._numerics import accumulation_dtype
from .pairs import CHANNEL_WARPS, CHANNELS, PIXELS, channel_constants, channel_level, load_pair
from .pyramid import (
    ALIGNMENT,
    Level,
    add_partial_sums,
    find_level,
    launch,
    launch_by_constants,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
)

__all__ = ["channel_divergence_backward", "channel_divergence_forward"]

# Of a channel's pixels in a tile: the maxima m of both maps, and with x = (s - m_s) / tau, y = (t - m_t) / tau the sums
# of e^x, of e^y and of e^y (y - x).
PARTS = tl.constexpr(5)
NORMALISERS = tl.constexpr(4)  # of a channel of an image: each map's maximum, and one over its sum
# No maximum is -inf, because e^(-inf - LOWEST) is 0 and e^(-inf + inf) NaN.
LOWEST = tl.constexpr(-3.4028234663852886e38)
TILES = 16  # that are joined in one step: 32 fill the registers


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
    images: int
    slot: int  # of the level in the result
    first: int  # of the level's parts


class JoinSizes(NamedTuple):
    """A level's sizes where its parts are joined."""

    channels: int
    tiles: int  # of an image's pixels
    blocks: int  # of channels
    slot: int  # of the level's first channel in the losses
    first: int  # of the level's parts


@triton.jit
def reduce_tiles(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    parts,  # a level: (images, tiles of pixels, 5, channels)
    sizes,
    PATHS: tl.constexpr,
    INVERSE: tl.constexpr,  # 1 / tau
    DTYPE: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
    AXIS: tl.constexpr,  # of the pixels
):
    """Write the parts of a tile."""
    level, path, program = find_level(sizes)
    size = Sizes(*pick_sizes(sizes, level))
    maps = pick(student, level), pick(teacher, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            pair = load_pair(maps, program, size, PATHS[index], ROWS, COLS)
            store_parts(parts, pair, size, INVERSE, DTYPE, AXIS)


@triton.jit
def join_tiles(
    normalisers,  # a level: (images, 4, channels), the maximum and one over the sum of student and teacher
    parts,  # a level: (images, tiles, 5, channels)
    losses,  # a level: (images, channels)
    sizes,
    PATHS: tl.constexpr,
    INVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Write the normalisers of a block of an image's channels, and what each adds to the loss."""
    level, _, program = find_level(sizes)
    size = JoinSizes(*pick_sizes(sizes, level))
    image, channel = program // size.blocks, program % size.blocks * BLOCK + tl.arange(0, BLOCK)
    inside, count = channel < size.channels, size.channels
    at, pitch = parts + size.first + image * size.tiles * PARTS * count + channel, PARTS * count
    s_max = largest_of_tiles(at, size.tiles, pitch, inside, STEP, BLOCK)
    t_max = largest_of_tiles(at + count, size.tiles, pitch, inside, STEP, BLOCK)
    s_sum = tl.zeros((BLOCK,), tl.float64)
    t_sum = tl.zeros((BLOCK,), tl.float64)
    divergence = tl.zeros((BLOCK,), tl.float64)
    for first in range(0, size.tiles, STEP):
        tile = first + tl.arange(0, STEP)
        here, both = at[None, :] + tile[:, None] * pitch, (tile < size.tiles)[:, None] & inside[None, :]
        x = (tl.load(here, mask=both, other=0.0) - s_max[None, :]) * INVERSE
        y = (tl.load(here + count, mask=both, other=0.0) - t_max[None, :]) * INVERSE
        weight, of_teacher = tl.exp(y), tl.load(here + 3 * count, mask=both, other=0.0)
        s_sum += tl.sum(tl.where(both, tl.exp(x) * tl.load(here + 2 * count, mask=both, other=0.0), 0.0), axis=0)
        t_sum += tl.sum(tl.where(both, weight * of_teacher, 0.0), axis=0)
        inner = tl.load(here + 4 * count, mask=both, other=0.0) + of_teacher * (y - x)
        divergence += tl.sum(tl.where(both, weight * inner, 0.0), axis=0)
    loss = divergence / t_sum + (tl.log(s_sum) - tl.log(t_sum))
    tl.store(losses + size.slot + image * count + channel, loss, mask=inside)
    result = pick(normalisers, level) + image * NORMALISERS * count + channel
    store_rounded(result, s_max, inside)
    store_rounded(result + count, 1 / s_sum, inside)
    store_rounded(result + 2 * count, t_max, inside)
    store_rounded(result + 3 * count, 1 / t_sum, inside)


@triton.jit
def largest_of_tiles(at, tiles, pitch, inside, STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest of all tiles' numbers of each channel."""
    largest = tl.full((BLOCK,), LOWEST, tl.float64)
    for first in range(0, tiles, STEP):
        tile = first + tl.arange(0, STEP)
        both = (tile < tiles)[:, None] & inside[None, :]
        numbers = tl.load(at[None, :] + tile[:, None] * pitch, mask=both, other=LOWEST)
        largest = tl.maximum(largest, tl.max(numbers, axis=0))
    return largest


@triton.jit
def divergence_gradients(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    normalisers,  # a level: (images, 4, channels)
    gradient,  # a level: (images, rows, cols), densely packed
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    INVERSE: tl.constexpr,
    DTYPE: tl.constexpr,
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
            results = pick(normalisers, level), pick(gradient, level), grad
            store_gradient(results, pair, size, INVERSE, DTYPE, ALIGNMENT & PATHS[index], AXIS)


@triton.jit
def store_parts(parts, pair, size, INVERSE: tl.constexpr, DTYPE: tl.constexpr, AXIS: tl.constexpr):
    """Store the tile's five numbers of each channel."""
    if AXIS == 1:
        channel, channels, tile = pair.row, size.rows, pair.image * size.col_tiles + pair.col_tile
    else:
        channel, channels, tile = pair.col, size.cols, pair.image * size.row_tiles + pair.row_tile
    inside = pair.row_inside[:, None] & pair.col_inside[None, :]
    student, teacher = pair.student.to(DTYPE), pair.teacher.to(DTYPE)
    s_max = tl.maximum(tl.max(tl.where(inside, student, LOWEST), axis=AXIS), LOWEST)
    t_max = tl.maximum(tl.max(tl.where(inside, teacher, LOWEST), axis=AXIS), LOWEST)
    x = (student - tl.expand_dims(s_max, AXIS)) * INVERSE
    y = (teacher - tl.expand_dims(t_max, AXIS)) * INVERSE
    weight = tl.where(inside, tl.exp(y), 0.0)
    at = parts + size.first + tile * PARTS * channels + channel
    stored = channel < channels
    tl.store(at, s_max.to(tl.float64), mask=stored)
    tl.store(at + channels, t_max.to(tl.float64), mask=stored)
    tl.store(at + 2 * channels, tl.sum(tl.where(inside, tl.exp(x), 0.0), axis=AXIS).to(tl.float64), mask=stored)
    tl.store(at + 3 * channels, tl.sum(weight, axis=AXIS).to(tl.float64), mask=stored)
    divergence = tl.sum(tl.where(inside, weight * (y - x), 0.0), axis=AXIS)
    tl.store(at + 4 * channels, divergence.to(tl.float64), mask=stored)


@triton.jit
def store_gradient(
    results, pair, size, INVERSE: tl.constexpr, DTYPE: tl.constexpr, ALIGN: tl.constexpr, AXIS: tl.constexpr
):
    """Store the tile of the student's gradient: 0 of equal maps, because nothing is contracted."""
    normalisers, gradient, grad = results
    if AXIS == 1:
        channel, channels = pair.row, size.rows
    else:
        channel, channels = pair.col, size.cols
    at, inside = normalisers + pair.image * NORMALISERS * channels + channel, channel < channels
    of_student = softmax(pair.student.to(DTYPE), at, channels, inside, INVERSE, AXIS)
    of_teacher = softmax(pair.teacher.to(DTYPE), at + 2 * channels, channels, inside, INVERSE, AXIS)
    scale = tl.load(grad + size.slot).to(tl.float64) / (INVERSE * (size.images * channels).to(tl.float64))
    row, col = pair.row[:, None], pair.col[None, :]
    at = tile_pointers(gradient, pair.image, size.rows * size.cols, size.cols, row, col, ALIGN, False)
    value = scale.to(DTYPE) * (of_student - of_teacher)
    store_rounded(at, value, pair.row_inside[:, None] & pair.col_inside[None, :])


@triton.jit
def softmax(x, at, channels, inside, INVERSE: tl.constexpr, AXIS: tl.constexpr):
    """Return the softmax of a tile; at ``at`` lies each channel's maximum, behind those one over each channel's sum."""
    peak = tl.expand_dims(tl.load(at, mask=inside, other=0.0), AXIS)
    factor = tl.expand_dims(tl.load(at + channels, mask=inside, other=0.0), AXIS)
    return factor * tl.exp((x - peak) * INVERSE)


def _level(student: Tensor, teacher: Tensor, outputs: tuple[Tensor, ...], slot: int, first: int) -> Level:
    return channel_level(student, teacher, outputs, Sizes, student.shape[0], slot, first)


def _launch(kernel, levels: list[Level], shared: Tensor, temperature: float) -> None:
    constants = []
    for level in levels:
        dtype = tl.float64 if accumulation_dtype(*level.pointers[:2]) == torch.float64 else tl.float32
        constants.append({**channel_constants(matrix_view(level.pointers[0])), "DTYPE": dtype})
    # Without fused products the gradient of equal maps is 0.
    options = {"num_warps": CHANNEL_WARPS, "enable_fp_fusion": False}
    launch_by_constants(kernel, levels, constants, shared, INVERSE=1 / temperature, **options)


def channel_divergence_forward(students: list[Tensor], teachers: list[Tensor], temperature: float) -> list[Tensor]:
    """Each level's loss, ``(levels,)``, then its normalisers ``(N, 4, C)`` for backward.

    Args:
        students, teachers: ``(N, C, H, W)``.
        temperature: tau.
    """
    tiles = [triton.cdiv(student.shape[2] * student.shape[3], PIXELS) for student in students]  # of an image
    channels = [student.shape[0] * student.shape[1] for student in students]  # of all images
    counts = [PARTS.value * count * width for count, width in zip(tiles, channels, strict=True)]
    *firsts, part_count = accumulate(counts, initial=0)
    *slots, channel_count = accumulate(channels, initial=0)
    parts = students[0].new_empty(part_count, dtype=torch.float64)
    losses = students[0].new_empty(channel_count, dtype=torch.float64)
    normalisers = []
    for student, teacher in zip(students, teachers, strict=True):
        shape = (student.shape[0], NORMALISERS.value, student.shape[1])
        normalisers.append(student.new_empty(shape, dtype=accumulation_dtype(student, teacher)))
    places = zip(students, teachers, firsts, strict=True)
    levels = [_level(student, teacher, (), 0, first) for student, teacher, first in places]
    _launch(reduce_tiles, levels, parts, temperature)
    joined = []
    for student, result, count, slot, first in zip(students, normalisers, tiles, slots, firsts, strict=True):
        blocks = triton.cdiv(student.shape[1], CHANNELS)
        sizes = JoinSizes(student.shape[1], count, blocks, slot, first)
        joined.append(Level(student.shape[0] * blocks, (result,), sizes))
    launch(join_tiles, joined, parts, losses, INVERSE=1 / temperature, BLOCK=CHANNELS, STEP=TILES)
    sums = add_partial_sums(losses, channels)
    counted = [temperature**2 / max(count, 1) for count in channels]
    scales = torch.stack([sums.new_full((), each) for each in counted])
    return [(sums * scales).to(accumulation_dtype(*students, *teachers)), *normalisers]


def channel_divergence_backward(
    students: list[Tensor],
    teachers: list[Tensor],
    normalisers: list[Tensor],
    temperature: float,
    grad: Tensor,  # (levels,)
) -> list[Tensor]:
    """Gradient of each level's student."""
    gradients = [empty_gradient(student) for student in students]
    outputs = zip(normalisers, gradients, strict=True)
    levels = [
        _level(student, teacher, output, slot, 0)
        for slot, (student, teacher, output) in enumerate(zip(students, teachers, outputs, strict=True))
    ]
    _launch(divergence_gradients, levels, grad, temperature)
    return gradients
