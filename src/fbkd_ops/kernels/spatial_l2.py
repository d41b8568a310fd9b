"""Triton kernel of the squared distance of a 3x3 convolution of one channel to a target, and of all its gradients.

A program takes a block of an image's pixels. It loads what surrounds them once, 5x5 values a pixel, from which it makes
the residual e of the pixels and of their eight neighbours: the student's gradient needs both. Without gradients 3x3
values and one residual are enough.
"""

import triton
import triton.language as tl
from torch import Tensor

from .._numerics import accumulation_dtype
from .pyramid import Level, add_partial_sums, find_level, find_tile, launch, pick, pick_all, pick_sizes

__all__ = ["spatial_l2"]

BLOCK = 256
# The sum of squares, its derivatives by the nine weights, and by the bias.
SUMS = 11


@triton.jit
def spatial_sums(
    student,  # a level: (N, H, W)
    weight,  # a level: (3, 3)
    bias,  # a level: (1,)
    teacher,  # a level: (N, H, W)
    student_gradient,  # a level: (N, H, W), written where GRADIENT
    partials,  # level by level: (sums, programs)
    sizes,
    PATHS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    level, _, program = find_level(sizes)
    images, height, width, tiles, first, programs = pick_sizes(sizes, level)
    s, w, b, t = pick_all((student, weight, bias, teacher), level)
    _, image, tile = find_tile(program, images, tiles)
    start = image * height * width
    height, width = height.to(tl.int32), width.to(tl.int32)
    pixel = tile.to(tl.int32) * BLOCK + tl.arange(0, BLOCK)
    place = pixel // width, pixel % width, height, width
    w, b = load_all(w, 9), tl.load(b)
    to = partials + first + program
    if GRADIENT:
        around = load_around(s + start, place, 2)
        gradient = tl.zeros((BLOCK,), t.dtype.element_ty)
        for k in tl.static_range(9):
            gradient += w[8 - k] * residual(around, t + start, w, b, place, k // 3 - 1, k % 3 - 1, 2)
        tl.store(pick(student_gradient, level) + start + pixel, -2 * gradient, mask=pixel < height * width)
        error = residual(around, t + start, w, b, place, 0, 0, 2)
        for k in tl.static_range(9):
            store_sum(to + (1 + k) * programs, -2 * error * around[neighbour(k, 0, 0, 2)])
        store_sum(to + 10 * programs, -2 * error)
    else:
        error = residual(load_around(s + start, place, 1), t + start, w, b, place, 0, 0, 1)
    store_sum(to, error * error)


@triton.jit
def load_all(x, COUNT: tl.constexpr):
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(x + k),)
    return values


@triton.jit
def load_at(x, place, DOWN: tl.constexpr, RIGHT: tl.constexpr):
    """Elements of a map beside each pixel, zeros outside the image; and which are inside."""
    row, col, height, width = place
    row, col = row + DOWN, col + RIGHT
    inside = (row >= 0) & (row < height) & (col >= 0) & (col < width)
    return tl.load(x + row * width + col, mask=inside, other=0.0), inside


@triton.jit
def load_around(x, place, RADIUS: tl.constexpr):
    """Elements of the square around each pixel, row by row."""
    values = ()
    for i in tl.static_range(2 * RADIUS + 1):
        for j in tl.static_range(2 * RADIUS + 1):
            value, _ = load_at(x, place, i - RADIUS, j - RADIUS)
            values = values + (value,)
    return values


@triton.constexpr_function
def neighbour(k, down, right, radius):
    """Index in a square around a pixel of the k-th pixel of the 3x3 around another one of the square."""
    return (radius + down + k // 3 - 1) * (2 * radius + 1) + radius + right + k % 3 - 1


@triton.jit
def residual(around, teacher, w, b, place, DOWN: tl.constexpr, RIGHT: tl.constexpr, RADIUS: tl.constexpr):
    """``e`` beside each pixel; zeros outside the image."""
    target, inside = load_at(teacher, place, DOWN, RIGHT)
    value = target - b
    for k in tl.static_range(9):
        value -= w[k] * around[neighbour(k, DOWN, RIGHT, RADIUS)]
    return tl.where(inside, value, 0.0)


@triton.jit
def store_sum(to, values):
    tl.store(to, tl.sum(values).to(to.dtype.element_ty))


def spatial_l2(
    students: list[Tensor],  # (N, H, W)
    weights: list[Tensor],  # (3, 3)
    biases: list[Tensor],  # (1,)
    teachers: list[Tensor],  # (N, H, W)
    gradient: bool,
) -> list[Tensor]:
    """Return every level's sums, ``(levels, 1)``, or with gradient ``(levels, 11)`` and each student's gradient."""
    sums = SUMS if gradient else 1
    gradients = [s.new_empty(s.shape) for s in students] if gradient else []
    levels, first = [], 0
    for s, *others, ds in zip(students, weights, biases, teachers, gradients or students, strict=True):
        images, height, width = s.shape
        tiles = triton.cdiv(height * width, BLOCK)
        programs = images * tiles
        levels.append(Level(programs, (s, *others, ds), (images, height, width, tiles, first, programs)))
        first += sums * programs
    partials = students[0].new_empty(first, dtype=accumulation_dtype(*students))
    launch(spatial_sums, levels, partials, GRADIENT=gradient, BLOCK=BLOCK)
    result = add_partial_sums(partials, [level.programs for level in levels], sums)
    return [result.view(len(levels), sums), *gradients]
