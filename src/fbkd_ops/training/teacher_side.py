"""A teacher's part of a training step: where it starts, what it is given, where it runs, and what is read of it."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._validation import Features, check_text, is_list
from .._warnings import TeacherWatch
from .feature_tap import FeatureTap, Layer, Layers, OutputTap, find_module, is_output
from .normalization import difference, find_normalization
from .pairing import check_same_images
from .placement import Placement
from .teacher_input import TeacherInput, checked_teacher_input, first_argument, with_first_argument
from .teacher_scores import ScoreFunction, scores_of

__all__ = ["Entry", "TeacherSide", "closed_tap", "tapped"]

Entry = str | tuple[str, str] | None


class TeacherSide:
    """One teacher of a :class:`fbkd_ops.Distiller`, whose arguments these are; the latter has checked them.

    A plain object, so that no module registers the teacher.

    Attributes:
        teacher: the model.
        entry_tap: on the student, where the teacher's arguments are caught; None where they are the student's own.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        layers: Layers,
        entry: Entry,
        teacher_input: TeacherInput | None,
        score_function: ScoreFunction | None,
        placement: Placement,
    ):
        self.teacher, self.placement, self.score_function = teacher, placement, score_function
        self.tap = tapped(teacher, layers, "teacher_layers", stop_when_complete=True)
        self.entry: str | None = None
        self.entry_tap: FeatureTap | None = None
        if entry is None:
            check_same_images(student, teacher)
        else:
            students, self.entry = _checked_entry(entry)
            find_module(teacher, self.entry, "teacher_entry")
            if self.entry and is_output(layers):
                raise ValueError(
                    f"teacher_layers reads the teacher's output, but with teacher_entry {self.entry!r} only that "
                    "module runs: give teacher_layers as paths, or no teacher_entry"
                )
            self.entry_tap = closed_tap(student, Layer(students, inputs=True), "teacher_entry")
        self.teacher_input = checked_teacher_input(teacher_input)
        self.first_argument = first_argument(self.start())
        self.watch = TeacherWatch()
        self.move()

    @classmethod
    def of_earlier_state(cls, state: dict[str, Any]) -> "TeacherSide":
        """Return the side of a distiller that an earlier release pickled."""
        side = cls.__new__(cls)
        side.teacher, side.tap = state["_unregistered_teacher"][0], state["_teacher_tap"]
        side.entry, side.entry_tap = state["_teacher_entry"], state["_entry_tap"]
        side.teacher_input, side.first_argument = state.get("_unregistered_input", (None, None))
        side.placement, side.score_function, side.watch = Placement(), state.get("_score_function"), TeacherWatch()
        return side

    def start(self) -> nn.Module:
        """Return the module with which the teacher starts."""
        return self.teacher if self.entry is None else find_module(self.teacher, self.entry, "teacher_entry")

    def look(self, student: nn.Module, preprocessor: Any) -> None:
        """Warn of a teacher that was never trained, or sees other images than it was trained with.

        Args:
            student: the detector.
            preprocessor: of images, where a framework's wrapper has one.
        """
        self.watch.see(self.teacher, lambda: self._difference_of_images(student, preprocessor))

    def _difference_of_images(self, student: nn.Module, preprocessor: Any) -> str | None:
        """Return how the teacher's images differ from those of its training; a ``teacher_input`` is trusted."""
        if self.teacher_input is not None:
            return None
        is_inside = self.entry_tap is not None and self.entry_tap.paths() != [""]
        students = find_normalization(student, preprocessor)
        return difference(students, find_normalization(self.teacher), self.start() if is_inside else None)

    def listening(self) -> contextlib.AbstractContextManager:
        """Catch the teacher's arguments while the student runs."""
        return contextlib.nullcontext() if self.entry_tap is None else self.entry_tap

    def clear(self) -> None:
        """Forget the arguments that were caught."""
        if self.entry_tap is not None:
            self.entry_tap.clear()

    def arguments(self, given: tuple[tuple, dict[str, Any]]) -> tuple[tuple, dict[str, Any]]:
        """Return what the teacher is called with; ``given`` is what the student was."""
        if self.entry_tap is None:
            return given
        (caught,) = self.entry_tap.caught()
        return caught

    def run(self, args: tuple, kwargs: dict[str, Any], device: torch.device) -> tuple[Features, Any]:
        """Return the features on ``device``, and where the loss needs them the teacher's scores of them."""
        output, placement = None, self.placement
        with torch.no_grad(), placement.precision(), self.tap:
            args, kwargs = placement.moved((args, kwargs))
            if self.teacher_input is not None:
                args, kwargs = with_first_argument(self.teacher_input, self.first_argument, args, kwargs)
            args, kwargs = placement.converted((args, kwargs))
            output = self.start()(*args, **kwargs)
        features, scores = self.tap.features_of(output), None
        if self.score_function is not None:
            with placement.precision():
                scores = scores_of(self.score_function, self.teacher, features)
        return placement.returned((features, scores), device)

    def move(self, fn: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Let what moves or converts the distiller work on the teacher, as far as it has no place of its own."""
        self.placement.apply(self.teacher, fn)
        if isinstance(self.teacher_input, nn.Module):
            self.placement._replace(dtype=None).apply(self.teacher_input, fn)


def _checked_entry(entry: Any) -> tuple[str, str]:
    """Return the path of the module in the student whose arguments the teacher gets, and where the teacher starts."""
    if is_list(entry) and len(entry) == 2:
        for path in entry:
            check_text(path, "teacher_entry")
        return tuple(entry)
    check_text(entry, "teacher_entry")
    return entry, entry


def closed_tap(model: nn.Module, layers: Layers, name: str, stop_when_complete: bool = False) -> FeatureTap:
    """Return a tap that is on its model during a step only, so that models are copied and saved without it."""
    tap = FeatureTap(model, layers, name=name, stop_when_complete=stop_when_complete)
    tap.close()
    return tap


def tapped(model: nn.Module, layers: Layers, name: str, stop_when_complete: bool = False) -> FeatureTap | OutputTap:
    """Return what reads the features of a model."""
    return OutputTap(layers, name) if is_output(layers) else closed_tap(model, layers, name, stop_when_complete)
