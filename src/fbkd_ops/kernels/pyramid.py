"""Several pyramid levels in one launch: what the kernels of a pyramid and their launchers share.

A kernel gets its pointers and sizes as tuples with one entry a level, by value, so that nothing has to be copied to
the device before the launch. A program finds its level from its index and selects that level's entries.
"""

import math
from collections.abc import Iterable
from itertools import accumulate
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "ALIGNMENT",
    "SIXTEEN_BYTES",
    "Level",
    "add_partials",
    "add_partial_sums",
    "add_tiles",
    "alignment",
    "find_level",
    "find_tile",
    "in_place_of_none",
    "launch",
    "load_mask",
    "pick",
    "pick_all",
    "pick_sizes",
    "scaled_gradient",
    "store_rounded",
    "tile_pointers",
    "vector_length",
    "whole_vectors",
]

# Kernel parameters are limited to 4 KB, 8 bytes each; this leaves room for those that the levels share.
MAX_PARAMETERS = 480
# Triton compiles anew, and may lay out a tile differently, for an integer that is 1, that is divisible by 16 or that
# needs 64 bits. Sizes are passed as 2 * (size + SIZE_OFFSET) + 1, so that it never does: one compilation serves all
# sizes, and a level's order of summation does not depend on the other levels.
SIZE_OFFSET = tl.constexpr(1 << 33)
PARTIALS = 2048  # added in one step
# The last two bits of a level's code path: 1 to 3 where all that is read or written starts, row by row, on boundaries
# of 4, 8 or 16 bytes, so that so many are moved at a time; 0 where elements of 2 bytes are moved one by one.
ALIGNMENT = SIXTEEN_BYTES = tl.constexpr(3)


class Level(NamedTuple):
    """One level's share of a launch."""

    programs: int
    pointers: tuple[Tensor, ...]
    sizes: tuple[int, ...]
    path: int = 0  # which of a kernel's code paths the level takes


def launch(kernel, levels: list[Level], *shared: Tensor, by_path: bool = False, **constants) -> None:
    """``kernel(*pointers, *shared, sizes, PATHS)`` for all levels: one launch for each combination of dtypes.

    More levels than fit the parameters, at least 15, take another launch. So do, where ``by_path`` says so, levels of
    another code path: a kernel that fills the registers with one path spills with two of them.
    """
    groups: dict[tuple[tuple[torch.dtype, ...], int], list[Level]] = {}
    for level in levels:
        if level.programs:
            dtypes = tuple(tensor.dtype for tensor in level.pointers)
            groups.setdefault((dtypes, level.path if by_path else 0), []).append(level)
    for group in groups.values():
        most = MAX_PARAMETERS // (len(group[0].pointers) + len(group[0].sizes) + 2)
        for first in range(0, len(group), most):
            _launch_once(kernel, group[first : first + most], shared, constants)


def launch_by_constants(kernel, levels: list[Level], constants: list[dict], *shared: Tensor, **common) -> None:
    """Launch a kernel by code path, and with each level's own constants: levels that agree in both share a launch."""
    groups: dict[tuple, list[Level]] = {}
    for level, own in zip(levels, constants, strict=True):
        groups.setdefault(tuple(own.items()), []).append(level)
    for agreed, group in groups.items():
        launch(kernel, group, *shared, by_path=True, **dict(agreed), **common)


def _launch_once(kernel, levels: list[Level], shared: tuple[Tensor, ...], constants: dict):
    """Launch a kernel for all levels, and return what Triton compiled."""
    programs = [level.programs for level in levels]
    *firsts, total = accumulate(programs, initial=0)
    paths = [level.path for level in levels]
    columns = (firsts, paths, *zip(*(level.sizes for level in levels), strict=True))
    sizes = tuple(tuple(2 * (size + SIZE_OFFSET.value) + 1 for size in column) for column in columns)
    pointers = tuple(zip(*(level.pointers for level in levels), strict=True))
    with torch.cuda.device_of((*levels[0].pointers, *shared)[0]):
        return kernel[(total,)](*pointers, *shared, sizes, PATHS=tuple(sorted(set(paths))), **constants)


def in_place_of_none(tensors: Iterable[Tensor | None], like: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """Return the tensors, with one that is never read in place of each None."""
    dummy = None
    result = []
    for tensor in tensors:
        if tensor is None:
            tensor = dummy = like.new_empty(1, dtype=dtype) if dummy is None else dummy
        result.append(tensor)
    return result


def alignment(x: Tensor, *strides: int) -> int:
    """Return the ALIGNMENT of ``x`` and of every multiple of the strides from it."""
    size = x.element_size()
    at_once = math.gcd(16, x.data_ptr(), *(stride * size for stride in strides))
    return max(at_once.bit_length() - 2, 0)


@triton.jit
def pick(values, level):
    """Return the level's entry of a tuple."""
    chosen = values[0]
    for index in tl.static_range(1, len(values)):
        chosen = tl.where(level == index, values[index], chosen)
    return chosen


@triton.jit
def pick_all(tuples, level):
    """Return the level's entry of each tuple."""
    return [pick(values, level) for values in tuples]


@triton.jit
def decoded(size):
    return (size >> 1) - SIZE_OFFSET


@triton.jit
def pick_size(values, level):
    return decoded(pick(values, level))


@triton.jit
def pick_sizes(sizes, level):
    """Return the level's sizes, in int64."""
    return [pick_size(values, level) for values in sizes[2:]]


@triton.jit
def find_level(sizes):
    """Return the program's level, that level's code path, and the program's index among the level's programs."""
    program = tl.program_id(0)
    firsts = sizes[0]
    level = 0
    for index in tl.static_range(1, len(firsts)):
        level = tl.where(program >= decoded(firsts[index]), index, level)
    return level, pick_size(sizes[1], level), program - pick_size(firsts, level).to(tl.int32)


@triton.jit
def find_tile(program, row_tiles, col_tiles):
    """Image, tile of rows and tile of columns, in int64, of a level's program; divided in 32 bits, which is fast."""
    row_tiles, col_tiles = row_tiles.to(tl.int32), col_tiles.to(tl.int32)
    row_tile, col_tile = program // col_tiles, program % col_tiles
    return (row_tile // row_tiles).to(tl.int64), (row_tile % row_tiles).to(tl.int64), col_tile.to(tl.int64)


@triton.constexpr_function
def bytes_at_once(ALIGN):
    """Return what an ALIGNMENT stands for."""
    return 2 << ALIGN


@triton.constexpr_function
def vector_length(ALIGN, *dtypes):
    """Elements of the narrowest of the dtypes that are moved at a time."""
    return max((16 << ALIGN) // min(dtype.primitive_bitwidth for dtype in dtypes), 1)


@triton.jit
def whole_vectors(size, VECTOR: tl.constexpr):
    """``size``, known to the compiler to be a multiple of VECTOR."""
    if VECTOR > 1:
        size = size // VECTOR * VECTOR
    return size


@triton.jit
def tile_pointers(
    x,
    image,
    image_stride,
    pitch,
    row,  # (R, 1)
    col,  # (1, C)
    ALIGN: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Pointers to a tile ``(R, C)`` of an image, its rows side by side, or (TRANSPOSED) its columns.

    ALIGN is the ALIGNMENT of the image and of its rows (or columns). The compiler is told of new values, which only
    this path uses: a hint on ``x`` or ``pitch`` would hold for the other paths too.
    """
    at, pitch = x + image * image_stride, pitch.to(tl.int64)
    if ALIGN:
        at = tl.multiple_of(at, bytes_at_once(ALIGN))
        pitch = whole_vectors(pitch, vector_length(ALIGN, x.dtype.element_ty))
    if TRANSPOSED:
        return at + col * pitch + row
    return at + row * pitch + col


@triton.jit
def load_mask(mask, at, inside, given):
    """Elements of an optional mask: ones where it is absent."""
    return tl.load(mask + at, mask=inside & (given != 0), other=1.0)


@triton.jit
def add_tiles(partials, tiles, length, inside, TILES: tl.constexpr, OUTPUTS: tl.constexpr):
    """Return the sums over all tiles of each output's partial sums."""
    total = tl.zeros((TILES, OUTPUTS), partials.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        both = (tile < tiles)[:, None] & inside[None, :]
        total += tl.load(partials[None, :] + tile[:, None] * length, mask=both, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def scaled_gradient(grad, at, inside, given, count):
    """Gradient of one element of a mean; zeros where the gradient is absent."""
    return tl.load(grad + at, mask=inside & (given != 0), other=0.0) / count.to(grad.dtype.element_ty)


@triton.jit
def store_rounded(at, value, inside):
    """Store in the pointers' dtype.

    To 16 bits by way of float32: PyTorch rounds a float64 so, and the interpreter has no conversion from float64 to
    bfloat16.
    """
    if at.dtype.scalar.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    tl.store(at, value.to(at.dtype.scalar.element_ty), mask=inside)


@triton.jit
def add_partials(partials, result, sizes, PATHS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up a slot's partial sums, in float64 and in a fixed order."""
    level, _, program = find_level(sizes)
    first, count, slot = pick_sizes(sizes, level)
    first += program * count
    total = tl.zeros((BLOCK,), tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        total += tl.load(partials + first + at, mask=at < count, other=0.0).to(tl.float64)
    tl.store(result + slot + program, tl.sum(total, axis=0).to(result.dtype.element_ty))


def add_partial_sums(partials: Tensor, counts: list[int], sums: int = 1) -> Tensor:
    """Each level's sums ``(levels * sums,)``; a level has ``count`` partials of its first sum, then of the next."""
    result = partials.new_empty(len(counts) * sums)
    *firsts, _ = accumulate((count * sums for count in counts), initial=0)
    slots = range(0, len(result), sums)
    levels = [Level(sums, (), sizes) for sizes in zip(firsts, counts, slots, strict=True)]
    launch(add_partials, levels, partials, result, BLOCK=PARTIALS)
    return result
