"""Arguments that the wrappers of several frameworks have in common."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from .._validation import did_you_mean
from ..loss import FBKDLoss
from ..losses import CWDLoss, FGDLoss, MGDLoss, PKDLoss
from ..losses.feature_loss import FeatureLoss

__all__ = ["LossSettings", "loss_settings"]

LOSSES: dict[str, type[FeatureLoss]] = {kind.__name__: kind for kind in (FBKDLoss, PKDLoss, CWDLoss, MGDLoss, FGDLoss)}


class LossSettings(NamedTuple):
    """What a user asked for: a loss, and the arguments of its class."""

    kind: type[FeatureLoss]
    arguments: dict[str, Any]


def loss_settings(loss: Any, **defaults: Any) -> LossSettings:
    """Return the loss of a configuration, by its ``type`` or FBKDLoss, and its arguments over ``defaults``.

    Raises:
        TypeError: neither a dict nor None.
        ValueError: a type that is none of the losses.
    """
    if loss is not None and not isinstance(loss, Mapping):
        raise TypeError(f"loss must be a dict of a loss's arguments, got {type(loss).__name__}")
    arguments = {**defaults, **(loss or {})}
    name = arguments.pop("type", FBKDLoss.__name__)
    if name not in LOSSES:
        raise ValueError(f"loss: type must be one of {', '.join(LOSSES)}, got {name!r}{did_you_mean(name, LOSSES)}")
    return LossSettings(LOSSES[name], arguments)
