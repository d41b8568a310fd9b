"""Where a teacher runs and in which dtype, whatever its student does."""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .nested import mapped

__all__ = ["Placement", "checked_placement"]


BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


class Placement(NamedTuple):
    """A device and a dtype of the teacher's own; None where it has that of the distiller."""

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def apply(self, module: nn.Module, fn: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> None:
        """Let ``fn``, which moves or converts tensors, work on a module as far as nothing else is wanted for it."""
        module._apply(fn if self == Placement() else self._kept(fn))

    def _kept(self, fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def kept(tensor: Tensor) -> Tensor:
            is_float = tensor.is_floating_point()
            if self.device is not None:
                # Nothing is sent to a device that it would only pass through.
                like = fn(tensor.new_empty((0,) * tensor.dim(), device="cpu"))
                return tensor.to(self.device, (self.dtype if is_float else None) or like.dtype)
            if not is_float:
                return fn(tensor)
            # As integers the numbers are moved and laid out, but not converted.
            return fn(tensor.view(BITS[tensor.itemsize])).view(tensor.dtype).to(self.dtype)

        return kept

    def precision(self) -> contextlib.AbstractContextManager:
        """Keep the student's autocast away from a teacher that has its own dtype."""
        kind = None if self.dtype is None else _autocast_kind()
        return contextlib.nullcontext() if kind is None else torch.autocast(kind, enabled=False)

    def moved(self, value: Any) -> Any:
        """Return what a call is given, on the teacher's device."""
        device = self.device
        return value if device is None else mapped(value, lambda leaf: _on(leaf, device))

    def converted(self, value: Any) -> Any:
        """Return what a call is given, in the teacher's dtype where it is of floats."""
        return value if self.dtype is None else mapped(value, self._converted)

    def _converted(self, leaf: Any) -> Any:
        is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
        return leaf.to(self.dtype) if is_float else leaf

    def returned(self, value: Any, device: torch.device) -> Any:
        """Return what the teacher gave, on the student's device."""
        return value if self.device is None else mapped(value, lambda leaf: _on(leaf, device))


def _on(leaf: Any, device: torch.device) -> Any:
    """Return a tensor, or an object that can be moved, on a device."""
    if isinstance(leaf, Tensor):
        # To a CPU the numbers would be read before they are there.
        return leaf.to(device, non_blocking=device.type != "cpu")
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def _autocast_kind() -> str | None:
    """Return the kind of device for which autocast is on."""
    return next((kind for kind in ("cuda", "xpu", "mps", "cpu") if torch.is_autocast_enabled(kind)), None)


def checked_placement(device: Any, dtype: Any) -> Placement:
    """Return what ``teacher_device`` and ``teacher_dtype`` say.

    Raises:
        TypeError, ValueError: no device, or no dtype of floats.
    """
    if device is not None:
        try:
            device = torch.device(device)
        except (RuntimeError, TypeError) as error:
            raise ValueError(f"teacher_device must be a device such as 'cuda:1', got {device!r}") from error
    dtype = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"teacher_dtype must be a dtype of floats such as torch.bfloat16, or its name, got {dtype!r}")
    return Placement(device, dtype)
