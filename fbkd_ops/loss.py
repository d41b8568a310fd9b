"""The FBKD loss as a module: attention-masked features, pooled attention, non-local relations."""

import math
from collections.abc import Sequence
from typing import Any, Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import backends, reference
from ._batch_norm import synchronizes, uses_batch_statistics
from ._numerics import accumulation_dtype, root, without_autocast
from ._validation import Features, check_channels, check_same_device, is_int, paired_levels, warn_of_clamping
from ._watch import FiniteWatch, GradientWatch, UpdateWatch, can_watch
from .autograd.adapted_masked_l2 import AdaptedLevels, student_pyramid
from .autograd.attention_masks import MaskRequest, attention_masks
from .autograd.attention_pool import attention_pools
from .autograd.sum_over_processes import SumOverProcessesFunction
from .non_local_block import NonLocalBlock2d
from .presets import TERMS, LevelSettings, default_num_levels, resolve_settings
from .relation import RelationTerm, relation_squares
from .types import AttentionPool

__all__ = ["FBKDLevel", "FBKDLoss"]

Channels = Union[int, Sequence[int]]


class FBKDLoss(nn.Module):
    """The feature-based knowledge-distillation loss for detectors.

    Each level has a learned adaptation of the student for each term, and two non-local blocks, one a side; all of
    them are made here and must be in the optimizer. A term whose weight is 0 is left out with its parameters, so
    that every parameter receives a gradient in every step.

    Args:
        student_channels: the student's width, an int or one int a level.
        teacher_channels: the teacher's; the student's by default.
        num_levels: how many levels, where the channels are ints; by default what the preset was written for
            (``"paper"`` fits any number and needs it).
        preset: ``"two_stage"``, ``"one_stage"``, ``"mmrazor"`` or ``"paper"``.
        memory_efficient: whether forward keeps no feature map for backward, which then repeats the products over all
            pixels; else it keeps up to two a level, and in modes other than ``dot_product`` both blocks' responses.
        synchronize: whether the sums under the roots run over the batches of all processes of
            ``torch.distributed``'s default group. Under ``DistributedDataParallel`` the gradients are then those of
            one process with the joined batch; else those of the mean of the processes' own losses.
        **overrides: any field of :class:`fbkd_ops.LevelSettings`, one value or a list of one a level:
            ``spatial_temperature``, ``channel_temperature``, ``mask_rule``, ``use_channel_mask``,
            ``channel_mask_source``, ``feature_weight``, ``channel_weight``, ``spatial_weight``, ``relation_weight``,
            ``inter_channels``, ``stride``, ``pool_order``, ``mode``, ``use_scale``, ``norm``, ``conv_out_bias``,
            ``pooled_terms``, ``normalize``.

    Warns:
        UserWarning: once each, in training outside compiled graphs: student features without a gradient, teacher
            features with one, parameters that an optimizer left unchanged for ten backward passes, a level whose term
            is not finite (on a GPU with the next call, so that nothing waits for it).

    Raises:
        ValueError: channels, levels, a preset or an override's value out of its range.
        TypeError: an unknown override.

    Example:
        >>> loss = FBKDLoss(256, num_levels=2)
        >>> student = [torch.randn(1, 256, 32, 32), torch.randn(1, 256, 16, 16)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> sorted(loss(student, teacher))
        ['loss_fbkd_channel', 'loss_fbkd_feature', 'loss_fbkd_relation', 'loss_fbkd_spatial']

    Source: Zhang & Ma 2021 for the terms; ``fbkd_ops/presets.py`` for the constants and where they come from.
    """

    term_names = tuple(f"loss_fbkd_{term}" for term in TERMS)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Optional[Channels] = None,
        *,
        num_levels: Optional[int] = None,
        preset: str = "two_stage",
        memory_efficient: bool = False,
        synchronize: bool = False,
        **overrides: Any,
    ):
        super().__init__()
        teacher_channels = student_channels if teacher_channels is None else teacher_channels
        num_levels = _count_levels(student_channels, teacher_channels, num_levels, preset)
        widths = zip(
            _level_widths(student_channels, num_levels, "student_channels"),
            _level_widths(teacher_channels, num_levels, "teacher_channels"),
        )
        self.preset, self.memory_efficient, self.synchronize = preset, memory_efficient, synchronize
        self._gradient_watch, self._finite_watch, self._update_watch = GradientWatch(), FiniteWatch(), UpdateWatch()
        self.levels = nn.ModuleList()
        for index, (settings, (student, teacher)) in enumerate(
            zip(resolve_settings(preset, num_levels, overrides), widths)
        ):
            try:
                self.levels.append(FBKDLevel(student, teacher, settings))
            except ValueError as error:
                raise ValueError(f"level {index}: {error}") from None

    @classmethod
    def from_features(cls, student_features: Features, teacher_features: Features, **arguments: Any) -> "FBKDLoss":
        """A loss for features like these: channels and levels are read off them.

        Args:
            student_features, teacher_features: lists, tuples or dicts of ``(N, C, H, W)``, as for the call.
            **arguments: ``preset`` and overrides, as for the constructor.

        Returns:
            The loss, on the features' device, in float32.

        Example:
            >>> features = {"p3": torch.randn(1, 64, 32, 32), "p4": torch.randn(1, 128, 16, 16)}
            >>> len(FBKDLoss.from_features(features, features, preset="one_stage").levels)
            2
        """
        pairs = paired_levels(student_features, teacher_features)
        loss = cls(
            [student.shape[1] for _, student, _, _ in pairs],
            [teacher.shape[1] for _, _, _, teacher in pairs],
            **arguments,
        )
        return loss.to(pairs[0][1].device)

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        """The four terms of the loss.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.

        Returns:
            Scalars ``loss_fbkd_feature``, ``loss_fbkd_channel``, ``loss_fbkd_spatial`` and ``loss_fbkd_relation``,
            weighted and summed over levels, in float32 (float64 for float64 features).

        Raises:
            TypeError: features that are no list, tuple or dict, a level that is no floating-point tensor.
            ValueError: levels, channels, N, H, W or devices that do not agree.
        """
        pairs = paired_levels(student_features, teacher_features)
        self._check(pairs)
        students = [student for _, student, _, _ in pairs]
        teachers = [teacher.detach() for _, _, _, teacher in pairs]
        with without_autocast(students[0]):
            backend = backends.resolve("relation_loss", students[0])
            squares = self._squares(backend, students, teachers)
            terms = self._weighted(squares, students, teachers)
        if self.training and can_watch(students[0]):
            self._gradient_watch.see(students, [teacher for _, _, _, teacher in pairs])
            self._update_watch.see(self, terms)
        return terms

    def _squares(self, backend: str, students: list[Tensor], teachers: list[Tensor]) -> dict[tuple[int, str], Tensor]:
        """The sum under the root of each level's terms; ``backend`` of the relation term."""
        if backend == "reference":
            terms = [reference.level_terms(*level) for level in zip(students, teachers, self.levels)]
            return {(index, term): value.square() for index, level in enumerate(terms) for term, value in level.items()}
        return self._fused(backend, students, teachers)

    def _fused(self, backend: str, students: list[Tensor], teachers: list[Tensor]) -> dict[tuple[int, str], Tensor]:
        """The sums, with one launch for all levels of each step that has kernels."""
        pools_t = attention_pools(teachers)
        students, pools_s, features = self._start(students, teachers, pools_t)
        having = [index for index, level in enumerate(self.levels) if level.relation_adaptation is not None]
        relations = [
            self.levels[index].relation_term(students[index], teachers[index], pools_s[index], pools_t[index])
            for index in having
        ]
        relations = dict(zip(having, relation_squares(backend, relations, self.memory_efficient)))
        squares = {}
        for index, level in enumerate(self.levels):
            pooled = level.pooled_squares(pools_s[index], pools_t[index])
            squares |= {(index, term): value for term, value in pooled.items()}
            if index in features:
                squares[index, "feature"] = features[index]
            if index in relations:
                squares[index, "relation"] = relations[index]
        return squares

    def _weighted(
        self, squares: dict[tuple[int, str], Tensor], students: list[Tensor], teachers: list[Tensor]
    ) -> dict[str, Tensor]:
        """The loss's terms from the sums of each level's."""
        dtype = accumulation_dtype(*students, *teachers)
        totals = {name: students[0].new_zeros((), dtype=dtype) for name in self.term_names}
        if not squares:
            return totals
        sums = torch.stack([square.to(dtype) for square in squares.values()])  # (K,)
        elements = [self.levels[index].elements(term, teachers[index].shape) for index, term in squares]
        if self.synchronize:
            sums, elements = _over_processes(sums, elements)
        roots = root(sums)
        if self.training and can_watch(sums):
            self._finite_watch.see(roots, list(squares), students, teachers)
        for (index, term), value, count in zip(squares, roots.unbind(), elements):
            name = f"loss_fbkd_{term}"
            totals[name] = totals[name] + self.levels[index].term_scale(term, count) * value
        return totals

    def _start(
        self, students: list[Tensor], teachers: list[Tensor], pools_t: list[AttentionPool]
    ) -> tuple[list[Tensor], list[AttentionPool], dict[int, Tensor]]:
        """The students and their means for the other terms to start from, and the feature term's sum of each level."""
        having = [index for index, level in enumerate(self.levels) if level.feature_adaptation is not None]
        lacking = [index for index in range(len(self.levels)) if index not in having]
        students, pools_s, features = list(students), [None] * len(students), {}
        if lacking:
            for index, pool in zip(lacking, attention_pools([students[index] for index in lacking])):
                pools_s[index] = pool
        if having:
            chosen = [self.levels[index] for index in having]
            sides = ([side[index] for index in having] for side in (students, teachers, pools_t))
            for index, *outputs in zip(having, *_feature_terms(chosen, *sides, self.memory_efficient)):
                students[index], pools_s[index], features[index] = outputs
        return students, pools_s, features

    def check_levels(self, pairs: list[tuple[str, Tensor, str, Tensor]]) -> None:
        """Refuse features of other levels, widths or devices than the loss was made for.

        Args:
            pairs: what :func:`fbkd_ops._validation.paired_levels` returns.
        """
        if len(pairs) != len(self.levels):
            raise ValueError(
                f"student_features must have {len(self.levels)} levels, as the loss was made with, got {len(pairs)}"
            )
        for level, (student_name, student, teacher_name, teacher) in zip(self.levels, pairs):
            check_channels(student, level.student_channels, student_name)
            check_channels(teacher, level.teacher_channels, teacher_name)
            check_same_device(student, pairs[0][1], student_name, pairs[0][0])
        parameter = next(self.parameters(), None)
        if parameter is not None:
            check_same_device(pairs[0][1], parameter, pairs[0][0], "the loss's parameters")

    def _check(self, pairs: list[tuple[str, Tensor, str, Tensor]]) -> None:
        self.check_levels(pairs)
        for level, (name, student, _, _) in zip(self.levels, pairs):
            level.check_statistics(student, name)
            if level.relation_adaptation is not None:
                warn_of_clamping(level.settings.stride, student)


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

    def pooled_squares(self, pool_s: AttentionPool, pool_t: AttentionPool) -> dict[str, Tensor]:
        """The channel and the spatial term squared, where they have a weight, from the four means of both sides."""
        terms = {}
        if self.channel_adaptation is not None:
            s, t = self._pooled(pool_s, "channel"), self._pooled(pool_t, "channel")  # (N, Cs), (N, Ct)
            dtype = accumulation_dtype(s, t)
            terms["channel"] = (t.to(dtype) - self._adapted_channels(s.to(dtype))).square().sum()
        if self.spatial_adaptation is not None:
            s, t = self._pooled(pool_s, "spatial"), self._pooled(pool_t, "spatial")  # (N, H, W)
            dtype = accumulation_dtype(s, t)
            terms["spatial"] = (t.to(dtype) - _conv3x3(s.to(dtype), self.spatial_adaptation)).square().sum()
        return terms

    def elements(self, term: str, shape: tuple[int, int, int, int]) -> int:
        """How many squares the term sums; ``shape`` is the teacher's ``(N, Ct, H, W)``."""
        n, channels, height, width = shape
        return {"channel": n * channels, "spatial": n * height * width}.get(term, n * channels * height * width)

    def term_scale(self, term: str, elements: Union[int, Tensor]) -> Union[float, Tensor]:
        """What the term is multiplied with: its weight, over the root of ``elements`` under ``normalize="mean"``."""
        weight = getattr(self.settings, f"{term}_weight")
        if self.settings.normalize == "none":
            return weight
        if isinstance(elements, Tensor):
            return weight * elements.clamp(min=1).rsqrt()
        return weight / math.sqrt(max(elements, 1))

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
        """What the feature term's spatial mask, and its channel mask if it has one, are made from."""
        settings = self.settings
        spatial = (pool_s.spatial_attention, pool_t.spatial_attention, settings.spatial_temperature)
        requests = [MaskRequest(*spatial, settings.mask_rule)]
        if settings.use_channel_mask:
            channel = (self._channel_attention(pool_s), pool_t.channel_attention, settings.channel_temperature)
            requests.append(MaskRequest(*channel, settings.mask_rule))
        return requests

    def _channel_attention(self, pool_s: AttentionPool) -> Optional[Tensor]:
        """The student's part of the channel mask ``(N, Ct)``; another width goes through the channel term's layer."""
        if self.settings.channel_mask_source == "teacher":
            return None
        attention = pool_s.channel_attention.detach()
        return attention if self.student_channels == self.teacher_channels else self._adapted_channels(attention)

    def _adapted_channels(self, channels: Tensor) -> Tensor:
        """The channel term's linear layer on ``(N, Cs)``, ``(N, Ct)``."""
        layer = self.channel_adaptation
        return F.linear(channels, layer.weight.to(channels.dtype), layer.bias.to(channels.dtype))

    def _pooled(self, pool: AttentionPool, axis: str) -> Tensor:
        """What the channel or the spatial term compares: a plain mean or a mean of absolute values."""
        return getattr(pool, f"{axis}_{self.settings.pooled_terms}")

    def relation_term(
        self, student: Tensor, teacher: Tensor, pool_s: AttentionPool, pool_t: AttentionPool
    ) -> RelationTerm:
        """What the relation term of ``(N, Cs, H, W)`` and ``(N, Ct, H, W)`` is made from."""
        layer = self.relation_adaptation
        return RelationTerm(
            student,
            teacher,
            self.student_non_local.block(),
            self.teacher_non_local.block(),
            layer.weight.flatten(1),
            layer.bias,
            pool_s.channel_mean,
            pool_t.channel_mean,
        )


def _feature_terms(
    levels: list[FBKDLevel],
    students: list[Tensor],
    teachers: list[Tensor],
    pools_t: list[AttentionPool],
    memory_efficient: bool,
) -> tuple[list[Tensor], list[AttentionPool], Tensor]:
    """Students, their means and the feature terms squared ``(levels,)`` of levels that all have this term.

    The students and the means are outputs of the feature term's op, for the other terms to start from: what flows
    back into them joins the term's own gradient as that is written.
    """
    with torch.no_grad():
        pools_s = attention_pools(students)
        requests = [level.mask_requests(*pools) for level, *pools in zip(levels, pools_s, pools_t)]
        masks = iter(attention_masks([request for level in requests for request in level]))
        masks = [[next(masks) for _ in level] + [None] for level in requests]
    layers = [level.feature_adaptation for level in levels]
    arguments = AdaptedLevels(
        students,
        [layer.weight.flatten(1) for layer in layers],
        [layer.bias for layer in layers],
        teachers,
        [mask[0] for mask in masks],
        [mask[1] for mask in masks],
    )
    backend = backends.resolve("adapted_masked_l2_loss", students[0])
    if backend == "reference":
        losses = [reference.adapted_masked_l2_loss(*level) for level in zip(*arguments)]
        return students, attention_pools(students), torch.stack(losses).square()
    squares, pools_s, students = student_pyramid(backend, arguments, pools_s, memory_efficient)
    return students, pools_s, squares


def _over_processes(sums: Tensor, elements: list[int]) -> tuple[Tensor, Tensor]:
    """Sums and their numbers of elements ``(K,)`` over all processes; one alone has them already."""
    counts = sums.new_tensor(elements)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums, counts
    return SumOverProcessesFunction.apply(torch.cat([sums, counts])).chunk(2)


def _conv3x3(x: Tensor, layer: nn.Conv2d) -> Tensor:
    """``layer``, one channel to one, on ``x (N, H, W)``, as nine shifted sums.

    torch.compile with dynamic sizes fails on the convolution of this shape.
    """
    height, width = x.shape[1:]
    padded, weight = F.pad(x, (1, 1, 1, 1)), layer.weight[0, 0].to(x.dtype)
    shifted = [weight[i, j] * padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return sum(shifted, layer.bias.to(x.dtype))


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
    """The student's half of the channel mask needs the channel term's layer where the widths differ."""
    needs_layer = (
        settings.use_channel_mask and settings.channel_mask_source == "both" and student_channels != teacher_channels
    )
    if needs_layer and settings.feature_weight > 0 and settings.channel_weight == 0:
        raise ValueError(
            f"channel_mask_source='both' with {student_channels} student and {teacher_channels} teacher channels "
            "needs the channel term's linear layer, but channel_weight is 0 and would never train it; "
            "use channel_mask_source='teacher' or a channel_weight > 0"
        )


def _count_levels(student: Channels, teacher: Channels, num_levels: Optional[int], preset: str) -> int:
    default = default_num_levels(preset)
    lengths = {len(channels) for channels in (student, teacher) if isinstance(channels, Sequence)}
    if num_levels is None and lengths:
        num_levels = max(lengths)
    if num_levels is None:
        num_levels = default
    if num_levels is None:
        raise ValueError(f"num_levels is needed: preset {preset!r} fits any number of levels")
    if not is_int(num_levels) or num_levels < 1:
        raise ValueError(f"num_levels must be an int >= 1, got {num_levels!r}")
    return num_levels


def _level_widths(channels: Channels, num_levels: int, name: str) -> list[int]:
    widths = list(channels) if isinstance(channels, Sequence) else [channels] * num_levels
    if len(widths) != num_levels:
        raise ValueError(f"{name} has {len(widths)} entries, expected an int or {num_levels}, one a level")
    for level, width in enumerate(widths):
        if not is_int(width):
            raise TypeError(f"{name} must be an int or a list of ints, got {width!r} at level {level}")
        if width < 1:
            raise ValueError(f"{name} must be >= 1, got {width} at level {level}")
    return widths
