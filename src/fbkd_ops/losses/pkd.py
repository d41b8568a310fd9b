"""PKD: the correlation of each channel of the student's and the teacher's maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch
from .._numerics import accumulation_dtype, constant_vector, recordable, without_autocast
from .._validation import Features, check_choice, check_number, check_positive, paired_levels, values_per_level
from .._warnings import can_watch
from ..types import present
from .feature_loss import Channels, FeatureLoss, count_levels

__all__ = ["PKDLoss", "PKDPresetName", "WEIGHTS"]

PKDPresetName = Literal["two_stage", "one_stage"]
Side = Literal["student", "teacher"]

# MMRazor 1.0.0, configs/distill/mmdet/pkd: 6 for Faster R-CNN, 10 for RetinaNet, on four levels of the FPN each.
WEIGHTS: dict[str, float] = {"two_stage": 6.0, "one_stage": 10.0}
LEVELS = 4


class PKDLoss(FeatureLoss):
    """The loss of PKD: half the mean square of the difference of the maps, each standardised per channel.

    Up to eps that is ``(n - 1) / n`` times the mean over channels of ``1 - r``, with Pearson's correlation r over all n
    pixels of the batch. The scale and the mean of a channel make no difference, so it suits teachers of another
    architecture. Where the widths agree it has no parameters.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default. Where they differ a learned 1x1 convolution adapts
            the student, by PyTorch: it makes a map of the teacher's width, which the loss then reads.
        num_levels: how many levels, where the channels are ints; 4 by default.
        preset: ``"two_stage"`` or ``"one_stage"``, which choose the weight.
        weight: of the loss, instead of the preset's, >= 0: a number or a list of one a level.
        resize: whose maps are resized (bilinear) where the sizes differ, ``"student"`` (the source's default) or
            ``"teacher"``. None: other sizes are an error.
        eps: what is added to each standard deviation, > 0.

    Warns:
        UserWarning: as :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: channels, levels or another argument out of its range.
        TypeError: channels that are no ints.
        RuntimeError: at the first call, a layer inside the loss with hooks, which would never run.

    Example:
        >>> loss = PKDLoss(256)
        >>> student = [torch.randn(2, 256, size, size) for size in (32, 16, 8, 4)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> list(loss(student, teacher))
        ['loss_pkd']

    Source: Cao et al., "PKD: General Distillation Framework for Object Detectors via Pearson Correlation Coefficient",
    NeurIPS 2022; the constants are those of MMRazor 1.0.0's ``PKDLoss`` and its configurations.
    """

    term_names = ("loss_pkd",)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        preset: PKDPresetName = "two_stage",
        weight: float | Sequence[float] | None = None,
        resize: Side | None = None,
        eps: float = 1e-6,
    ):
        check_choice(preset, tuple(WEIGHTS), "preset")
        levels = count_levels(student_channels, teacher_channels, num_levels, LEVELS, preset)
        super().__init__(student_channels, teacher_channels, levels)
        weights = values_per_level(WEIGHTS[preset] if weight is None else weight, levels, "weight")
        self.weights = [check_number(each, "a number >= 0", lambda number: number >= 0, "weight") for each in weights]
        self.resize = None if resize is None else check_choice(resize, ("student", "teacher"), "resize")
        self.eps = check_positive(eps, "eps")
        self.adaptations = nn.ModuleList(
            nn.Identity() if student == teacher or weight == 0 else nn.Conv2d(student, teacher, 1)
            for weight, (student, teacher) in zip(self.weights, self.widths, strict=True)
        )

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        """Return the loss.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.

        Returns:
            The scalar ``loss_pkd``, weighted and summed over levels, in float32 (float64 where a feature is float64).

        Raises:
            TypeError: features that are no list or dict, a level that is no dense floating-point tensor.
            ValueError: levels, channels, N, H, W or devices that do not agree; parameters on different devices.
        """
        pairs = paired_levels(student_features, teacher_features, same_size=self.resize is None)
        self.check_levels(pairs)
        used = [level for level, weight in enumerate(self.weights) if weight > 0]
        if not used:
            return {"loss_pkd": pairs[0][1].new_zeros((), dtype=accumulation_dtype(pairs[0][1], pairs[0][3]))}
        given = [pairs[level][1] for level in used]
        teachers = [recordable(pairs[level][3].detach()) for level in used]
        students = [_adapted(x, self.adaptations[level]) for x, level in zip(given, used, strict=True)]
        if self.resize == "student":
            students = [_resized(s, t) for s, t in zip(students, teachers, strict=True)]
        elif self.resize == "teacher":
            teachers = [_resized(t, s) for s, t in zip(students, teachers, strict=True)]
        with without_autocast(students[0]):
            losses = dispatch.channel_correlation_losses(students, teachers, self.eps)  # (levels,)
            scales = [self.weights[level] for level in used]
            weights = constant_vector(scales, losses.dtype, losses.device, keep=can_watch(losses))
            terms = {"loss_pkd": losses @ weights}
        if self.training and can_watch(losses):
            all_students, all_teachers = [pair[1] for pair in pairs], [pair[3] for pair in pairs]
            self._finite_watch.see(losses, [(level, "pkd") for level in used], all_students, all_teachers)
            self._gradient_watch.see(given, all_teachers)
            self._update_watch.see(self, terms)
        return terms

    if TYPE_CHECKING:

        def __call__(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]: ...


def _adapted(student: Tensor, layer: nn.Module) -> Tensor:
    """Return the student in the teacher's width, in its own dtype or autocast's."""
    if not isinstance(layer, nn.Conv2d):
        return student
    return F.conv2d(student, layer.weight.to(student.dtype), present(layer.bias).to(student.dtype))


def _resized(x: Tensor, like: Tensor) -> Tensor:
    """Return ``x`` in the size of another map."""
    size = like.shape[2:]
    return x if x.shape[2:] == size else F.interpolate(x, size, mode="bilinear", align_corners=False)
