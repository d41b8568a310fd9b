"""FGD: the teacher's values weighed by its attention, in the objects and around them; its attention; its context."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from .._numerics import accumulation_dtype, recordable, without_autocast
from .._validation import Features, check_choice, check_positive, paired_levels
from .._warnings import can_watch
from ..feature_norm import standardised_students
from ..ops.attention_masks import MaskRequest
from ..presets import CHOICES, FeatureNorm
from ..types import AttentionPool, present
from .boxes import check_form, checked_boxes, inside_and_outside
from .feature_loss import Channels, FeatureLoss, adaptations, count_levels, level_weights
from .levelwise_loss import Weight, convolved

__all__ = ["FGDLoss", "FGDPresetName", "PRESETS"]

FGDPresetName = Literal["two_stage", "one_stage", "anchor_free"]
LEVELS = 5


class Constants(NamedTuple):
    """What a preset chooses."""

    foreground_weight: float
    background_weight: float
    attention_weight: float
    global_weight: float
    temperature: float


# The authors' configurations: Faster and Mask R-CNN; RetinaNet, GFL and SOLO; FCOS (RepPoints has temperature 0.5).
PRESETS: dict[str, Constants] = {
    "two_stage": Constants(5e-5, 2.5e-5, 5e-5, 5e-7, 0.5),
    "one_stage": Constants(1e-3, 5e-4, 5e-4, 5e-6, 0.5),
    "anchor_free": Constants(1.6e-3, 8e-4, 8e-4, 8e-6, 0.8),
}


class FGDLoss(FeatureLoss):
    """The loss of FGD: focal and attention terms, which know where the objects are, and a global term.

    - ``loss_fgd_focal``: the squared distance to the teacher's map, weighed by the teacher's attention over pixels and
      channels, and by the boxes: a pixel of an object weighs 1 over the object's area, a pixel of none 1 over the
      number of such pixels.
    - ``loss_fgd_attention``: the distance of both attentions to the teacher's.
    - ``loss_fgd_global``: the squared distance of both maps after each side has added to its map what two layers make
      of a weighted mean of it.

    The call takes the boxes too. A :class:`fbkd_ops.Distiller` hands them over.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's, >= 2; the student's by default. Where they differ a learned 1x1 convolution
            adapts the student, by PyTorch.
        num_levels: how many levels, where the channels are ints; 5 by default.
        preset: ``"two_stage"``, ``"one_stage"`` or ``"anchor_free"``, which choose all of the following.
        foreground_weight, background_weight: of the pixels in and out of the boxes, >= 0: a number or a list of one per
            level.
        attention_weight, global_weight: of these terms, the same.
        temperature: of the softmax of the attention maps, > 0.
        feature_norm: ``"channel"`` for a focal term of maps that are standardised per channel over the batch, the
            student's before the convolution; ``"none"`` by default. Attention and global term are those of the maps as
            they are.

    Warns:
        UserWarning: as :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: channels, levels or another argument out of its range.
        TypeError: channels that are no ints.
        RuntimeError: at the first call, a layer inside the loss with hooks, which would never run.

    Example:
        >>> loss = FGDLoss(64, num_levels=2)
        >>> student = [torch.randn(2, 64, size, size) for size in (8, 4)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> boxes = [torch.tensor([[4.0, 8.0, 20.0, 31.5]]), torch.zeros(0, 4)]  # of two images of 64 x 64 pixels
        >>> list(loss(student, teacher, boxes, (64, 64)))
        ['loss_fgd_focal', 'loss_fgd_attention', 'loss_fgd_global']

    Source: Yang et al., "Focal and Global Knowledge Distillation for Detectors", CVPR 2022; the constants are those of
    the authors' configurations.
    """

    term_names = ("loss_fgd_focal", "loss_fgd_attention", "loss_fgd_global")
    needs = ("boxes", "image_size")

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        preset: FGDPresetName = "two_stage",
        foreground_weight: Weight | None = None,
        background_weight: Weight | None = None,
        attention_weight: Weight | None = None,
        global_weight: Weight | None = None,
        temperature: float | None = None,
        feature_norm: FeatureNorm = "none",
    ):
        constants = PRESETS[check_choice(preset, tuple(PRESETS), "preset")]
        levels = count_levels(student_channels, teacher_channels, num_levels, LEVELS)
        super().__init__(student_channels, teacher_channels, levels)
        overrides = {
            "foreground_weight": foreground_weight,
            "background_weight": background_weight,
            "attention_weight": attention_weight,
            "global_weight": global_weight,
        }
        weights = {
            name: level_weights(getattr(constants, name) if weight is None else weight, levels, name)
            for name, weight in overrides.items()
        }
        self.foreground_weights, self.background_weights = weights["foreground_weight"], weights["background_weight"]
        self.attention_weights, self.global_weights = weights["attention_weight"], weights["global_weight"]
        self.temperature = check_positive(constants.temperature if temperature is None else temperature, "temperature")
        self.feature_norm = check_choice(feature_norm, CHOICES["feature_norm"], "feature_norm")
        self._has_seen_boxes = False
        used = {*self._focal_levels(), *_levels_with(self.attention_weights), *_levels_with(self.global_weights)}
        self.adaptations = adaptations(self.widths, [level in used for level in range(levels)])
        self.student_contexts, self.teacher_contexts = self._contexts(), self._contexts()

    def _contexts(self) -> nn.ModuleList:
        return nn.ModuleList(
            GlobalContext(width) if weight > 0 else nn.Identity()
            for weight, (_, width) in zip(self.global_weights, self.widths, strict=True)
        )

    def _focal_levels(self) -> list[int]:
        both = zip(self.foreground_weights, self.background_weights, strict=True)
        return _levels_with([sum(weights) for weights in both])

    def forward(
        self,
        student_features: Features,
        teacher_features: Features,
        boxes: Sequence[Tensor],
        image_size: tuple[int, int],
    ) -> dict[str, Tensor]:
        """Return the three terms.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.
            boxes: of each image ``(K, 4)``: x1, y1, x2, y2 in pixels of the batch that the model was given. A box
                without area, or outside of the image, marks nothing.
            image_size: height and width of that batch, padding included.

        Returns:
            Scalars by the names of ``term_names``, weighted and summed over levels, in float32 (float64 where a feature
            is float64).

        Raises:
            TypeError: features that are no list or dict, a level that is no dense floating-point tensor, boxes that
                are no tensors.
            ValueError: levels, channels, N, H, W or devices that do not agree; parameters on different devices; boxes
                of another shape or, at the first call that has any, of another form than x1, y1, x2, y2 in pixels.
        """
        pairs = paired_levels(student_features, teacher_features)
        self.check_levels(pairs)
        teachers = [recordable(teacher.detach()) for _, _, _, teacher in pairs]
        students = [convolved(pair[1], layer) for pair, layer in zip(pairs, self.adaptations, strict=True)]
        with without_autocast(students[0]):
            stacked = checked_boxes(boxes, image_size, len(students[0]), students[0].device)
            if not self._has_seen_boxes and stacked.numel() and can_watch(stacked):
                check_form(stacked)
                self._has_seen_boxes = True
            pools = dispatch.attention_pools([*students, *teachers])
            sides = pools[: len(students)], pools[len(students) :]
            focal = self._focal([pair[1] for pair in pairs], students, teachers, sides[1], stacked, image_size)
            attention = self._attention(*sides)
            context = self._global(students, teachers, *sides)
            values = dict(zip(self.term_names, (focal, attention, context), strict=True))
            zero = students[0].new_zeros((), dtype=accumulation_dtype(*students, *teachers))
            terms = {name: sum(by_level.values(), zero) for name, by_level in values.items()}
        names = [(level, name) for name, levels in values.items() for level in levels]
        maps = [pair[1] for pair in pairs], teachers
        self.watch([value for levels in values.values() for value in levels.values()], names, *maps, terms)
        return terms

    if TYPE_CHECKING:

        def __call__(
            self,
            student_features: Features,
            teacher_features: Features,
            boxes: Sequence[Tensor],
            image_size: tuple[int, int],
        ) -> dict[str, Tensor]: ...

    def _focal(
        self,
        raw: list[Tensor],
        adapted: list[Tensor],
        teachers: list[Tensor],
        teacher_pools: list[AttentionPool],
        boxes: Tensor,
        image_size: tuple[int, int],
    ) -> dict[int, Tensor]:
        """Return the weighted focal term by level: both kinds of pixels in one masked distance."""
        levels = self._focal_levels()
        if not levels:
            return {}
        attentions = [
            attention
            for level in levels
            for attention in (teacher_pools[level].spatial_attention, teacher_pools[level].channel_attention)
        ]
        masks = dispatch.attention_masks([MaskRequest(None, each, self.temperature, "average") for each in attentions])
        spatial_masks = []
        for level, mask in zip(levels, masks[::2], strict=True):
            inside, outside = inside_and_outside(boxes, image_size, mask.shape[1:])
            weight = self.foreground_weights[level] * inside + self.background_weights[level] * outside
            spatial_masks.append(mask * weight.to(mask.dtype))
        maps, channel_masks = [adapted[level] for level in levels], masks[1::2]
        targets = [teachers[level] for level in levels]
        if self.feature_norm == "channel":
            layers = [self.adaptations[level] for level in levels]
            maps, channel_masks = standardised_students(
                [raw[level] for level in levels], layers, targets, channel_masks
            )
        squares = dispatch.masked_l2_squares(maps, targets, [*spatial_masks], [*channel_masks]) / max(len(boxes), 1)
        return dict(zip(levels, squares.unbind(), strict=True))

    def _attention(self, student_pools: list[AttentionPool], teacher_pools: list[AttentionPool]) -> dict[int, Tensor]:
        """Return the weighted attention term by level."""
        found = {}
        for level in _levels_with(self.attention_weights):
            student, teacher = student_pools[level], teacher_pools[level]
            distances = [
                (self._softened(getattr(student, name)) - self._softened(getattr(teacher, name))).abs().sum()
                for name in ("channel_attention", "spatial_attention")
            ]
            images = max(len(student.channel_attention), 1)
            found[level] = self.attention_weights[level] * (distances[0] + distances[1]) / images
        return found

    def _softened(self, attention: Tensor) -> Tensor:
        rows = attention.flatten(1)
        return rows.shape[1] * torch.softmax(rows / self.temperature, dim=1)

    def _global(
        self,
        students: list[Tensor],
        teachers: list[Tensor],
        student_pools: list[AttentionPool],
        teacher_pools: list[AttentionPool],
    ) -> dict[int, Tensor]:
        """Return the weighted global term by level.

        With d (N, C), by which the sides' additions differ, ``sum((S - T + d)^2)`` is the plain distance plus
        ``H W sum(d (2 mean(S - T) + d))``: no map with an addition is made. The rounding error is
        that of the plain distance, so a sum near 0 could come out negative: it is clamped.
        """
        levels = _levels_with(self.global_weights)
        if not levels:
            return {}
        maps = [students[level] for level in levels], [teachers[level] for level in levels]
        absent: list[Tensor | None] = [None] * len(levels)
        squares = dispatch.masked_l2_squares(*maps, absent, absent)
        found = {}
        for level, student, teacher, square in zip(levels, *maps, squares.unbind(), strict=True):
            of_student = _addition(student, self.student_contexts[level])
            difference = of_student - _addition(teacher, self.teacher_contexts[level])
            means = student_pools[level].channel_mean - teacher_pools[level].channel_mean
            pixels = math.prod(student.shape[2:])
            total = (square + pixels * (difference * (2 * means + difference)).sum()).clamp(min=0)
            found[level] = self.global_weights[level] * total / max(len(student), 1)
        return found


class GlobalContext(nn.Module):
    """The layers that make an addition (N, C) of a map: a mean over pixels with learned weights, and two layers."""

    def __init__(self, width: int):
        super().__init__()
        if width < 2:
            raise ValueError(f"teacher_channels must be >= 2 for the global term, got {width}")
        self.weight = nn.Conv2d(width, 1, 1)
        self.reduce = nn.Conv2d(width, width // 2, 1)
        self.norm = nn.LayerNorm([width // 2, 1, 1])
        self.expand = nn.Conv2d(width // 2, width, 1)
        # As the authors begin: weights that see the map, and an addition of 0.
        nn.init.kaiming_normal_(self.weight.weight, mode="fan_in", nonlinearity="relu")
        for zero in (self.weight.bias, self.expand.weight, self.expand.bias):
            nn.init.zeros_(present(zero))


def _addition(x: Tensor, context: nn.Module) -> Tensor:
    """Return ``(N, C)``, in the accumulation dtype."""
    assert isinstance(context, GlobalContext)
    dtype, columns = accumulation_dtype(x), x.flatten(2)  # (N, C, HW)
    # Convolutions as products: those to a single channel and of a single pixel take several times as long.
    logits = (context.weight.weight.flatten(1).to(x.dtype) @ columns)[:, 0].to(dtype)  # (N, HW)
    weights = torch.softmax(logits + present(context.weight.bias), dim=1)
    mean = torch.bmm(columns, weights.to(x.dtype)[:, :, None])[:, :, 0].to(dtype)  # (N, C)
    norm = context.norm
    scale, shift = (parameter.flatten().to(dtype) for parameter in (norm.weight, norm.bias))
    normed = F.layer_norm(_product(mean, context.reduce), scale.shape, scale, shift, norm.eps)
    return _product(normed.relu(), context.expand)


def _product(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """Return what a 1x1 convolution makes of ``(N, C)``."""
    return F.linear(x, layer.weight.flatten(1).to(x.dtype), present(layer.bias).to(x.dtype))


def _levels_with(weights: list[float]) -> list[int]:
    return [level for level, weight in enumerate(weights) if weight > 0]
