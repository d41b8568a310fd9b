"""Which of its equal forms a relation term is computed in: the cheaper one for its sizes.

``docs/math.md`` derives both forms. The constants below were fitted on a CPU; ``benchmarks/results/cpu-small.csv`` has
the times of both, side by side, and a test holds the choice to them.
"""

from typing import NamedTuple

__all__ = ["RelationSizes", "cheaper_form"]

# Passes over the elements of a map, in multiply-adds that take as long: the cell form makes its passes
# on whole maps, the collapsed form on blocks in cache.
_CELL_PASSES, _COLLAPSED_PASSES = 400, 80
# The same for an element of the collapsed form's matrices, and for its calls whatever the sizes.
_MATRIX_PASSES, _COLLAPSED_CALLS = 100, 2e8
# In 16 bits: the share of the residual's products that is repeated in the backward pass, and conversions.
_REPEATED, _CONVERSIONS = 0.5, 40


class RelationSizes(NamedTuple):
    """What the cost of a level depends on."""

    images: int
    pixels: int  # of an image
    cells: int  # pooled pixels of an image
    student_channels: int
    teacher_channels: int
    student_inner: int
    teacher_inner: int
    repeats: bool = False  # whether the collapsed form repeats products in the backward pass, as of 16-bit maps


def cheaper_form(sizes: RelationSizes) -> str:
    """``"cells"`` or ``"collapsed"``, whichever takes fewer multiply-adds forward and backward.

    Both multiply every pixel with three ``(Ct, Cs)`` matrices and pool the same convolutions; that is left out.
    """
    return "cells" if _cell_cost(sizes) <= _collapsed_cost(sizes) else "collapsed"


def _cell_cost(sizes: RelationSizes) -> float:
    n, pixels, cells, cs, ct, inner_s, inner_t, _ = sizes
    by_pixel = cells * (3 * cs + 6 * ct) + _CELL_PASSES * (cs + ct)
    by_cell = 6 * (inner_s * cs + inner_t * ct) + 2 * cs * ct + 3 * cells * (cs + ct)
    return n * (pixels * by_pixel + cells * by_cell)


def _collapsed_cost(sizes: RelationSizes) -> float:
    n, pixels, _, cs, ct, inner_s, inner_t, repeats = sizes
    sides = (inner_s, cs), (inner_t, ct)
    covariances = sum(min(2 * inner * channels, 0.75 * channels**2) for inner, channels in sides)
    student = min(2 * inner_s * cs, cs**2)
    teacher = min(6 * inner_t * ct, 3 * ct**2)
    by_pixel = covariances + student + teacher + _COLLAPSED_PASSES * (cs + ct)
    if repeats:
        by_pixel += _REPEATED * (cs * ct + min(2 * inner_t * ct, ct**2)) + _CONVERSIONS * (cs + ct)
    by_image = 6 * inner_s * cs * ct + sum(6 * inner**2 * channels for inner, channels in sides)
    by_image += _MATRIX_PASSES * (cs * ct + cs**2 + ct**2)
    return n * (pixels * by_pixel + by_image) + _COLLAPSED_CALLS
