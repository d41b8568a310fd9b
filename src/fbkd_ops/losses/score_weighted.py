"""The squared distance to the teacher's map, weighed by how sure the teacher is of an object at each pixel."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import dispatch
from .._numerics import constant_vector
from .._validation import Features, as_list, check_same_device, feature_levels
from .._warnings import can_watch
from .feature_loss import Channels, count_levels
from .levelwise_loss import OneTermLoss, Side, Weight

__all__ = ["ScoreWeightedLoss"]


class ScoreWeightedLoss(OneTermLoss):
    """The mean squared distance to the teacher's map, where a pixel weighs as much as the teacher's confidence there.

    The call takes the confidences too. A :class:`fbkd_ops.Distiller` gets them from the teacher's own head.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default. Where they differ a learned 1x1 convolution adapts
            the student, by PyTorch: it makes a map of the teacher's width, which the loss then reads.
        num_levels: how many levels, where the channels are ints.
        weight: of the loss, >= 0: a number or a list of one per level. A level of weight 0 is left out.
        resize: ``"student"``: the student's maps are resized (bilinear) where the sizes differ. None: other sizes are
            an error.

    Warns:
        UserWarning: as :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: channels, levels or another argument out of its range.
        TypeError: channels that are no ints.
        RuntimeError: at the first call, a layer inside the loss with hooks, which would never run.

    Example:
        >>> loss = ScoreWeightedLoss(64, num_levels=2)
        >>> student = [torch.randn(2, 64, size, size) for size in (8, 4)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> scores = [torch.rand(2, size, size) for size in (8, 4)]
        >>> list(loss(student, teacher, scores))
        ['loss_score_weighted']

    Source: the idea is that of the distillation built into Ultralytics, from its documentation; the normalisation is
    this package's.
    """

    term_names = ("loss_score_weighted",)
    needs = ("scores",)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        weight: Weight = 1.0,
        resize: Side | None = None,
    ):
        if resize == "teacher":
            raise ValueError("resize must be None or 'student': the scores have the sizes of the teacher's maps")
        levels = count_levels(student_channels, teacher_channels, num_levels, None)
        super().__init__(student_channels, teacher_channels, levels, weight, resize)

    def forward(self, student_features: Features, teacher_features: Features, scores: Any) -> dict[str, Tensor]:
        """Return the loss.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.
            scores: of each level the teacher's confidence ``(N, H, W)``, >= 0, without gradient, in a list or by the
                teacher's keys. Only their proportions count.

        Returns:
            The scalar ``loss_score_weighted``, weighted and summed over levels, in float32 (float64 where a feature is
            float64). A level without any score has the loss 0.

        Raises:
            TypeError: features that are no list or dict, a level that is no dense floating-point tensor.
            ValueError: levels, channels, N, H, W or devices that do not agree; parameters on different devices.
        """
        return self.terms_of(student_features, teacher_features, checked_scores(scores, teacher_features))

    if TYPE_CHECKING:

        def __call__(
            self, student_features: Features, teacher_features: Features, scores: Any
        ) -> dict[str, Tensor]: ...

    def level_losses(self, students: list[Tensor], teachers: list[Tensor], *others: list[Any]) -> Tensor:
        """Return the weighted mean squared distance of each level, ``(levels,)``."""
        (scores,) = others
        masks = [
            score.to(torch.float64 if student.dtype == torch.float64 else torch.float32)
            for score, student in zip(scores, students, strict=True)
        ]
        absent: list[Tensor | None] = [None] * len(students)
        squares = dispatch.masked_l2_squares(students, teachers, [*masks], absent)
        channels = [float(student.shape[1]) for student in students]
        widths = constant_vector(channels, squares.dtype, squares.device, keep=can_watch(squares))
        sums = torch.stack([mask.sum() for mask in masks]).to(squares.dtype)
        return squares / (widths * sums.clamp(min=torch.finfo(squares.dtype).tiny))


def checked_scores(scores: Any, teacher_features: Features) -> list[Tensor]:
    """Return the scores in the order of the teacher's levels, each as large as its map.

    Raises:
        TypeError: scores that are no list or dict of floating-point tensors.
        ValueError: other levels or shapes than the teacher's.
    """
    levels = feature_levels(teacher_features, "teacher_features")
    if isinstance(scores, Mapping) and isinstance(teacher_features, Mapping):
        if set(scores) != set(teacher_features):
            raise ValueError(f"scores must have the teacher's keys {list(teacher_features)}, got {list(scores)}")
        scores = [scores[key] for key in teacher_features]
    elif isinstance(scores, Mapping):
        scores = list(scores.values())
    given = as_list(scores, "a list of maps (N, H, W)", "scores")
    if len(given) != len(levels):
        raise ValueError(f"scores must have one map for each of the {len(levels)} levels, got {len(given)}")
    for index, (score, (label, teacher)) in enumerate(zip(given, levels.items(), strict=True)):
        if not isinstance(score, Tensor) or not score.is_floating_point():
            raise TypeError(f"scores[{index}] must be a floating-point tensor (N, H, W), got {type(score).__name__}")
        shape = (teacher.shape[0], *teacher.shape[2:])
        if tuple(score.shape) != shape:
            raise ValueError(f"scores[{index}] must have shape {shape}, as the teacher's map, got {tuple(score.shape)}")
        check_same_device(score, teacher, f"scores[{index}]", label)
    return [score.detach().contiguous() for score in given]
