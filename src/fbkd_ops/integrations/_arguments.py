"""Arguments that the wrappers of several frameworks have in common."""

from collections.abc import Mapping
from typing import Any

__all__ = ["loss_arguments"]


def loss_arguments(loss: Any, **defaults: Any) -> dict[str, Any]:
    """Return the arguments of :class:`fbkd_ops.FBKDLoss` that a user gave, over ``defaults``.

    Raises:
        TypeError: neither a dict nor None.
    """
    if loss is not None and not isinstance(loss, Mapping):
        raise TypeError(f"loss must be a dict of the arguments of FBKDLoss, got {type(loss).__name__}")
    return {**defaults, **(loss or {})}
