"""Triton kernels of the attention masks: softmaxes over all but the batch dimension.

Each tile's maximum and its sum of exponentials first; then every tile of the mask is written by a program that
combines those of its image itself, which costs less than a third launch.
"""

import struct

import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulation_dtype
from .pyramid import Level, find_level, find_tile, launch, pick, pick_sizes

__all__ = ["attention_masks"]

BLOCK = 1024
# Tiles whose maxima and sums are combined in one step.
TILES = 64
# A level's code path: which maps its softmaxes are taken of.
TEACHER, JOINT, AVERAGE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def sum_exponentials(
    student,  # a level: (images, length)
    teacher,  # a level: (images, length)
    mask,  # a level: (images, length)
    partials,  # a level: maximum and sum of each map's tiles, (images, maps, 2, tiles)
    sizes,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    maps = pick(student, level), pick(teacher, level), pick(mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            sum_tile(maps, pick(partials, level), program, size, PATHS[index], BLOCK)


@triton.jit
def sum_tile(maps, partials, program, size, PATH: tl.constexpr, BLOCK: tl.constexpr):
    length, images, tiles, temperature = unpack_sizes(size, partials.dtype.element_ty)
    _, image, tile = find_tile(program, images, tiles)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    for which in tl.static_range(2 if PATH == AVERAGE else 1):
        value = load_map(maps, image * length + at, at < length, which, PATH)
        peak = tl.max(value)
        # Only -inf: 0 in place of the peak gives exponentials of 0, not NaN. A NaN or +inf makes the sum NaN.
        exponentials = tl.exp((value - tl.where(peak == -float("inf"), 0.0, peak)) / temperature)
        to = partials + tile_offset(image, which, tiles, PATH) + tile
        tl.store(to, peak)
        tl.store(to + tiles, tl.sum(exponentials))


@triton.jit
def write_masks(
    student,  # a level: (images, length)
    teacher,  # a level: (images, length)
    mask,  # a level: (images, length)
    partials,  # a level: maximum and sum of each map's tiles, (images, maps, 2, tiles)
    sizes,
    PATHS: tl.constexpr,
    BLOCK: tl.constexpr,
    TILES: tl.constexpr,
):
    level, path, program = find_level(sizes)
    size = pick_sizes(sizes, level)
    maps = pick(student, level), pick(teacher, level), pick(mask, level)
    for index in tl.static_range(len(PATHS)):
        if path == PATHS[index]:
            write_tile(maps, pick(partials, level), program, size, PATHS[index], BLOCK, TILES)


@triton.jit
def write_tile(maps, partials, program, size, PATH: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr):
    _, _, mask = maps
    dtype: tl.constexpr = mask.dtype.element_ty
    length, images, tiles, temperature = unpack_sizes(size, dtype)
    _, image, tile = find_tile(program, images, tiles)
    at = tile * BLOCK + tl.arange(0, BLOCK)
    inside = at < length
    share = tl.zeros((BLOCK,), dtype)
    for which in tl.static_range(2 if PATH == AVERAGE else 1):
        value = load_map(maps, image * length + at, inside, which, PATH)
        peak, total = combine_tiles(partials + tile_offset(image, which, tiles, PATH), tiles, temperature, TILES)
        share += tl.exp((value - peak) / temperature) / total
    if PATH == AVERAGE:
        share /= 2
    tl.store(mask + image * length + at, length.to(dtype) * share, mask=inside)


@triton.jit
def combine_tiles(partials, tiles, temperature, TILES: tl.constexpr):
    """Maximum of a whole map, and the sum of its exponentials relative to that."""
    peaks = tl.full((TILES,), -float("inf"), partials.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        peaks = tl.maximum(peaks, tl.load(partials + tile, mask=tile < tiles, other=-float("inf")))
    peak = tl.max(peaks)
    total = tl.zeros((TILES,), partials.dtype.element_ty)
    for first in range(0, tiles, TILES):
        tile = first + tl.arange(0, TILES)
        tile_peak = tl.load(partials + tile, mask=tile < tiles, other=-float("inf"))
        tile_sum = tl.load(partials + tiles + tile, mask=tile < tiles, other=0.0)
        total += tile_sum * tl.exp((tile_peak - peak) / temperature)
    return peak, tl.sum(total)


@triton.jit
def load_map(maps, at, inside, which: tl.constexpr, PATH: tl.constexpr):
    """Return a map whose softmax is taken; -inf outside."""
    student, teacher, mask = maps
    source = student if which == 1 else teacher
    value = tl.load(source + at, mask=inside, other=-float("inf")).to(mask.dtype.element_ty)
    if PATH == JOINT:
        value += tl.load(student + at, mask=inside, other=0.0).to(mask.dtype.element_ty)
    return value


@triton.jit
def tile_offset(image, which: tl.constexpr, tiles, PATH: tl.constexpr):
    """Where the maxima of the tiles of an image's map lie; their sums follow them."""
    return (image * (2 if PATH == AVERAGE else 1) + which) * 2 * tiles


@triton.jit
def unpack_sizes(size, dtype: tl.constexpr):
    length, images, tiles, high, low = size
    temperature = ((high << 32) + low).to(tl.float64, bitcast=True)
    return length, images, tiles, temperature.to(dtype)


def _level(student: Tensor | None, teacher: Tensor, mask: Tensor, temperature: float, joint: bool) -> Level:
    images, path = teacher.shape[0], TEACHER if student is None else JOINT if joint else AVERAGE
    length = teacher.numel() // max(images, 1)
    tiles = triton.cdiv(length, BLOCK)
    partials = mask.new_empty(4 * images * tiles)
    # A float among the arguments would reach the kernel as float32.
    low, high = struct.unpack("<II", struct.pack("<d", temperature))
    pointers = teacher if student is None else student, teacher, mask, partials
    return Level(images * tiles, pointers, (length, images, tiles, high, low), path.value)


def attention_masks(
    students: list[Tensor | None],  # (N, ...), None for a mask of the teacher alone
    teachers: list[Tensor],  # (N, ...)
    temperatures: list[float],
    joint: list[bool],
) -> list[Tensor]:
    """One mask from each pair of attention maps; inputs are contiguous."""
    dtypes = [
        accumulation_dtype(t) if s is None else accumulation_dtype(s, t)
        for s, t in zip(students, teachers, strict=True)
    ]
    masks = [teacher.new_empty(teacher.shape, dtype=dtype) for teacher, dtype in zip(teachers, dtypes, strict=True)]
    levels = [_level(*level) for level in zip(students, teachers, masks, temperatures, joint, strict=True)]
    launch(sum_exponentials, levels, BLOCK=BLOCK)
    launch(write_masks, levels, BLOCK=BLOCK, TILES=TILES)
    return masks
