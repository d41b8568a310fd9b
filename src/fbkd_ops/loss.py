"""The FBKD loss as a module: attention-masked features, pooled attention, non-local relations."""

import functools
import math
import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from . import dispatch
from ._numerics import accumulation_dtype, constant_vector, recordable, without_autocast
from ._validation import Features, check_flag, paired_levels, warn_of_clamping
from ._warnings import can_watch
from .autograd.channel_l2 import ChannelLevels, channel_l2_squares
from .autograd.sum_over_processes import SumOverProcessesFunction
from .autograd.weighted_roots import weighted_roots
from .feature_norm import standardised
from .level import FBKDLevel, FBKDLevels
from .losses.feature_loss import Channels, FeatureLoss, count_levels
from .ops.adapted_masked_l2 import AdaptedLevels
from .ops.spatial_l2 import SpatialLevels
from .presets import TERMS, LossArguments, Overrides, PresetName, default_num_levels, resolve_settings
from .types import AttentionPool, present

if sys.version_info >= (3, 11):
    from typing import Unpack
elif TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FBKDLevel", "FBKDLoss"]


class TermSquares(NamedTuple):
    """One term's sums of squares."""

    term: str  # one of presets.TERMS
    levels: list[int]  # indices of the levels that have it
    squares: Tensor  # (len(levels),)


class FBKDLoss(FeatureLoss):
    """The feature-based knowledge-distillation loss for detectors.

    Each level has a learned adaptation of the student for each term, and two non-local blocks, one a side; all of
    them are made here and must be in the optimizer. A term whose weight is 0 is left out with its parameters, so
    that every parameter receives a gradient in every step.

    Args:
        student_channels: the student's width, an int or a list of one per level. Every argument that takes one value
            per level takes a list of any kind: a tuple, a range, a NumPy array, OmegaConf's.
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
            ``pooled_terms``, ``normalize``, ``feature_norm``.

    Warns:
        UserWarning: once each, in training outside compiled graphs: student features without a gradient, teacher
            features with one, parameters that an optimizer left unchanged for ten backward passes, a level whose term
            is not finite (on a GPU with the next call, so that nothing waits for it).

    Raises:
        ValueError: channels, levels, a preset or an override's value out of its range.
        TypeError: an unknown override, channels that are no ints, a flag that is no bool.
        RuntimeError: at the first call, a layer inside the loss with hooks. They would never run, because the layers'
            weights are read without a call. An old-style ``weight_norm``, ``spectral_norm`` or pruning is such a hook;
            ``torch.nn.utils.parametrizations`` work.

    Example:
        >>> loss = FBKDLoss(256, num_levels=2)
        >>> student = [torch.randn(1, 256, 32, 32), torch.randn(1, 256, 16, 16)]
        >>> teacher = [torch.randn_like(level) for level in student]
        >>> sorted(loss(student, teacher))
        ['loss_fbkd_channel', 'loss_fbkd_feature', 'loss_fbkd_relation', 'loss_fbkd_spatial']

    Source: Zhang & Ma 2021 for the terms; ``presets.py`` for the constants and where they come from.
    """

    term_names = tuple(f"loss_fbkd_{term}" for term in TERMS)

    def __init__(
        self,
        student_channels: Channels,
        teacher_channels: Channels | None = None,
        *,
        num_levels: int | None = None,
        preset: PresetName = "two_stage",
        memory_efficient: bool = False,
        synchronize: bool = False,
        **overrides: "Unpack[Overrides]",
    ):
        default = default_num_levels(preset)
        num_levels = count_levels(student_channels, teacher_channels, num_levels, default, preset)
        super().__init__(student_channels, teacher_channels, num_levels)
        self.preset = preset
        self.memory_efficient = check_flag(memory_efficient, "memory_efficient")
        self.synchronize = check_flag(synchronize, "synchronize")
        self.levels = FBKDLevels()
        for index, (settings, (student, teacher)) in enumerate(
            zip(resolve_settings(preset, num_levels, overrides), self.widths, strict=True)
        ):
            try:
                self.levels.append(FBKDLevel(student, teacher, settings))
            except ValueError as error:
                raise ValueError(f"level {index}: {error}") from None

    @classmethod
    def from_features(  # type: ignore[override]  # narrower than the base class's: the overrides are completed
        cls, student_features: Features, teacher_features: Features, **arguments: "Unpack[LossArguments]"
    ) -> "FBKDLoss":
        """Return a loss for features like these: channels and levels are read off them.

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
        return super().from_features(student_features, teacher_features, **arguments)

    def forward(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]:
        """Return the four terms of the loss.

        Args:
            student_features: one ``(N, Cs, H, W)`` a level, in a list, a tuple or a dict.
            teacher_features: one ``(N, Ct, H, W)`` a level; two dicts are matched by key.

        Returns:
            Scalars ``loss_fbkd_feature``, ``loss_fbkd_channel``, ``loss_fbkd_spatial`` and ``loss_fbkd_relation``,
            weighted and summed over levels, in float32 (float64 where a feature is float64). Of a narrower map beside a
            float64 one the means and masks are float32's: the relation term is exact to float64 then, the other three
            to 1e-8.

        Raises:
            TypeError: features that are no list or dict, a level that is no dense floating-point tensor.
            ValueError: levels, channels, N, H, W or devices that do not agree; parameters on different devices.
            RuntimeError: at the first call, a layer inside the loss with hooks.
        """
        pairs = paired_levels(student_features, teacher_features)
        self._check(pairs)
        students = [student for _, student, _, _ in pairs]
        teachers = [recordable(teacher.detach()) for _, _, _, teacher in pairs]
        with without_autocast(students[0]):
            squares = self._squares(students, teachers)
            terms = self._weighted_terms(squares, students, teachers)
        if self.training and can_watch(students[0]):
            self._gradient_watch.see(students, [teacher for _, _, _, teacher in pairs])
            self._update_watch.see(self, terms)
        return terms

    if TYPE_CHECKING:

        def __call__(self, student_features: Features, teacher_features: Features) -> dict[str, Tensor]: ...

    def _squares(self, students: list[Tensor], teachers: list[Tensor]) -> list[TermSquares]:
        """Return the sums under the roots of every term and level."""
        if not dispatch.is_literal(students[0]):
            return self._fused_squares(students, teachers)
        levels = [dispatch.literal_terms(*level) for level in zip(students, teachers, self.levels, strict=True)]
        chosen = {term: [index for index, roots in enumerate(levels) if term in roots] for term in TERMS}
        return [
            TermSquares(term, indices, torch.stack([levels[index][term] for index in indices]).square())
            for term, indices in chosen.items()
            if indices
        ]

    def _fused_squares(self, students: list[Tensor], teachers: list[Tensor]) -> list[TermSquares]:
        """Return the sums, with one launch for all levels of each step that has kernels."""
        students, pools_s, pools_t, squares = self._feature_squares(students, teachers)
        indices = self._levels_with("channel_adaptation")
        if indices:
            squares.append(TermSquares("channel", indices, _channel_squares(*self._select(indices, pools_s, pools_t))))
        indices = self._levels_with("spatial_adaptation")
        if indices:
            squares.append(TermSquares("spatial", indices, _spatial_squares(*self._select(indices, pools_s, pools_t))))
        indices = self._levels_with("relation_adaptation")
        if indices:
            sides = self._select(indices, students, teachers, pools_s, pools_t)
            terms = [level.relation_term(*side) for level, *side in zip(*sides, strict=True)]
            relations = torch.stack(dispatch.relation_squares(terms, self.memory_efficient))
            squares.append(TermSquares("relation", indices, relations))
        return squares

    def _feature_squares(
        self, students: list[Tensor], teachers: list[Tensor]
    ) -> tuple[list[Tensor], list[AttentionPool], list[AttentionPool], list[TermSquares]]:
        """Return the students and both sides' means for the other terms to start from, and the feature term's sums."""
        indices = self._levels_with("feature_adaptation")
        with torch.no_grad():
            pools = dispatch.attention_pools([*teachers, *(students[index] for index in indices)])
        students, pools_t = list(students), pools[: len(teachers)]
        pools_s: dict[int, AttentionPool] = {}
        others = [index for index in range(len(students)) if index not in indices]
        if others:
            found = dispatch.attention_pools([students[index] for index in others])
            for index, pool in zip(others, found, strict=True):
                pools_s[index] = pool
        found_squares = []
        if indices:
            levels, sides, teacher_sides, teacher_pools = self._select(indices, students, teachers, pools_t)
            outputs, means, squares = _feature_terms(
                levels, sides, teacher_sides, teacher_pools, pools[len(teachers) :], self.memory_efficient
            )
            for index, student, pool in zip(indices, outputs, means, strict=True):
                students[index], pools_s[index] = student, pool
            found_squares.append(TermSquares("feature", indices, squares))
        return students, [pools_s[index] for index in range(len(students))], pools_t, found_squares

    def _levels_with(self, layer: str) -> list[int]:
        return [index for index, level in enumerate(self.levels) if getattr(level, layer) is not None]

    def _select(self, indices: list[int], *lists: list[Any]) -> list[list[Any]]:
        """Return the levels of these indices, and their entries of each list."""
        entries: list[Any] = [self.levels, *lists]
        return [[values[index] for index in indices] for values in entries]

    def _weighted_terms(
        self, squares: list[TermSquares], students: list[Tensor], teachers: list[Tensor]
    ) -> dict[str, Tensor]:
        """Return the weighted terms, from the sums of squares of every level."""
        dtype = accumulation_dtype(*students, *teachers)
        if not squares:
            return {name: students[0].new_zeros((), dtype=dtype) for name in self.term_names}
        names = [(index, each.term) for each in squares for index in each.levels]
        sums = torch.cat([each.squares.to(dtype) for each in squares])  # (K,)
        sums, scales = self._sums_and_scales(sums, names, teachers)
        roots, values = weighted_roots(sums, scales, [len(each.levels) for each in squares])
        if self.training and can_watch(sums):
            self._finite_watch.see(roots, names, students, teachers)
        terms = {f"loss_fbkd_{each.term}": value for each, value in zip(squares, values, strict=True)}
        return {name: terms[name] if name in terms else sums.new_zeros(()) for name in self.term_names}

    def _sums_and_scales(
        self, sums: Tensor, names: list[tuple[int, str]], teachers: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return the sums ``(K,)``, over all processes where asked for, and the factors ``(K,)`` of their roots."""
        weights: list[float] = []
        counts: list[float] = []
        for index, term in names:
            weights.append(getattr(self.levels[index].settings, f"{term}_weight"))
            images, channels, height, width = teachers[index].shape
            counts.append(self.levels[index].mean_count(term, (images, channels, height, width)))
        constant = functools.partial(constant_vector, dtype=sums.dtype, device=sums.device, keep=can_watch(sums))
        if not self.synchronize:
            scales = [weight / math.sqrt(max(count, 1)) for weight, count in zip(weights, counts, strict=True)]
            return sums, constant(scales)
        sums, total = _over_processes(sums, constant(counts))
        return sums, constant(weights) * total.clamp(min=1).rsqrt()

    def _check(self, pairs: list[tuple[str, Tensor, str, Tensor]]) -> None:
        self.check_levels(pairs)
        for level, (name, student, _, _) in zip(self.levels, pairs, strict=True):
            level.check_statistics(student, name)
            if level.relation_adaptation is not None:
                warn_of_clamping(level.settings.stride, student)


def _feature_terms(
    levels: list[FBKDLevel],
    students: list[Tensor],
    teachers: list[Tensor],
    pools_t: list[AttentionPool],
    pools_s: list[AttentionPool],
    memory_efficient: bool,
) -> tuple[list[Tensor], list[AttentionPool], Tensor]:
    """Students, their means and the feature terms squared ``(levels,)`` of levels that all have this term.

    The students and the means are outputs of the feature term's op, for the other terms to start from: what flows
    back into them joins the term's own gradient as that is written. ``pools_s`` are the same means without gradient.
    """
    with torch.no_grad():
        requests = [level.mask_requests(*pools) for level, *pools in zip(levels, pools_s, pools_t, strict=True)]
        found = iter(dispatch.attention_masks([request for level in requests for request in level]))
    masks: list[list[Tensor | None]] = [[*[next(found) for _ in level], None] for level in requests]
    layers = [present(level.feature_adaptation) for level in levels]
    arguments = AdaptedLevels(
        students,
        [layer.weight.flatten(1) for layer in layers],
        [present(layer.bias) for layer in layers],
        teachers,
        [mask[0] for mask in masks],
        [mask[1] for mask in masks],
    )
    arguments = standardised(arguments, [level.settings.feature_norm == "channel" for level in levels])
    squares, pools_s, students = dispatch.student_pyramid(arguments, pools_s, memory_efficient)
    return students, pools_s, squares


def _over_processes(sums: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Add up sums and numbers of squares ``(K,)`` over all processes; one alone has them already."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return sums, counts
    return SumOverProcessesFunction.apply(torch.cat([sums, counts])).chunk(2)


def _channel_squares(levels: list[FBKDLevel], pools_s: list[AttentionPool], pools_t: list[AttentionPool]) -> Tensor:
    """Return the channel term squared ``(levels,)`` of levels that all have this term."""
    layers = [present(level.channel_adaptation) for level in levels]
    return channel_l2_squares(
        ChannelLevels(
            [level.pooled(pool, "channel") for level, pool in zip(levels, pools_s, strict=True)],
            [layer.weight for layer in layers],
            [layer.bias for layer in layers],
            [level.pooled(pool, "channel") for level, pool in zip(levels, pools_t, strict=True)],
        )
    )


def _spatial_squares(levels: list[FBKDLevel], pools_s: list[AttentionPool], pools_t: list[AttentionPool]) -> Tensor:
    """Return the spatial term squared ``(levels,)`` of levels that all have this term."""
    layers = [present(level.spatial_adaptation) for level in levels]
    arguments = SpatialLevels(
        [level.pooled(pool, "spatial") for level, pool in zip(levels, pools_s, strict=True)],
        [layer.weight.view(3, 3) for layer in layers],
        [present(layer.bias) for layer in layers],
        [level.pooled(pool, "spatial") for level, pool in zip(levels, pools_t, strict=True)],
    )
    return dispatch.spatial_l2_squares(arguments)
