"""Tensors in lists, tuples, dicts and the like, as models take and return them."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping
from typing import Any

__all__ = ["mapped"]


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """Return a list, tuple or dict, nested or not, with ``change`` of everything else that is in it in its place."""
    if isinstance(value, Mapping):
        parts = {name: mapped(part, change) for name, part in value.items()}
        if type(value) in (dict, OrderedDict) or not isinstance(value, MutableMapping):
            kind: Any = type(value)  # dynamo traces no copy.copy
            return kind(parts)
        changed = copy.copy(value)
        for name, part in parts.items():
            changed[name] = part
        return changed
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(part, change) for part in value))
    if isinstance(value, (list, tuple)):
        return type(value)(mapped(part, change) for part in value)
    return change(value)
