"""What a distiller is made with where its layers are found by themselves."""

from typing import Any

import torch
from torch import nn

from .._validation import check_choice
from ..losses.registry import LOSSES
from ..presets import PresetName, size_free_weights
from .pyramids import Pyramid, find_pyramid, levels_by_stride

__all__ = ["proposal"]

SHARE = 0.5  # of the recipe in docs/study.md


def proposal(
    student: nn.Module, teacher: nn.Module, loss: str, preset: PresetName, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a :class:`fbkd_ops.Distiller` but for the models, and print what was found.

    Args:
        student, teacher: detectors of known families.
        loss: the name of a loss.
        preset: of an FBKDLoss.
        settings: arguments that are given; they take the place of what would be chosen.

    Raises:
        ValueError: a model of no known family, or no stride in common.
    """
    kind = LOSSES[check_choice(loss, tuple(LOSSES), "loss")]
    students, teachers = find_pyramid(student, "student"), find_pyramid(teacher, "teacher")
    print(f"student: {students}\nteacher: {teachers}")
    pairs = levels_by_stride(students, teachers)
    widths: list[Any] = [[students.channels[s] for s, _ in pairs], [teachers.channels[t] for _, t in pairs]]
    arguments: dict[str, Any] = {}
    if loss == "FBKDLoss":
        weights = size_free_weights(preset, len(pairs), first_stride=students.strides[pairs[0][0]])
        arguments = {"preset": preset, "normalize": "mean", **weights}
    chosen = {
        "loss": kind(*widths, **arguments).to(next(student.parameters(), torch.empty(0)).device),
        "student_layers": students.layers,
        "teacher_layers": teachers.layers,
        "student_levels": [students.levels[s] for s, _ in pairs],
        "teacher_levels": [teachers.levels[t] for _, t in pairs],
        "teacher_entry": _entry(students, teachers),
        "resize": True,
        "gradient_share": SHARE,
    }
    compared = ", ".join(f"{students.levels[s]!r} with {teachers.levels[t]!r}" for s, t in pairs)
    print(f"compared: {compared}; {loss}, gradient_share={settings.get('gradient_share', SHARE)}")
    return chosen | settings


def _entry(student: Pyramid, teacher: Pyramid) -> tuple[str, str] | None:
    """Return where a teacher starts whose student resizes its images."""
    if student.entry is None:
        if teacher.entry is not None:
            raise ValueError(
                f"teacher: a {teacher.family} prepares its images by itself and the student, a {student.family}, does "
                "not: give Distiller(...) the layers yourself, with teacher_entry and teacher_input"
            )
        return None
    return student.entry, teacher.entry or ""
