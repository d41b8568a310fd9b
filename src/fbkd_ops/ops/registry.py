"""The registered ops: schema, fake and backends of each, stated once and here for all languages.

The libraries in C++ and CUDA register their kernels for the schemas that are defined here. Triton's kernels are ops of
their own, ``<name>_triton`` with the same schema, so that both can be chosen on one device.
"""

import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from .. import _extension
from .._hub import NAMESPACE

__all__ = ["OPS", "Op", "kernel", "register"]


class Op(NamedTuple):
    """A registered op."""

    schema: str  # without the name: "(Tensor[] x) -> Tensor[]"
    fake: Callable  # makes outputs of the right shapes, dtypes and strides without data
    backends: tuple[str, ...]  # that have kernels of it


OPS: dict[str, Op] = {}
_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_namespace = getattr(torch.ops, NAMESPACE)
_kernels: dict[tuple[str, str], Callable] = {}


def register(name: str, schema: str, fake: Callable, compiled: tuple[str, ...], triton: str = "") -> None:
    """Define an op, callable through :func:`kernel`.

    Args:
        name: of the op; its kernels in C++, CUDA and Triton have the same.
        schema: arguments and results. Every op takes a whole pyramid: lists of one entry per level.
        fake: outputs of the right shapes, dtypes and strides without data.
        compiled: those of ``"cpu"`` and ``"cuda"`` that have a kernel.
        triton: module of ``fbkd_ops.kernels`` that has a launcher of this name; "" if there is none.
    """
    OPS[name] = Op(schema, fake, (*compiled, "triton") if triton else compiled)
    _library.define(name + schema)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake)
    if _extension.cpu.loaded:
        for backend in compiled:
            _kernels[name, backend] = getattr(_namespace, name).default
    if triton:
        # An op around the launcher, so that torch.compile keeps it as one node.
        _library.define(f"{name}_triton{schema}")
        _library.impl(f"{name}_triton", _launcher(name, triton), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}_triton", fake)
        _kernels[name, "triton"] = getattr(_namespace, f"{name}_triton").default


def kernel(name: str, backend: str) -> Callable:
    """Return the op of a backend: ``"cpu"``, ``"cuda"`` or ``"triton"``."""
    return _kernels[name, backend]


def _launcher(name: str, module: str) -> Callable:
    """Return the Triton launcher, imported at its first call."""

    def launch(*arguments):
        return getattr(importlib.import_module(f"..kernels.{module}", __package__), name)(*arguments)

    return launch
