"""PKD: the correlation of each channel of the student's and the teacher's maps."""

from typing import Any, Literal

from torch import Tensor

from .. import dispatch
from .._validation import check_positive
from .feature_loss import Channels, count_levels
from .levelwise_loss import LevelwiseLoss, Side, Weight, preset_weight

__all__ = ["PKDLoss", "PKDPresetName", "WEIGHTS"]

PKDPresetName = Literal["two_stage", "one_stage"]

# MMRazor 1.0.0, configs/distill/mmdet/pkd: 6 for Faster R-CNN, 10 for RetinaNet, on four levels of the FPN each.
WEIGHTS: dict[str, float] = {"two_stage": 6.0, "one_stage": 10.0}
LEVELS = 4


class PKDLoss(LevelwiseLoss):
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
        weight: Weight | None = None,
        resize: Side | None = None,
        eps: float = 1e-6,
    ):
        weight = preset_weight(preset, weight, WEIGHTS)
        levels = count_levels(student_channels, teacher_channels, num_levels, LEVELS)
        super().__init__(student_channels, teacher_channels, levels, weight, resize)
        self.eps = check_positive(eps, "eps")

    def level_losses(self, students: list[Tensor], teachers: list[Tensor], *others: list[Any]) -> Tensor:
        """Return the unweighted loss of each level, ``(levels,)``, of maps of the same shapes."""
        return dispatch.channel_correlation_losses(students, teachers, self.eps)
