"""One level of the loss: its learned layers, and what its terms are computed from."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, overload

import torch.nn.functional as F
from torch import Tensor, nn

from .non_local.batch_norm import synchronizes, uses_batch_statistics
from .non_local.block import NonLocalBlock2d
from .non_local.relation import RelationTerm
from .ops.attention_masks import MaskRequest
from .presets import TERMS, LevelSettings
from .types import AttentionPool, present

__all__ = ["FBKDLevel", "FBKDLevels"]


class FBKDLevel(nn.Module):
    """The adaptations, the non-local blocks and the unweighted terms of one level.

    Args:
        student_channels: Cs.
        teacher_channels: Ct.
        settings: the level's constants.
    """

    def __init__(self, student_channels: int, teacher_channels: int, settings: LevelSettings):
        super().__init__()
        self.student_channels, self.teacher_channels = student_channels, teacher_channels
        self.settings = settings
        _check_channel_mask(student_channels, teacher_channels, settings)
        has = {term: getattr(settings, f"{term}_weight") > 0 for term in TERMS}
        pointwise = (student_channels, teacher_channels, 1)
        self.feature_adaptation = nn.Conv2d(*pointwise) if has["feature"] else None
        self.channel_adaptation = nn.Linear(student_channels, teacher_channels) if has["channel"] else None
        self.spatial_adaptation = nn.Conv2d(1, 1, 3, padding=1) if has["spatial"] else None
        self.relation_adaptation = nn.Conv2d(*pointwise) if has["relation"] else None
        self.student_non_local = _non_local_block(student_channels, settings) if has["relation"] else None
        self.teacher_non_local = _non_local_block(teacher_channels, settings) if has["relation"] else None

    def mean_count(self, term: str, shape: tuple[int, int, int, int]) -> int:
        """How many squares the term is the mean of; 0 under ``normalize="none"``, where it is their sum.

        Args:
            term: one of ``presets.TERMS``.
            shape: the teacher's ``(N, Ct, H, W)``.
        """
        if self.settings.normalize == "none":
            return 0
        n, channels, height, width = shape
        return {"channel": n * channels, "spatial": n * height * width}.get(term, n * channels * height * width)

    def check_statistics(self, student: Tensor, name: str) -> None:
        """Refuse one value a channel under a BatchNorm in training, as BatchNorm does, before anything is updated.

        How many values a SyncBatchNorm of several processes has is known later only.
        """
        norm = None if self.student_non_local is None else self.student_non_local.norm
        own = uses_batch_statistics(norm) and not synchronizes(norm)
        if own and student.shape[0] * student.shape[2] * student.shape[3] == 1:
            raise ValueError(
                f"{name}: Expected more than 1 value per channel when training, got input size {tuple(student.shape)}; "
                "use a larger batch, norm='none' or relation_weight=0 for this level"
            )

    def mask_requests(self, pool_s: AttentionPool, pool_t: AttentionPool) -> list[MaskRequest]:
        """Return the inputs of the feature term's spatial mask, and of its channel mask if it has one."""
        settings = self.settings
        spatial = (pool_s.spatial_attention, pool_t.spatial_attention, settings.spatial_temperature)
        requests = [MaskRequest(*spatial, settings.mask_rule)]
        if settings.use_channel_mask:
            channel = (self._channel_attention(pool_s), pool_t.channel_attention, settings.channel_temperature)
            requests.append(MaskRequest(*channel, settings.mask_rule))
        return requests

    def _channel_attention(self, pool_s: AttentionPool) -> Tensor | None:
        """Return the student's part ``(N, Ct)`` of the channel mask; the channel term's layer adapts another width."""
        if self.settings.channel_mask_source == "teacher":
            return None
        attention = pool_s.channel_attention.detach()
        return attention if self.student_channels == self.teacher_channels else self._adapted_channels(attention)

    def _adapted_channels(self, channels: Tensor) -> Tensor:
        """Apply the channel term's linear layer to ``(N, Cs)``, giving ``(N, Ct)``."""
        layer = present(self.channel_adaptation)
        return F.linear(channels, layer.weight.to(channels.dtype), layer.bias.to(channels.dtype))

    def pooled(self, pool: AttentionPool, axis: str) -> Tensor:
        """Return the mean that the channel or the spatial term compares: plain, or of absolute values."""
        return getattr(pool, f"{axis}_{self.settings.pooled_terms}")

    def relation_term(
        self, student: Tensor, teacher: Tensor, pool_s: AttentionPool, pool_t: AttentionPool
    ) -> RelationTerm:
        """Return the inputs of the relation term of ``(N, Cs, H, W)`` and ``(N, Ct, H, W)``."""
        layer = present(self.relation_adaptation)
        return RelationTerm(
            student,
            teacher,
            present(self.student_non_local).block(),
            present(self.teacher_non_local).block(),
            layer.weight,
            present(layer.bias),
            pool_s.channel_mean,
            pool_t.channel_mean,
        )


if TYPE_CHECKING:

    class FBKDLevels(nn.ModuleList):
        """The type of :class:`torch.nn.ModuleList` with levels in it."""

        @overload
        def __getitem__(self, idx: slice) -> "FBKDLevels": ...
        @overload
        def __getitem__(self, idx: int) -> FBKDLevel: ...
        def __getitem__(self, idx: Any) -> Any: ...
        def __iter__(self) -> Iterator[FBKDLevel]: ...

else:
    FBKDLevels = nn.ModuleList


def _non_local_block(channels: int, settings: LevelSettings) -> NonLocalBlock2d:
    return NonLocalBlock2d(
        channels,
        settings.inner_width(channels),
        mode=settings.mode,
        stride=settings.stride,
        pool_order=settings.pool_order,
        use_scale=settings.use_scale,
        norm=settings.norm,
        conv_out_bias=settings.conv_out_bias,
    )


def _check_channel_mask(student_channels: int, teacher_channels: int, settings: LevelSettings) -> None:
    """Require the channel term's layer where the student's half of the channel mask has another width."""
    needs_layer = (
        settings.use_channel_mask and settings.channel_mask_source == "both" and student_channels != teacher_channels
    )
    if needs_layer and settings.feature_weight > 0 and settings.channel_weight == 0:
        raise ValueError(
            f"channel_mask_source='both' with {student_channels} student and {teacher_channels} teacher channels "
            "needs the channel term's linear layer, but channel_weight is 0 and would never train it; "
            "use channel_mask_source='teacher' or a channel_weight > 0"
        )
