"""CWD: each channel as a distribution over pixels, the student's beside the teacher's."""

from typing import Any, Literal

from torch import Tensor

from .. import dispatch
from .._validation import check_positive
from .feature_loss import Channels, count_levels
from .levelwise_loss import LevelwiseLoss, Side, Weight, preset_weight

__all__ = ["CWDLoss", "CWDPresetName", "WEIGHTS"]

CWDPresetName = Literal["two_stage", "one_stage"]

# MMRazor 1.0.0, configs/distill/mmdet/cwd: Faster R-CNN and, with its constants, RetinaNet, on five levels of the FPN.
WEIGHTS: dict[str, float] = {"two_stage": 10.0, "one_stage": 10.0}
LEVELS = 5


class CWDLoss(LevelwiseLoss):
    """The loss of CWD: how far each channel's distribution over pixels is from the teacher's.

    A softmax with temperature over the pixels of each channel says where the channel is active; the loss is the
    Kullback-Leibler divergence of the student's from the teacher's, times the squared temperature, as the mean over
    channels and images. What is added to a channel makes no difference, how much it varies does.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default. Where they differ a learned 1x1 convolution adapts
            the student, by PyTorch: it makes a map of the teacher's width, which the loss then reads.
        num_levels: how many levels, where the channels are ints; 5 by default.
        preset: ``"two_stage"`` or ``"one_stage"``, which have the same weight.
        weight: of the loss, instead of the preset's, >= 0: a number or a list of one a level.
        temperature: tau > 0 of the softmax over pixels.
        resize: whose maps are resized (bilinear) where the sizes differ, ``"student"`` or ``"teacher"``. None: other
            sizes are an error.

    Warns:
        UserWarning: as :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: channels, levels or another argument out of its range.
        TypeError: channels that are no ints.
        RuntimeError: at the first call, a layer inside the loss with hooks, which would never run.

    Example:
        >>> loss = CWDLoss(256, num_levels=2)
        >>> student = [torch.randn(2, 256, size, size) for size in (8, 4)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> list(loss(student, teacher))
        ['loss_cwd']

    Source: Shu et al., "Channel-wise Knowledge Distillation for Dense Prediction", ICCV 2021; the constants are those
    of MMRazor 1.0.0's ``ChannelWiseDivergence`` and its configuration.
    """

    term_names = ("loss_cwd",)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        preset: CWDPresetName = "two_stage",
        weight: Weight | None = None,
        temperature: float = 1.0,
        resize: Side | None = None,
    ):
        weight = preset_weight(preset, weight, WEIGHTS)
        levels = count_levels(student_channels, teacher_channels, num_levels, LEVELS)
        super().__init__(student_channels, teacher_channels, levels, weight, resize)
        self.temperature = check_positive(temperature, "temperature")

    def level_losses(self, students: list[Tensor], teachers: list[Tensor], *others: list[Any]) -> Tensor:
        """Return the unweighted loss of each level, ``(levels,)``, of maps of the same shapes."""
        return dispatch.channel_divergence_losses(students, teachers, self.temperature)
