"""Tiles of two feature maps of the same shape, as Triton kernels read them together.

Both maps are matrices in the first one's orientation (rows = channels or pixels, columns = the other). The second one's
layout may be the other one: its tiles are then read along their columns.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .._layout import MatrixView, matrix_view
from .pyramid import ALIGNMENT, Level, alignment, find_tile, tile_pointers, vector_length, whole_vectors

__all__ = [
    "CHANNELS",
    "CHANNEL_WARPS",
    "PIXELS",
    "TRANSPOSED",
    "PairTile",
    "channel_constants",
    "channel_level",
    "load_pair",
    "path_of_pair",
]

# A level's code path: the ALIGNMENT of both maps, and a bit that says that the teacher's tiles are transposed.
TRANSPOSED = tl.constexpr(4)
LEAST_ALIGNMENT = 2  # 8 bytes: with 4 at a time a kernel spills on sm_80
# A tile of kernels that reduce each channel: five numbers per channel are little beside 128 pixels.
CHANNELS, PIXELS, CHANNEL_WARPS = 32, 128, 8


class PairTile(NamedTuple):
    """A tile of both maps, 0 outside of them, and where it lies."""

    student: tl.tensor  # (R, C)
    teacher: tl.tensor
    image: tl.tensor
    row_tile: tl.tensor
    col_tile: tl.tensor
    row: tl.tensor  # (R,)
    col: tl.tensor  # (C,)
    row_inside: tl.tensor
    col_inside: tl.tensor


@triton.jit
def load_pair(maps, program, size, PATH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Return the program's PairTile.

    ``size`` has rows, cols, stride, pitch, teacher_stride, teacher_pitch, row_tiles and col_tiles.
    """
    student, teacher = maps
    ALIGN: tl.constexpr = ALIGNMENT & PATH
    IS_TRANSPOSED: tl.constexpr = TRANSPOSED & PATH
    image, row_tile, col_tile = find_tile(program, size.row_tiles, size.col_tiles)
    row, col = row_tile * ROWS + tl.arange(0, ROWS), col_tile * COLS + tl.arange(0, COLS)
    VECTOR: tl.constexpr = vector_length(ALIGN, student.dtype.element_ty, teacher.dtype.element_ty)
    row_inside = row < whole_vectors(size.rows, VECTOR if IS_TRANSPOSED else 1)
    col_inside = col < whole_vectors(size.cols, VECTOR)
    inside = row_inside[:, None] & col_inside[None, :]
    at = tile_pointers(student, image, size.stride, size.pitch, row[:, None], col[None, :], ALIGN, False)
    of_student = tl.load(at, mask=inside, other=0.0)
    at = tile_pointers(
        teacher, image, size.teacher_stride, size.teacher_pitch, row[:, None], col[None, :], ALIGN, IS_TRANSPOSED
    )
    of_teacher = tl.load(at, mask=inside, other=0.0)
    return PairTile(of_student, of_teacher, image, row_tile, col_tile, row, col, row_inside, col_inside)


def path_of_pair(student: Tensor, view: MatrixView, teacher: Tensor, teacher_view: MatrixView) -> int:
    """Return a level's code path."""
    transposed = teacher_view.rows_are_channels != view.rows_are_channels
    extents = (view.cols, view.rows) if transposed else (view.cols,)
    aligned = alignment(student, view.image_stride, view.row_stride, *extents)
    teacher_aligned = alignment(teacher, teacher_view.image_stride, teacher_view.row_stride, *extents)
    both = min(aligned, teacher_aligned)
    return TRANSPOSED.value * transposed + (both if both >= LEAST_ALIGNMENT else 0)


def channel_constants(view: MatrixView) -> dict[str, int]:
    """Return the tile's sizes and the axis of the pixels, for kernels that reduce each channel."""
    rows, cols = (CHANNELS, PIXELS) if view.rows_are_channels else (PIXELS, CHANNELS)
    return {"ROWS": rows, "COLS": cols, "AXIS": int(view.rows_are_channels)}


def channel_level(
    student: Tensor, teacher: Tensor, outputs: tuple[Tensor, ...], kind: Callable[..., Any], *further: int
) -> Level:
    """Return a level of such a kernel, whose sizes are ``kind`` of what :func:`load_pair` reads and of ``further``."""
    view, teacher_view = matrix_view(student), matrix_view(teacher)
    constants = channel_constants(view)
    tiles = triton.cdiv(view.rows, constants["ROWS"]), triton.cdiv(view.cols, constants["COLS"])
    strides = view.image_stride, view.row_stride, teacher_view.image_stride, teacher_view.row_stride
    sizes = kind(view.rows, view.cols, *strides, *tiles, *further)
    path = path_of_pair(student, view, teacher, teacher_view)
    return Level(view.images * tiles[0] * tiles[1], (student, teacher, *outputs), sizes, path)
