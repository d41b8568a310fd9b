"""Triton kernels of the masked squared difference of two feature maps of the same shape, and its gradient.

Both maps are read as pairs.py says.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import matrix_layout, matrix_view
from .._numerics import accumulation_dtype
from .pairs import load_pair, path_of_pair
from .pyramid import (
    ALIGNMENT,
    Level,
    add_partial_sums,
    find_level,
    in_place_of_none,
    launch_by_constants,
    load_mask,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
)

__all__ = ["masked_l2_backward", "masked_l2_forward"]

# 32 elements of each map a thread of 4 warps, all loaded before the first is used. 64 elements of a row, or of a
# column of a transposed teacher, are whole 128-byte lines in 16 bits. In float64 registers suffice for half of that.
_BLOCKS = {torch.float32: 64, torch.float64: 32}


class Sizes(NamedTuple):
    """A level's sizes in both kernels."""

    rows: int
    cols: int
    stride: int  # of the student, from image to image
    pitch: int
    teacher_stride: int
    teacher_pitch: int
    row_tiles: int
    col_tiles: int
    row_given: int  # whether the mask is there
    col_given: int
    slot: int  # of the level in the result
    first: int  # of the level's partial sums


class Tile(NamedTuple):
    """A tile of a level in a kernel."""

    difference: tl.tensor  # S - T
    weight: tl.tensor  # the product of the masks
    image: tl.tensor
    row: tl.tensor
    col: tl.tensor
    inside: tl.tensor


@triton.jit
def sum_squares(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    row_mask,  # a level: (images, rows)
    col_mask,  # a level: (images, cols)
    partials,  # one a program
    sizes,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Partial sums of the masked squared difference."""
    level, path, program = find_level(sizes)
    size = Sizes(*pick_sizes(sizes, level))
    tensors = pick(student, level), pick(teacher, level), pick(row_mask, level), pick(col_mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            tile = difference_tile(tensors, program, size, PATHS[index], BLOCK)
            store_sum(partials, tile, program + size.first)


@triton.jit
def difference_gradients(
    student,  # a level: (images, rows, cols)
    teacher,  # a level: (images, rows, cols)
    row_mask,  # a level: (images, rows)
    col_mask,  # a level: (images, cols)
    gradient,  # a level: (images, rows, cols), densely packed
    grad,  # (levels,)
    sizes,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write the gradients of the students, ``2 grad Ms Mc (S - T)``."""
    level, path, program = find_level(sizes)
    size = Sizes(*pick_sizes(sizes, level))
    tensors = pick(student, level), pick(teacher, level), pick(row_mask, level), pick(col_mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            tile = difference_tile(tensors, program, size, PATHS[index], BLOCK)
            store_gradient(pick(gradient, level), grad, tile, size, ALIGNMENT & PATHS[index])


@triton.jit
def difference_tile(tensors, program, size, PATH: tl.constexpr, BLOCK: tl.constexpr):
    """Return the program's Tile."""
    student, teacher, row_mask, col_mask = tensors
    pair = load_pair((student, teacher), program, size, PATH, BLOCK, BLOCK)
    dtype: tl.constexpr = row_mask.dtype.element_ty
    difference = pair.student.to(dtype) - pair.teacher.to(dtype)
    by_row = load_mask(row_mask, pair.image * size.rows + pair.row, pair.row_inside, size.row_given)
    by_col = load_mask(col_mask, pair.image * size.cols + pair.col, pair.col_inside, size.col_given)
    inside = pair.row_inside[:, None] & pair.col_inside[None, :]
    return Tile(difference, by_row[:, None] * by_col[None, :], pair.image, pair.row, pair.col, inside)


@triton.jit
def store_sum(partials, tile, at):
    """Store the tile's masked sum of squares."""
    squares = tile.difference * tile.difference * tile.weight
    tl.store(partials + at, tl.sum(squares).to(partials.dtype.element_ty))


@triton.jit
def store_gradient(gradient, grad, tile, size, ALIGN: tl.constexpr):
    """Store the tile of the student's gradient."""
    scale = 2 * tl.load(grad + size.slot).to(tile.difference.dtype)
    row, col = tile.row[:, None], tile.col[None, :]
    at = tile_pointers(gradient, tile.image, size.rows * size.cols, size.cols, row, col, ALIGN, False)
    store_rounded(at, scale * tile.weight * tile.difference, tile.inside)


def _level(
    inputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    outputs: tuple[Tensor, ...],
    slot: int,  # of the level in the result
    first: int,  # of the level's partial sums
) -> Level:
    student, teacher, *masks = inputs
    view, teacher_view = matrix_view(student), matrix_view(teacher)
    row_mask, col_mask = masks[::-1] if view.rows_are_channels else masks
    strides = view.image_stride, view.row_stride, teacher_view.image_stride, teacher_view.row_stride
    dtype = accumulation_dtype(student, teacher)
    tiles = triton.cdiv(view.rows, _BLOCKS[dtype]), triton.cdiv(view.cols, _BLOCKS[dtype])
    given = row_mask is not None, col_mask is not None
    sizes = Sizes(view.rows, view.cols, *strides, *tiles, *given, slot, first)
    read = in_place_of_none((row_mask, col_mask), student, dtype)
    path = path_of_pair(student, view, teacher, teacher_view)
    return Level(view.images * tiles[0] * tiles[1], (student, teacher, *read, *outputs), sizes, path)


def _launch(kernel, levels: list[Level], shared: Tensor) -> None:
    # The masks' dtype is that of the sums.
    launch_by_constants(kernel, levels, [{"BLOCK": _BLOCKS[level.pointers[2].dtype]} for level in levels], shared)


def masked_l2_forward(
    students: list[Tensor],  # (N, C, H, W)
    teachers: list[Tensor],  # (N, C, H, W)
    spatial_masks: list[Tensor | None],  # (N, H, W)
    channel_masks: list[Tensor | None],  # (N, C)
) -> Tensor:
    """``sum(Ms * Mc * (S - T)**2)`` of each level, ``(levels,)``."""
    levels, first = [], 0
    for slot, inputs in enumerate(zip(students, teachers, spatial_masks, channel_masks, strict=True)):
        levels.append(_level(inputs, (), slot, first))
        first += levels[-1].programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students, *teachers))
    _launch(sum_squares, levels, partials)
    return add_partial_sums(partials, [level.programs for level in levels])


def masked_l2_backward(
    students: list[Tensor],
    teachers: list[Tensor],
    spatial_masks: list[Tensor | None],
    channel_masks: list[Tensor | None],
    grad: Tensor,  # (levels,)
) -> list[Tensor]:
    """Gradient of each level's student, ``2 * grad * Ms * Mc * (S - T)``."""
    gradients = [torch.empty(s.shape, dtype=s.dtype, device=s.device, memory_format=matrix_layout(s)) for s in students]
    inputs = zip(students, teachers, spatial_masks, channel_masks, strict=True)
    levels = [_level(level, (dS,), slot, 0) for slot, (level, dS) in enumerate(zip(inputs, gradients, strict=True))]
    _launch(difference_gradients, levels, grad)
    return gradients
