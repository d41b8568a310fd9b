"""How many operations a function dispatches: what a step costs the host, whatever the sizes.

A *small* operation is an ATen call that computes something: no view, no allocation. One that the package's own ops make
counts as well. A *fused* one is a launch of a Triton kernel, or a call of a C++ op.
"""

import contextlib
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple
from unittest import mock

from torch._C import DispatchKey, DispatchKeySet
from torch.utils._python_dispatch import TorchDispatchMode

import fbkd_ops

__all__ = ["OpCounts", "count_ops"]

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
HIDDEN_VIEWS = {"_unsafe_view", "_reshape_alias"}  # whose schemas do not say so


class OpCounts(NamedTuple):
    """Calls by name."""

    small: Counter
    fused: Counter

    def __str__(self) -> str:
        listed = (
            f"{sum(ops.values())} {kind}: {dict(ops.most_common())}"
            for kind, ops in zip(self._fields, self, strict=True)
        )
        return "\n".join(listed)


def count_ops(backend: str, function: Callable) -> OpCounts:
    """Call the function once and count.

    Args:
        backend: ``"cpu"``, or ``"triton"``, whose kernels are not run: results are what was in the memory.
        function: on CPU tensors; what it differentiates has no gradient yet, so that none is added to another.
    """
    counts = OpCounts(Counter(), Counter())
    with fbkd_ops.use_backend(backend), _launches_stubbed(backend, counts.fused), _OpCounter(counts):
        function()
    return counts


def _launches_stubbed(backend: str, launches: Counter):
    if backend != "triton":
        return contextlib.nullcontext()
    from fbkd_ops.kernels import pyramid

    count = lambda kernel, *_: launches.update([kernel.__name__])  # noqa: E731
    return mock.patch.object(pyramid, "_launch_once", count)


class _OpCounter(TorchDispatchMode):
    def __init__(self, counts: OpCounts):
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func.namespace == "fbkd_ops":
            if not name.endswith("_triton"):
                self.counts.fused.update([name])
            # Below this mode for the op itself, inside it for what the op calls.
            with self:
                return func.redispatch(DispatchKeySet(DispatchKey.CPU), *args, **kwargs)
        with self:
            # What autograd has not taken apart already: matmul into bmm.
            result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if not _is_view(func) and name not in ALLOCATIONS:
            self.counts.small.update([name])
        return func(*args, **kwargs)


def _is_view(func) -> bool:
    aliases = [output.alias_info for output in func._schema.returns]
    name = func.overloadpacket.__name__
    return name in HIDDEN_VIEWS or any(alias is not None and not alias.is_write for alias in aliases)
