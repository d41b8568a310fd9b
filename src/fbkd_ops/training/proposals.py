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
FOUND = ("student_layers", "teacher_layers", "student_levels", "teacher_levels")


def proposal(
    student: nn.Module, teacher: nn.Module, loss: str, preset: PresetName | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of a :class:`fbkd_ops.Distiller` but for the models, and print what was found.

    Args:
        student, teacher: detectors of known families.
        loss: the name of a loss.
        preset: of an FBKDLoss.
        settings: arguments that are given; they take the place of what would be chosen.

    Raises:
        TypeError: layers or levels among the settings, a loss that is no name, a preset of another loss.
        ValueError: a model of no known family, or no stride in common.
    """
    if found := [name for name in FOUND if name in settings]:
        raise TypeError(f"for_model finds {found[0]} by itself: give Distiller(...) all layers, or none")
    if isinstance(loss, nn.Module):
        raise TypeError(
            f"for_model makes the loss itself: give its name, {type(loss).__name__!r}, or the loss to Distiller(...)"
        )
    if preset is not None and loss != "FBKDLoss":
        raise TypeError(f"preset is FBKDLoss's, and the loss is {loss}")
    kind = LOSSES[check_choice(loss, tuple(LOSSES), "loss")]
    students, teachers = find_pyramid(student, "student"), find_pyramid(teacher, "teacher")
    print(f"student: {students}\nteacher: {teachers}")
    pairs = levels_by_stride(students, teachers)
    widths: list[Any] = [[students.channels[s] for s, _ in pairs], [teachers.channels[t] for _, t in pairs]]
    arguments: dict[str, Any] = {}
    if loss == "FBKDLoss":
        preset = preset or "one_stage"
        weights = size_free_weights(preset, len(pairs), strides=[students.strides[s] for s, _ in pairs])
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
    """Return whose arguments in the student the teacher gets, and where it starts; None: the student's own.

    A student that resizes its images hands on those that it has resized. A teacher that is called with images alone
    gets what a module of the student is given that is called so.
    """
    if student.entry is not None:
        return student.entry, teacher.entry or ""
    if teacher.entry is not None:
        raise ValueError(
            f"teacher: a {teacher.family} prepares its images by itself and the student, a {student.family}, does "
            "not: give Distiller(...) the layers yourself, with teacher_entry and teacher_input"
        )
    if teacher.images != "" or student.images == "":
        return None
    if student.images is None:
        raise ValueError(
            f"teacher: a {teacher.family} is called with images alone, and no module that is called so is known of the "
            f"student, a {student.family}: give Distiller(...) the layers yourself, with "
            "teacher_entry=(path of such a module of the student, '')"
        )
    return student.images, ""
