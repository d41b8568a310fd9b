"""One teacher, or several by name, each with what is its own among the arguments of a distiller."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .._validation import did_you_mean
from .feature_tap import unwrapped
from .loss_dict import LossDict, needs_of
from .placement import checked_placement
from .teacher_scores import ScoreFunction, checked_score_function
from .teacher_side import TeacherSide

__all__ = ["ONLY", "Device", "Dtype", "named_teachers", "teacher_sides"]

Device = torch.device | str | int | None
Dtype = torch.dtype | str | None

ONLY = ""  # the name of a teacher that is the only one


def named_teachers(teacher: Any, loss: Any) -> dict[str, nn.Module]:
    """Return the teachers by name.

    Raises:
        TypeError: one that is no module.
        ValueError: names that are not those of the losses.
    """
    # A backbone may be of a subclass of ModuleDict.
    if not isinstance(teacher, Mapping) and type(teacher) is not nn.ModuleDict:
        return {ONLY: _checked(teacher, "teacher")}
    names, losses = list(teacher), list(loss) if isinstance(loss, (Mapping, nn.ModuleDict)) else None
    if not names or losses is None or set(losses) != set(names):
        found = "one loss" if losses is None else f"losses called {', '.join(map(repr, losses)) or 'nothing'}"
        raise ValueError(
            f"loss must be a dict with a loss for each teacher ({', '.join(map(repr, names)) or 'there is none'}), "
            f"got {found}"
        )
    return {name: _checked(each, f"teacher[{name!r}]") for name, each in teacher.items()}


def _checked(teacher: Any, name: str) -> nn.Module:
    if not isinstance(teacher, nn.Module):
        hint = ": its module() is one" if isinstance(teacher, torch.export.ExportedProgram) else ""
        raise TypeError(f"{name} must be a torch.nn.Module, got {type(teacher).__name__}{hint}")
    return teacher


def teacher_sides(
    student: nn.Module, teachers: Mapping[str, nn.Module], loss: nn.Module, default_layers: Any, **settings: Any
) -> dict[str, TeacherSide]:
    """Return each teacher's part of a step.

    Args:
        student: the detector.
        teachers: by name.
        loss: of the only teacher, or a :class:`LossDict` with a loss for each.
        default_layers: of a teacher without ``teacher_layers``.
        **settings: the distiller's arguments ``teacher_layers``, ``teacher_entry``, ``teacher_input``,
            ``teacher_device``, ``teacher_dtype`` and ``teacher_scores``.
    """
    if ONLY not in teachers and isinstance(default_layers, Mapping) and set(default_layers) <= set(teachers):
        raise ValueError(
            "student_layers is for all teachers, got a dict by teacher: tap all layers that one of them needs, and let "
            "student_levels choose for each"
        )
    sides = {}
    for name, teacher in teachers.items():
        own = {key: _of(value, name, teachers, key) for key, value in settings.items()}
        layers = own["teacher_layers"]
        sides[name] = TeacherSide(
            student,
            teacher,
            default_layers if layers is None else layers,
            own["teacher_entry"],
            own["teacher_input"],
            _score_function(_loss_of(loss, name), teacher, own["teacher_scores"]),
            checked_placement(own["teacher_device"], own["teacher_dtype"]),
        )
    _check_places(sides)
    return sides


def _check_places(sides: Mapping[str, TeacherSide]) -> None:
    """Refuse one module under two names with two places or dtypes."""
    places: dict[nn.Module, tuple[str, Any]] = {}
    for name, side in sides.items():
        for argument, module in (("teacher", side.teacher), ("teacher_input", side.teacher_input)):
            if not isinstance(module, nn.Module):
                continue
            other, placement = places.setdefault(module, (name, side.placement))
            if placement != side.placement:
                raise ValueError(
                    f"{argument}[{other!r}] and {argument}[{name!r}] are one module, so they have one teacher_device "
                    "and one teacher_dtype; a copy, copy.deepcopy(...), may have others"
                )


def _of(value: Any, name: str, teachers: Mapping[str, nn.Module], argument: str) -> Any:
    """Return what an argument says of one teacher: an entry of a dict by teacher, or what is for all of them."""
    if ONLY in teachers or not isinstance(value, Mapping):
        return value
    unknown = [each for each in value if each not in teachers]
    hint = "".join(did_you_mean(each, list(teachers)) for each in unknown[:1])
    # Layers may be a dict for all teachers, and so may the two normalisations of an input.
    is_for_all = len(unknown) == len(value) and argument in ("teacher_layers", "teacher_input") and not hint
    if unknown and not is_for_all:
        known = ", ".join(map(repr, teachers))
        raise ValueError(f"{argument} names the teacher {unknown[0]!r}, but there are {known}{hint}")
    return value if is_for_all else value.get(name)


def _loss_of(loss: nn.Module, name: str) -> nn.Module:
    losses = unwrapped(loss)
    return losses[name] if name != ONLY and isinstance(losses, LossDict) else loss


def _score_function(loss: nn.Module, teacher: nn.Module, function: Any) -> ScoreFunction | None:
    """Return what makes the teacher's scores for a loss that needs them."""
    if "scores" in needs_of(loss):
        return checked_score_function(teacher, function)
    if function is not None:
        raise ValueError("teacher_scores is for a loss that needs them, such as ScoreWeightedLoss; this one does not")
    return None
