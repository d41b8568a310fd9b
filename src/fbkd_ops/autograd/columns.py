"""The flat lists of tensors that functions of autograd take, as one list per argument."""

from collections.abc import Sequence
from typing import TypeVar

__all__ = ["columns"]

T = TypeVar("T")


def columns(values: Sequence[T], count: int) -> list[list[T]]:
    """Return ``values`` in lists of ``count`` entries, one per level: first all students, then all teachers, ..."""
    return [list(values[first : first + count]) for first in range(0, len(values), count)]
