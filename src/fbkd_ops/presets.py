"""The four parameterisations of FBKD in circulation, and how they resolve to the settings of each level.

A preset is one record of constants; every one of them is an override of :class:`fbkd_ops.FBKDLoss`. A tuple holds one
value per level: with fewer levels than entries the first ones are taken, with more the last one repeats.
"""

import dataclasses
import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, get_args

from ._validation import (
    check_choice,
    check_flag,
    check_number,
    check_positive,
    check_stride,
    did_you_mean,
    is_int,
    values_per_level,
)
from .non_local import modes
from .types import PerLevel

__all__ = [
    "CHOICES",
    "MODES",
    "PRESETS",
    "TERMS",
    "FeatureNorm",
    "LevelSettings",
    "LossArguments",
    "MaskRule",
    "NormName",
    "Overrides",
    "PoolOrder",
    "PresetName",
    "TermWeights",
    "default_num_levels",
    "resolve_settings",
    "size_free_weights",
]

TERMS = ("feature", "channel", "spatial", "relation")
MODES = tuple(modes.MODES)

MaskRule = Literal["average", "joint"]
NormName = Literal["batch", "sync", "frozen", "none"]
PoolOrder = Literal["single", "nested"]
PooledTerms = Literal["mean", "attention"]
ChannelMaskSource = Literal["both", "teacher"]
Normalize = Literal["none", "mean"]
FeatureNorm = Literal["none", "channel"]


@dataclass(frozen=True)
class LevelSettings:
    """Every constant of the loss at one level. The fields are the overrides of ``FBKDLoss``.

    Attributes:
        spatial_temperature: tau of the spatial mask's softmax, > 0.
        channel_temperature: tau of the channel mask's softmax, > 0.
        mask_rule: ``"average"`` (mean of two softmaxes) or ``"joint"`` (softmax of the sum).
        use_channel_mask: whether the feature term is weighted by the channel mask too.
        channel_mask_source: ``"both"`` or ``"teacher"``; with ``"both"`` and different widths, the
            student's channel attention goes through the channel term's linear layer first.
        feature_weight: weight of the feature term, >= 0; a term of weight 0 is left out with its parameters.
        channel_weight: weight of the channel term, >= 0.
        spatial_weight: weight of the spatial term, >= 0.
        relation_weight: weight of the relation term, >= 0.
        inter_channels: inner width of the non-local blocks: an int for both sides, or a float in (0, 1],
            the ratio to each side's own width (rounded down, at least 1).
        stride: total factor by which phi and g are max-pooled, >= 1; clamped to the map.
        pool_order: ``"single"``, or ``"nested"`` for MMRazor's pool by 2 followed by a pool by the rest: the
            same cells, but among equal values another winner.
        mode: how pixels are compared: ``"dot_product"``, ``"embedded_gaussian"``, ``"gaussian"`` or
            ``"concatenation"``.
        use_scale: whether ``embedded_gaussian`` divides by the root of the inner width.
        norm: what follows the block's last convolution: ``"batch"``, ``"sync"`` (the statistics of all processes),
            ``"frozen"`` (fixed statistics, weight and bias) or ``"none"``.
        conv_out_bias: whether that convolution has a bias.
        pooled_terms: whether the channel and spatial terms compare plain means (``"mean"``) or means of
            absolute values (``"attention"``).
        feature_norm: ``"channel"`` for a feature term of maps that are standardised per channel over the batch, the
            student's before the adaptation. The masks and the other terms are those of the maps as they are.
        normalize: ``"none"`` for the paper's root of a sum over the batch, ``"mean"`` for the root of the mean.
    """

    spatial_temperature: float
    channel_temperature: float
    mask_rule: MaskRule
    use_channel_mask: bool
    feature_weight: float
    channel_weight: float
    spatial_weight: float
    relation_weight: float
    inter_channels: int | float
    stride: int
    conv_out_bias: bool
    pool_order: PoolOrder = "single"
    mode: modes.ModeName = "dot_product"
    use_scale: bool = True
    norm: NormName = "batch"
    pooled_terms: PooledTerms = "mean"
    channel_mask_source: ChannelMaskSource = "both"
    normalize: Normalize = "none"
    feature_norm: FeatureNorm = "none"

    def __post_init__(self):
        for name in ("spatial_temperature", "channel_temperature"):
            self._set(name, check_positive(getattr(self, name), name))
        for name in (f"{term}_weight" for term in TERMS):
            self._set(name, check_number(getattr(self, name), "a finite number >= 0", lambda value: value >= 0, name))
        for name in ("use_channel_mask", "conv_out_bias", "use_scale"):
            self._set(name, check_flag(getattr(self, name), name))
        for name, choices in CHOICES.items():
            self._set(name, check_choice(getattr(self, name), choices, name))
        self._set("stride", check_stride(self.stride))
        self._set("inter_channels", _inner_channels(self.inter_channels))

    def _set(self, name: str, value: Any) -> None:
        """Replace NumPy's numbers and flags by Python's own, which the ops take."""
        object.__setattr__(self, name, value)

    def inner_width(self, channels: int) -> int:
        """Return the inner width of a non-local block on ``channels`` channels."""
        if isinstance(self.inter_channels, float):
            return max(int(channels * self.inter_channels), 1)
        return self.inter_channels


def _inner_channels(value: Any) -> int | float:
    """Return an inner width, or its ratio to the features' width."""
    if is_int(value) and value >= 1:
        return int(value)
    is_real = isinstance(value, numbers.Real) and not is_int(value) and not isinstance(value, bool)
    if not is_real or not 0 < value <= 1:
        raise ValueError(f"inter_channels must be an int >= 1 or a ratio in (0.0, 1.0] as a float, got {value!r}")
    return float(value)


CHOICES: dict[str, tuple[str, ...]] = {
    "mask_rule": get_args(MaskRule),
    "mode": MODES,
    "norm": get_args(NormName),
    "pool_order": get_args(PoolOrder),
    "pooled_terms": get_args(PooledTerms),
    "channel_mask_source": get_args(ChannelMaskSource),
    "normalize": get_args(Normalize),
    "feature_norm": get_args(FeatureNorm),
}


class Overrides(TypedDict, total=False):
    """The types of the overrides of ``FBKDLoss``: the fields of :class:`LevelSettings`, for all levels or for each."""

    spatial_temperature: PerLevel[float]
    channel_temperature: PerLevel[float]
    mask_rule: PerLevel[MaskRule]
    use_channel_mask: PerLevel[bool]
    feature_weight: PerLevel[float]
    channel_weight: PerLevel[float]
    spatial_weight: PerLevel[float]
    relation_weight: PerLevel[float]
    inter_channels: PerLevel[int | float]
    stride: PerLevel[int]
    conv_out_bias: PerLevel[bool]
    pool_order: PerLevel[PoolOrder]
    mode: PerLevel[modes.ModeName]
    use_scale: PerLevel[bool]
    norm: PerLevel[NormName]
    pooled_terms: PerLevel[PooledTerms]
    channel_mask_source: PerLevel[ChannelMaskSource]
    normalize: PerLevel[Normalize]
    feature_norm: PerLevel[FeatureNorm]


PresetName = Literal["two_stage", "one_stage", "mmrazor", "paper"]


class LossArguments(Overrides, total=False):
    """The types of the keyword arguments of ``FBKDLoss``, its overrides among them."""

    num_levels: int | None
    preset: PresetName
    memory_efficient: bool
    synchronize: bool


class TermWeights(TypedDict):
    """The weights of all terms, one value per level."""

    feature_weight: list[float]
    channel_weight: list[float]
    spatial_weight: list[float]
    relation_weight: list[float]


@dataclass(frozen=True)
class Preset:
    """A set of constants in circulation.

    Attributes:
        num_levels: how many levels it was written for; None where it fits any number.
        settings: fields of :class:`LevelSettings`; a tuple holds one value per level.
    """

    num_levels: int | None
    settings: dict[str, Any]


_PRESETS: dict[PresetName, Preset] = {
    "two_stage": Preset(
        num_levels=5,
        settings=dict(
            spatial_temperature=0.5,
            channel_temperature=0.5,
            mask_rule="average",
            use_channel_mask=False,
            feature_weight=7e-5,
            channel_weight=4e-3,
            spatial_weight=4e-3,
            relation_weight=7e-5,
            stride=(8, 4, 2, 2, 2),
            inter_channels=(0.25, 0.25, 0.5, 0.5, 0.5),
            conv_out_bias=True,
        ),
    ),
    "one_stage": Preset(
        num_levels=5,
        settings=dict(
            spatial_temperature=0.1,
            channel_temperature=0.1,
            mask_rule="average",
            use_channel_mask=True,
            feature_weight=6 * 7e-5,
            channel_weight=6 * 4e-3,
            spatial_weight=6 * 4e-3,
            relation_weight=6 * 7e-5,
            stride=(8, 4, 2, 2, 2),
            inter_channels=(0.25, 0.25, 0.5, 0.5, 0.5),
            conv_out_bias=True,
        ),
    ),
    "mmrazor": Preset(
        num_levels=4,
        settings=dict(
            spatial_temperature=0.5,
            channel_temperature=0.5,
            mask_rule="average",
            use_channel_mask=False,
            feature_weight=7e-5,
            channel_weight=4e-3,
            spatial_weight=4e-3,
            relation_weight=7e-5,
            stride=(16, 8, 4, 4),
            inter_channels=(0.25, 0.25, 0.5, 0.5),
            conv_out_bias=False,
            pool_order="nested",
        ),
    ),
    "paper": Preset(
        num_levels=None,
        settings=dict(
            spatial_temperature=0.5,
            channel_temperature=0.5,
            mask_rule="joint",
            use_channel_mask=True,
            feature_weight=7e-5,
            channel_weight=4e-3,
            spatial_weight=4e-3,
            relation_weight=7e-5,
            stride=(8, 4, 2, 2, 2),
            inter_channels=(0.25, 0.25, 0.5, 0.5, 0.5),
            conv_out_bias=True,
            pooled_terms="attention",
        ),
    ),
}

PRESETS: dict[PresetName, dict[str, Any]] = {name: preset.settings for name, preset in _PRESETS.items()}


def default_num_levels(preset: PresetName) -> int | None:
    """How many levels the preset was written for, None where it fits any number."""
    check_choice(preset, tuple(PRESETS), "preset")
    return _PRESETS[preset].num_levels


# What the presets' weights were chosen for.
_IMAGES, _HEIGHT, _WIDTH, _CHANNELS = 2, 800, 1344, 256


def size_free_weights(
    preset: PresetName,
    num_levels: int,
    strength: float = 1.0,
    first_stride: int = 4,
    strides: Sequence[int] | None = None,
) -> TermWeights:
    """Return weights for ``normalize="mean"`` that weigh each term as ``preset`` does on full-sized images.

    Without ``normalize`` a term is the root of a sum, which grows with the root of the number of its elements: on small
    images or narrow maps a preset's terms weigh less. As means they do not depend on the size, and these weights are
    the preset's times the roots that it was made for, on 2 images of 800x1344 pixels with 256 channels.

    Args:
        preset: a key of :data:`PRESETS`.
        num_levels: number of pyramid levels, an int >= 1.
        strength: a factor of all weights, >= 0.
        first_stride: of the first level's map, an int >= 1; each further level has twice the stride. 4 for an FPN from
            P2 on, 8 for detectors that begin at P3 (RetinaNet, FCOS).
        strides: of the map of each level, where one has not twice the stride of that before it; in place of
            ``first_stride``.

    Returns:
        The weights of all terms, one per level, as overrides of :class:`fbkd_ops.FBKDLoss`.

    Raises:
        ValueError: an unknown preset, a number of levels, a strength or a stride out of its range.

    Example:
        >>> weights = size_free_weights("two_stage", num_levels=3)
        >>> loss = fbkd_ops.FBKDLoss(64, num_levels=3, normalize="mean", **weights)

    Source: ``docs/losses.md``, "Normalization".
    """
    check_choice(preset, tuple(PRESETS), "preset")
    if not is_int(num_levels) or num_levels < 1:
        raise ValueError(f"num_levels must be an int >= 1, got {num_levels!r}")
    strength = check_number(strength, "a finite number >= 0", lambda value: value >= 0, "strength")
    if not is_int(first_stride) or first_stride < 1:
        raise ValueError(f"first_stride must be an int >= 1, got {first_stride!r}")
    if strides is None:
        strides = [int(first_stride) * 2**level for level in range(num_levels)]
    elif len(strides) != num_levels or not all(is_int(stride) and stride >= 1 for stride in strides):
        raise ValueError(f"strides must be num_levels ({num_levels}) ints >= 1, got {strides!r}")
    pixels = [_IMAGES * math.ceil(_HEIGHT / stride) * math.ceil(_WIDTH / stride) for stride in strides]
    all_pixels = [count * _CHANNELS for count in pixels]

    def weights(name: str, elements: list[int]) -> list[float]:
        return [strength * PRESETS[preset][name] * math.sqrt(count) for count in elements]

    return TermWeights(
        feature_weight=weights("feature_weight", all_pixels),
        channel_weight=weights("channel_weight", [_IMAGES * _CHANNELS] * num_levels),
        spatial_weight=weights("spatial_weight", pixels),
        relation_weight=weights("relation_weight", all_pixels),
    )


def resolve_settings(preset: PresetName, num_levels: int, overrides: Mapping[str, Any]) -> list[LevelSettings]:
    """One :class:`LevelSettings` a level: the preset's values with ``overrides`` on top.

    Args:
        preset: a key of :data:`PRESETS`.
        num_levels: number of pyramid levels, >= 1.
        overrides: fields of :class:`LevelSettings`, each one value or a list of any kind (tuple, NumPy array,
            OmegaConf list, ...) of one per level.

    Raises:
        ValueError: an unknown preset, a value out of its range, a list of another length.
        TypeError: an unknown override, a flag that is no bool.
    """
    check_choice(preset, tuple(PRESETS), "preset")
    _require_known(overrides)
    columns = {name: _spread(value, num_levels) for name, value in PRESETS[preset].items()}
    for name, value in overrides.items():
        columns[name] = values_per_level(value, num_levels, name)
    settings = []
    for level in range(num_levels):
        try:
            settings.append(LevelSettings(**{name: column[level] for name, column in columns.items()}))
        except (TypeError, ValueError) as error:
            raise type(error)(f"level {level}: {error}") from None
    return settings


def _require_known(overrides: Mapping[str, Any]) -> None:
    known = [field.name for field in dataclasses.fields(LevelSettings)]
    for name in overrides:
        if name not in known:
            # It may also be a misspelt argument of FBKDLoss itself.
            hint = did_you_mean(name, [*known, *LossArguments.__annotations__])
            raise TypeError(f"unknown override {name!r}; the overrides are {', '.join(known)}{hint}")


def _spread(value: Any, num_levels: int) -> list[Any]:
    """Return a preset's value at each level."""
    if not isinstance(value, tuple):
        return [value] * num_levels
    return [value[min(level, len(value) - 1)] for level in range(num_levels)]
