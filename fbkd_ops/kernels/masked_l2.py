"""Triton kernels of the masked squared difference of two feature maps of the same shape, and its gradient.

Both maps are matrices in the student's orientation (rows = channels or pixels, columns = the other). The teacher's
layout may be the other one: its tiles are then read along their columns.
"""

from typing import Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._layout import MatrixView, matrix_layout, matrix_view
from .._numerics import accumulation_dtype
from .pyramid import (
    Level,
    add_partial_sums,
    aligned_to_16_bytes,
    find_level,
    find_tile,
    in_place_of_none,
    launch,
    load_mask,
    pick,
    pick_sizes,
    store_rounded,
    tile_pointers,
    vector_length,
    whole_vectors,
)

__all__ = ["masked_l2_backward", "masked_l2_forward"]

# 32 elements of each map a thread of 4 warps, all loaded before the first is used. 64 elements of a row, or of a
# column of a transposed teacher, are whole 128-byte lines in 16 bits. In float64 registers suffice for half of that.
_BLOCKS = {torch.float32: 64, torch.float64: 32}
# A level's code path: 1 where both maps are read 16 bytes at a time, plus 2 where the teacher's tiles are transposed.


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
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    tensors = pick(student, level), pick(teacher, level), pick(row_mask, level), pick(col_mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            tile = difference_tile(tensors, program, size, PATHS[index], BLOCK)
            store_sum(partials, tile, program + size[11])


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
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    tensors = pick(student, level), pick(teacher, level), pick(row_mask, level), pick(col_mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            tile = difference_tile(tensors, program, size, PATHS[index], BLOCK)
            store_gradient(pick(gradient, level), grad, tile, size, PATHS[index] % 2)


@triton.jit
def difference_tile(tensors, program, size, PATH: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of ``S - T``, of the product of the masks, and where the tile lies."""
    student, teacher, row_mask, col_mask = tensors
    rows, cols, image_stride, pitch, teacher_image_stride, teacher_pitch = size[:6]
    row_tiles, col_tiles, row_given, col_given = size[6:10]
    image, row_tile, col_tile = find_tile(program, row_tiles, col_tiles)
    row, col = row_tile * BLOCK + tl.arange(0, BLOCK), col_tile * BLOCK + tl.arange(0, BLOCK)
    VECTOR: tl.constexpr = vector_length(student.dtype.element_ty, teacher.dtype.element_ty)
    row_inside = row < whole_vectors(rows, PATH == 3, VECTOR)
    col_inside = col < whole_vectors(cols, PATH % 2, VECTOR)
    inside = row_inside[:, None] & col_inside[None, :]
    at = tile_pointers(student, image, image_stride, pitch, row[:, None], col[None, :], PATH % 2, False)
    value = tl.load(at, mask=inside, other=0.0)
    at = tile_pointers(
        teacher, image, teacher_image_stride, teacher_pitch, row[:, None], col[None, :], PATH % 2, PATH >= 2
    )
    dtype: tl.constexpr = row_mask.dtype.element_ty
    difference = value.to(dtype) - tl.load(at, mask=inside, other=0.0).to(dtype)
    by_row = load_mask(row_mask, image * rows + row, row_inside, row_given)
    by_col = load_mask(col_mask, image * cols + col, col_inside, col_given)
    return difference, by_row[:, None] * by_col[None, :], image, row, col, inside


@triton.jit
def store_sum(partials, tile, at):
    difference, weight = tile[:2]
    tl.store(partials + at, tl.sum(difference * difference * weight).to(partials.dtype.element_ty))


@triton.jit
def store_gradient(gradient, grad, tile, size, ALIGNED: tl.constexpr):
    difference, weight, image, row, col, inside = tile
    rows, cols, slot = size[0], size[1], size[10]
    scale = 2 * tl.load(grad + slot).to(difference.dtype)
    at = tile_pointers(gradient, image, rows * cols, cols, row[:, None], col[None, :], ALIGNED, False)
    store_rounded(at, scale * weight * difference, inside)


def _path(student: Tensor, view: MatrixView, teacher: Tensor, teacher_view: MatrixView) -> int:
    transposed = teacher_view.rows_are_channels != view.rows_are_channels
    extents = (view.cols, view.rows) if transposed else (view.cols,)
    aligned = aligned_to_16_bytes(student, view.image_stride, view.row_stride, *extents) and aligned_to_16_bytes(
        teacher, teacher_view.image_stride, teacher_view.row_stride, *extents
    )
    return 2 * transposed + aligned


def _level(
    inputs: tuple[Tensor, Tensor, Optional[Tensor], Optional[Tensor]],
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
    sizes = view.rows, view.cols, *strides, *tiles, row_mask is not None, col_mask is not None, slot, first
    masks = in_place_of_none((row_mask, col_mask), student, dtype)
    path = _path(student, view, teacher, teacher_view)
    return Level(view.images * tiles[0] * tiles[1], (student, teacher, *masks, *outputs), sizes, path)


def _launch(kernel, levels: list[Level], shared: Tensor) -> None:
    for dtype, block in _BLOCKS.items():
        chosen = [level for level in levels if level.pointers[2].dtype == dtype]  # the masks' dtype
        launch(kernel, chosen, shared, by_path=True, BLOCK=block)


def masked_l2_forward(
    students: list[Tensor],  # (N, C, H, W)
    teachers: list[Tensor],  # (N, C, H, W)
    spatial_masks: list[Optional[Tensor]],  # (N, H, W)
    channel_masks: list[Optional[Tensor]],  # (N, C)
) -> Tensor:
    """``sum(Ms * Mc * (S - T)**2)`` of each level, ``(levels,)``."""
    levels, first = [], 0
    for slot, inputs in enumerate(zip(students, teachers, spatial_masks, channel_masks)):
        levels.append(_level(inputs, (), slot, first))
        first += levels[-1].programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students, *teachers))
    _launch(sum_squares, levels, partials)
    return add_partial_sums(partials, [level.programs for level in levels])


def masked_l2_backward(
    students: list[Tensor],
    teachers: list[Tensor],
    spatial_masks: list[Optional[Tensor]],
    channel_masks: list[Optional[Tensor]],
    grad: Tensor,  # (levels,)
) -> list[Tensor]:
    """Gradient of each level's student, ``2 * grad * Ms * Mc * (S - T)``."""
    gradients = [torch.empty(s.shape, dtype=s.dtype, device=s.device, memory_format=matrix_layout(s)) for s in students]
    inputs = zip(students, teachers, spatial_masks, channel_masks)
    levels = [_level(level, (dS,), slot, 0) for slot, (level, dS) in enumerate(zip(inputs, gradients))]
    _launch(difference_gradients, levels, grad)
    return gradients
