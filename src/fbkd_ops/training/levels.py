"""Which of the tapped features a loss reads."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from .._validation import Features, as_list, did_you_mean, is_int, is_list

__all__ = ["Levels", "checked_levels", "chosen_levels"]

Levels = Sequence[Any] | None  # indices or keys; None: all


def checked_levels(levels: Any, name: str) -> Levels:
    """Return the levels as a list of Python's own integers, or keys."""
    if levels is None:
        return None
    if not is_list(levels):
        raise TypeError(f"{name} must be a list of indices or keys, got {levels!r}")
    chosen = as_list(levels, "a list of indices or keys", name)
    for level in chosen:
        if isinstance(level, (bool, float)) or not isinstance(level, Hashable):
            raise TypeError(f"{name} must be a list of indices or keys, got {level!r} in it")
    if not chosen:
        raise ValueError(f"{name} is empty, expected at least one index or key")
    return [int(level) if is_int(level) else level for level in chosen]


def chosen_levels(features: Features, levels: Levels, name: str) -> Features:
    """Return the features of ``levels``, in a list."""
    if levels is None:
        return features
    present = list(features) if isinstance(features, Mapping) else range(-len(features), len(features))
    for level in levels:
        if level not in present:
            there = list(features) if isinstance(features, Mapping) else f"{len(features)} levels"
            raise ValueError(
                f"{name} names a level {level!r}, but the features have {there}{did_you_mean(level, present)}"
            )
    return [features[level] for level in levels]
