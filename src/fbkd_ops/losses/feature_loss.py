"""What every loss between two lists of feature maps shares: widths, checks and warnings."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._validation import (
    Features,
    check_channels,
    check_number,
    check_same_device,
    is_int,
    is_list,
    paired_levels,
    values_per_level,
)
from .._warnings import FiniteWatch, GradientWatch, LayerWatch, UpdateWatch, can_watch

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Channels", "FeatureLoss", "adaptations", "count_levels", "level_weights", "level_widths"]

Channels = int | Sequence[int]


class FeatureLoss(nn.Module):
    """A loss between the levels of a student and of a teacher.

    Attributes:
        term_names: names of the scalars that a call returns.
        needs: what a call takes besides the features: ``"boxes"`` and ``"image_size"``, or ``"scores"``.
        widths: the channels of student and teacher of each level.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default.
        num_levels: how many levels, where the channels are ints.
    """

    term_names: tuple[str, ...]
    needs: tuple[str, ...] = ()

    def __init__(self, student_channels: Channels, teacher_channels: Channels | None, num_levels: int):
        super().__init__()
        teacher_channels = student_channels if teacher_channels is None else teacher_channels
        students = level_widths(student_channels, num_levels, "student_channels")
        teachers = level_widths(teacher_channels, num_levels, "teacher_channels")
        self.widths = list(zip(students, teachers, strict=True))
        self._gradient_watch, self._finite_watch, self._update_watch = GradientWatch(), FiniteWatch(), UpdateWatch()
        self._layer_watch = LayerWatch()

    @classmethod
    def from_features(cls, student_features: Features, teacher_features: Features, **arguments: Any) -> "Self":
        """Return a loss for features like these: channels and levels are read off them.

        Args:
            student_features, teacher_features: lists, tuples or dicts of ``(N, C, H, W)``, as for the call.
            **arguments: of the constructor.

        Returns:
            The loss, on the features' device, in float32.

        Example:
            >>> features = {"p3": torch.randn(1, 64, 32, 32), "p4": torch.randn(1, 128, 16, 16)}
            >>> PKDLoss.from_features(features, features).widths
            [(64, 64), (128, 128)]
        """
        same_size = arguments.get("resize") is None
        pairs = paired_levels(student_features, teacher_features, same_size=same_size)
        loss = cls(
            [student.shape[1] for _, student, _, _ in pairs],
            [teacher.shape[1] for _, _, _, teacher in pairs],
            **arguments,
        )
        return loss.to(pairs[0][1].device)

    def check_levels(self, pairs: list[tuple[str, Tensor, str, Tensor]]) -> None:
        """Refuse features of other levels, widths or devices than the loss was made for.

        Args:
            pairs: what :func:`fbkd_ops._validation.paired_levels` returns.
        """
        if len(pairs) != len(self.widths):
            raise ValueError(
                f"student_features must have {len(self.widths)} levels, as the loss was made with, got {len(pairs)}"
            )
        for widths, (student_name, student, teacher_name, teacher) in zip(self.widths, pairs, strict=True):
            check_channels(student, widths[0], student_name)
            check_channels(teacher, widths[1], teacher_name)
            check_same_device(student, pairs[0][1], student_name, pairs[0][0])
        parameter = next(self.parameters(), None)
        if parameter is not None:
            check_same_device(pairs[0][1], parameter, pairs[0][0], "the loss's parameters")
        self._layer_watch.see(self)

    def watch(
        self,
        values: list[Tensor],
        names: list[tuple[int, str]],
        students: list[Tensor],
        teachers: list[Tensor],
        terms: dict[str, Tensor],
    ) -> None:
        """Warn, in training, of what is not finite, has no gradient or is not trained.

        Args:
            values: what the terms are the sums of, scalars.
            names: level and term of each.
            students, teachers: the maps of all levels.
            terms: what the call returns.
        """
        if not values or not self.training or not can_watch(values[0]):
            return
        self._finite_watch.see(torch.stack(values), names, students, teachers)
        self._gradient_watch.see([students[level] for level in dict.fromkeys(level for level, _ in names)], teachers)
        self._update_watch.see(self, terms)


def count_levels(student: Any, teacher: Any, num_levels: int | None, default: int | None, preset: str = "") -> int:
    """Return how many levels there are: as many as the lists of channels have, or ``num_levels``, or the default."""
    lengths = {len(channels) for channels in (student, teacher) if is_list(channels)}
    if num_levels is None and lengths:
        num_levels = max(lengths)
    if num_levels is None:
        num_levels = default
    if num_levels is None:
        fitting = f"preset {preset!r}" if preset else "the loss"
        raise ValueError(f"num_levels is needed: {fitting} fits any number of levels")
    if not is_int(num_levels) or num_levels < 1:
        raise ValueError(f"num_levels must be an int >= 1, got {num_levels!r}")
    return int(num_levels)


def level_weights(weight: Any, levels: int, name: str) -> list[float]:
    """Return one weight per level, checked."""
    chosen = values_per_level(weight, levels, name)
    return [check_number(each, "a number >= 0", lambda number: number >= 0, name) for each in chosen]


def adaptations(widths: list[tuple[int, int]], used: Sequence[bool]) -> nn.ModuleList:
    """Return a 1x1 convolution for each used level whose widths differ, an identity for the others."""
    return nn.ModuleList(
        nn.Conv2d(student, teacher, 1) if is_used and student != teacher else nn.Identity()
        for is_used, (student, teacher) in zip(used, widths, strict=True)
    )


def level_widths(channels: Any, num_levels: int, name: str) -> list[int]:
    """Return one width a level, checked."""
    if is_list(channels) and len(channels) != num_levels:
        raise ValueError(f"{name} has {len(channels)} entries, expected an int or {num_levels}, one a level")
    widths = values_per_level(channels, num_levels, name)
    for level, width in enumerate(widths):
        if not is_int(width):
            raise TypeError(f"{name} must be an int or a list of ints, got {width!r} at level {level}")
        if width < 1:
            raise ValueError(f"{name} must be >= 1, got {width} at level {level}")
    return [int(width) for width in widths]
