"""Losses of one term, which compare two maps of the same shape level by level."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from .._numerics import accumulation_dtype, constant_vector, recordable, without_autocast
from .._validation import Features, check_choice, paired_levels
from .._warnings import can_watch
from ..types import present
from .feature_loss import Channels, FeatureLoss, adaptations, level_weights

__all__ = ["LevelwiseLoss", "OneTermLoss", "Side", "Weight", "convolved", "preset_weight"]

Side = Literal["student", "teacher"]
Weight = float | Sequence[float]


class OneTermLoss(FeatureLoss):
    """A weighted sum of :meth:`level_losses` over levels.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default. Where they differ a learned 1x1 convolution adapts
            the student.
        levels: how many.
        weight: >= 0, a number or a list of one per level. A level of weight 0 is left out.
        resize: whose maps are resized (bilinear) where the sizes differ. None: other sizes are an error.
    """

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None,
        levels: int,
        weight: Weight,
        resize: Side | None,
    ):
        super().__init__(student_channels, teacher_channels, levels)
        self.weights = level_weights(weight, levels, "weight")
        self.resize = None if resize is None else check_choice(resize, ("student", "teacher"), "resize")
        self.adaptations = adaptations(self.widths, [weight > 0 for weight in self.weights])

    def transformed(self, students: list[Tensor], levels: list[int]) -> list[Tensor]:
        """Return the maps that are compared with the teacher's: here the students in the teachers' widths and sizes.

        Args:
            students: of the levels that have a weight.
            levels: their indices.
        """
        return students

    def level_losses(self, students: list[Tensor], teachers: list[Tensor], *others: list[Any]) -> Tensor:
        """Return the unweighted loss of each level, ``(levels,)``, of maps of the same shapes.

        Args:
            students, teachers: of the levels that have a weight.
            *others: of these levels, what ``terms_of`` was given of all.
        """
        raise NotImplementedError

    def terms_of(self, student_features: Features, teacher_features: Features, *others: list[Any]) -> dict[str, Tensor]:
        """Return the loss of features and of further lists of one entry per level."""
        pairs = paired_levels(student_features, teacher_features, same_size=self.resize is None)
        self.check_levels(pairs)
        (name,) = self.term_names
        used = [level for level, weight in enumerate(self.weights) if weight > 0]
        if not used:
            return {name: pairs[0][1].new_zeros((), dtype=accumulation_dtype(pairs[0][1], pairs[0][3]))}
        teachers = [recordable(pairs[level][3].detach()) for level in used]
        students = [convolved(pairs[level][1], self.adaptations[level]) for level in used]
        if self.resize == "student":
            students = [_resized(s, t) for s, t in zip(students, teachers, strict=True)]
        elif self.resize == "teacher":
            teachers = [_resized(t, s) for s, t in zip(students, teachers, strict=True)]
        students = self.transformed(students, used)
        with without_autocast(students[0]):
            losses = self.level_losses(students, teachers, *([values[level] for level in used] for values in others))
            scales = [self.weights[level] for level in used]
            weights = constant_vector(scales, losses.dtype, losses.device, keep=can_watch(losses))
            terms = {name: losses @ weights}
        maps = [pair[1] for pair in pairs], [pair[3] for pair in pairs]
        self.watch(list(losses.unbind()), [(level, name) for level in used], *maps, terms)
        return terms


class LevelwiseLoss(OneTermLoss):
    """A loss of one term that needs nothing but the features."""

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        """Return the loss.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.

        Returns:
            The scalar that ``term_names`` names, weighted and summed over levels, in float32 (float64 where a feature
            is float64).

        Raises:
            TypeError: features that are no list or dict, a level that is no dense floating-point tensor.
            ValueError: levels, channels, N, H, W or devices that do not agree; parameters on different devices.
        """
        return self.terms_of(student_features, teacher_features)


def preset_weight(preset: Any, weight: Weight | None, weights: Mapping[str, float]) -> Weight:
    """Return ``weight``, or where it is None that of the preset, a key of ``weights``."""
    check_choice(preset, tuple(weights), "preset")
    return weights[preset] if weight is None else weight


def convolved(x: Tensor, layer: nn.Module) -> Tensor:
    """Return ``layer(x)`` in the dtype of ``x``, or autocast's; ``x`` itself where there is no convolution."""
    if not isinstance(layer, nn.Conv2d):
        return x
    return F.conv2d(x, layer.weight.to(x.dtype), present(layer.bias).to(x.dtype), padding=cast(int, layer.padding))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` in the size of another map."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
