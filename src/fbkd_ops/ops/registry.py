"""The registered ops by name and backend, with what torch.compile needs to trace them."""

import importlib
from collections.abc import Callable

import torch

from .. import _extension

__all__ = ["kernel", "register"]

_library = torch.library.Library("fbkd_ops", "FRAGMENT")
_kernels: dict[tuple[str, str], Callable] = {}


def register(name: str, schema: str | None, fake: Callable, triton_module: str = "") -> None:
    """Make an op callable through :func:`kernel`.

    Args:
        name: of the op; its C++ schema is in csrc/schemas.cpp.
        schema: the same schema without the name, for the Triton op; None if there is none.
        fake: outputs of the right shapes, dtypes and strides without data.
        triton_module: module of ``fbkd_ops.kernels`` that has a launcher of this name; "" if there is none.
    """
    if triton_module:
        # An op around the launcher, so that torch.compile keeps it as one node.
        _library.define(f"{name}_triton{schema}")
        _library.impl(f"{name}_triton", _launcher(name, triton_module), "CompositeExplicitAutograd")
        torch.library.register_fake(f"fbkd_ops::{name}_triton", fake)
        _kernels[name, "triton"] = getattr(torch.ops.fbkd_ops, f"{name}_triton").default
    if _extension.cpu.loaded:
        torch.library.register_fake(f"fbkd_ops::{name}", fake)
        _kernels[name, "cpu"] = _kernels[name, "cuda"] = getattr(torch.ops.fbkd_ops, name).default


def kernel(name: str, backend: str) -> Callable:
    """Return the op of a backend: ``"cpu"``, ``"cuda"`` or ``"triton"``."""
    return _kernels[name, backend]


def _launcher(name: str, module: str) -> Callable:
    """Return the Triton launcher, imported at its first call."""

    def launch(*arguments):
        return getattr(importlib.import_module(f"fbkd_ops.kernels.{module}"), name)(*arguments)

    return launch
