"""MGD: the student's map with pixels left out, from which two convolutions have to make the teacher's."""

from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from .. import dispatch
from .._validation import check_choice, check_number, is_int
from .feature_loss import Channels, count_levels
from .levelwise_loss import LevelwiseLoss, Side, Weight, convolved, preset_weight

__all__ = ["MASK_RATIOS", "MGDLoss", "MGDPresetName", "WEIGHTS"]

MGDPresetName = Literal["two_stage", "one_stage"]
MaskOn = Literal["pixels", "channels"]

# The authors' configurations: Faster and Mask R-CNN; RetinaNet, RepPoints and SOLO.
WEIGHTS: dict[str, float] = {"two_stage": 5e-7, "one_stage": 2e-5}
MASK_RATIOS: dict[str, float] = {"two_stage": 0.45, "one_stage": 0.65}
LEVELS = 5

_BITS = 0xFFFFFFFF  # of a random number
Number = TypeVar("Number", int, Tensor)


class MGDLoss(LevelwiseLoss):
    """The loss of MGD: the squared distance of what is generated from the student's masked map to the teacher's map.

    Random pixels of the student's map are set to 0. A 3x3 convolution, a ReLU and another 3x3 convolution, of the
    teacher's width, have to make the whole teacher's map of what is left. They are layers of the loss, to be trained
    with the student and thrown away with the loss.

    The masks depend on ``seed``, on the number of training calls so far and on a pixel's place among all pixels of the
    call. They are the same on every device, and a training that is resumed from ``state_dict()`` draws those that it
    would have drawn.

    Args:
        student_channels: the student's width, an int or a list of one per level.
        teacher_channels: the teacher's; the student's by default. Where they differ a learned 1x1 convolution adapts
            the student first.
        num_levels: how many levels, where the channels are ints; 5 by default.
        preset: ``"two_stage"`` or ``"one_stage"``, which choose weight and mask ratio.
        weight: of the loss, instead of the preset's, >= 0: a number or a list of one per level. A level of weight 0 is
            left out.
        mask_ratio: which part of the pixels is masked, in [0, 1]; the preset's by default.
        mask_on: ``"pixels"``, all channels of which are masked together, or ``"channels"``, whole ones.
        seed: an int of the masks. In distributed training give each process its own.
        resize: whose maps are resized (bilinear) where the sizes differ, ``"student"`` or ``"teacher"``. None: other
            sizes are an error.

    Attributes:
        draws: how many training calls there were, a scalar int64 buffer.

    Warns:
        UserWarning: as :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: channels, levels or another argument out of its range.
        TypeError: channels or a seed that are no ints.
        RuntimeError: at the first call, a layer inside the loss with hooks, which would never run.

    Example:
        >>> loss = MGDLoss(64, num_levels=2)
        >>> student = [torch.randn(2, 64, size, size) for size in (8, 4)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> list(loss(student, teacher))
        ['loss_mgd']

    Source: Yang et al., "Masked Generative Distillation", ECCV 2022; the constants are those of the authors'
    configurations for detectors.
    """

    term_names = ("loss_mgd",)
    draws: Tensor

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        preset: MGDPresetName = "two_stage",
        weight: Weight | None = None,
        mask_ratio: float | None = None,
        mask_on: MaskOn = "pixels",
        seed: int = 0,
        resize: Side | None = None,
    ):
        weight = preset_weight(preset, weight, WEIGHTS)
        levels = count_levels(student_channels, teacher_channels, num_levels, LEVELS)
        super().__init__(student_channels, teacher_channels, levels, weight, resize)
        ratio = MASK_RATIOS[preset] if mask_ratio is None else mask_ratio
        self.mask_ratio = check_number(ratio, "a number in [0, 1]", lambda value: 0 <= value <= 1, "mask_ratio")
        self.mask_on = check_choice(mask_on, ("pixels", "channels"), "mask_on")
        if not is_int(seed):
            raise TypeError(f"seed must be an int, got {seed!r}")
        self.seed, self._key = int(seed), _mixed(int(seed))
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self.generations = nn.ModuleList(
            nn.Identity() if weight == 0 else _generation(width)
            for weight, (_, width) in zip(self.weights, self.widths, strict=True)
        )

    def transformed(self, students: list[Tensor], levels: list[int]) -> list[Tensor]:
        """Return what is generated from the masked maps of ``levels``."""
        if self.training:
            self.draws += 1
        return [
            _generated(student * mask.to(student.dtype), self.generations[level])
            for student, mask, level in zip(students, self.masks(students), levels, strict=True)
        ]

    def masks(self, maps: list[Tensor]) -> list[Tensor]:
        """Return the current masks of ``maps``, each (N, 1, H, W) or (N, C, 1, 1): False where it is masked."""
        shapes = [(len(x), 1, *x.shape[2:]) if self.mask_on == "pixels" else (len(x), x.shape[1], 1, 1) for x in maps]
        counts = [shape[0] * shape[1] * shape[2] * shape[3] for shape in shapes]
        index = torch.arange(sum(counts), device=maps[0].device)
        numbers = _mixed(_mixed(index) ^ _mixed(self.draws.to(index.device) + self._key))
        masks = (numbers >= round(self.mask_ratio * (_BITS + 1))).split(counts)
        return [mask.view(shape) for mask, shape in zip(masks, shapes, strict=True)]

    def level_losses(self, students: list[Tensor], teachers: list[Tensor], *others: list[Any]) -> Tensor:
        """Return the squared distance of each level by image, ``(levels,)``."""
        absent: list[Tensor | None] = [None] * len(students)
        return dispatch.masked_l2_squares(students, teachers, absent, absent) / max(len(students[0]), 1)


def _generation(width: int) -> nn.Sequential:
    """Return the layers that make the teacher's map."""
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))


def _generated(masked: Tensor, layers: nn.Module) -> Tensor:
    first, _, last = layers.children()
    return convolved(convolved(masked, first).relu_(), last)


def _mixed(x: Number) -> Number:
    """Return 32 random bits for each integer: multiplications and shifts that let each bit of ``x`` change about half.

    Source of the constants: Wellons, "Prospecting for hash functions", 2018 (lowbias32).
    """
    x = x & _BITS
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _BITS
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _BITS
    return x ^ (x >> 16)
