"""Which of the tapped features a loss reads, and in which size."""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .._numerics import accumulation_dtype
from .._validation import Features, as_list, did_you_mean, is_int, is_list
from .teacher_scores import resized_scores

__all__ = ["Levels", "checked_levels", "chosen_levels", "matched"]

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


def matched(
    students: Features,
    teachers: Features,
    others: dict[str, Any],
    levels: tuple[Levels, Levels],
    resize: bool,
    of_loss: str = "",
) -> tuple[Features, Features, dict[str, Any]]:
    """Return what a loss reads of the features, and what else it needs.

    Args:
        students, teachers: all features.
        others: what else it needs; of these ``scores`` are one map a level of the teacher's.
        levels: of the student's and of the teacher's features.
        resize: whether the teacher's maps get the sizes of the student's.
        of_loss: behind an argument's name, in errors.
    """
    students = chosen_levels(students, levels[0], f"student_levels{of_loss}")
    teachers = chosen_levels(teachers, levels[1], f"teacher_levels{of_loss}")
    if resize:
        teachers = _resized(teachers, students)
    if "scores" in others:
        scores = chosen_levels(others["scores"], levels[1], f"teacher_levels{of_loss}")
        others = others | {"scores": resized_scores(scores, teachers) if resize else scores}
    return students, teachers, others


def _resized(teacher: Features, student: Features) -> Features:
    """Return the teacher's maps in the sizes of the student's, matched as the loss does it."""
    if isinstance(teacher, Mapping) and isinstance(student, Mapping):
        return {key: _resized_map(t, student[key]) if key in student else t for key, t in teacher.items()}
    teachers = list(teacher.values()) if isinstance(teacher, Mapping) else list(teacher)
    students = list(student.values()) if isinstance(student, Mapping) else list(student)
    if len(teachers) != len(students):
        return teacher
    return [_resized_map(t, s) for t, s in zip(teachers, students, strict=True)]


def _resized_map(teacher: Tensor, student: Tensor) -> Tensor:
    """``(N, Ct, Hs, Ws)``."""
    are_maps = all(isinstance(each, Tensor) and each.dim() == 4 for each in (teacher, student))
    size = student.shape[-2:] if are_maps else None
    if not are_maps or teacher.shape[-2:] == size:
        return teacher
    wide = teacher.to(accumulation_dtype(teacher))
    return F.interpolate(wide, size=size, mode="bilinear", align_corners=False, antialias=True)
