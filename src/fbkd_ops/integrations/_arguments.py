"""Arguments that the wrappers of several frameworks have in common."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from .._validation import did_you_mean
from ..losses.feature_loss import FeatureLoss
from ..losses.registry import LOSSES

__all__ = ["LossSettings", "loss_settings"]


class LossSettings(NamedTuple):
    """What a user asked for: a loss, and the arguments of its class."""

    kind: type[FeatureLoss]
    arguments: dict[str, Any]


def loss_settings(loss: Any, **defaults: Any) -> LossSettings:
    """Return the loss of a configuration, by its ``type`` or FBKDLoss, and its arguments.

    Args:
        loss: a dict of ``type`` and arguments, or None.
        **defaults: of arguments, where the loss has them.

    Raises:
        TypeError: neither a dict nor None.
        ValueError: a type that is none of the losses.
    """
    if loss is not None and not isinstance(loss, Mapping):
        raise TypeError(f"loss must be a dict of a loss's arguments, got {type(loss).__name__}")
    given = dict(loss or {})
    name = given.pop("type", "FBKDLoss")
    if name not in LOSSES:
        raise ValueError(f"loss: type must be one of {', '.join(LOSSES)}, got {name!r}{did_you_mean(name, LOSSES)}")
    accepted = inspect.signature(LOSSES[name]).parameters
    return LossSettings(LOSSES[name], {key: value for key, value in defaults.items() if key in accepted} | given)
