"""Which code runs an op: ``use_backend`` forces it, ``resolve`` decides it."""

import contextlib
import importlib.util
import os
import threading
import warnings
from collections.abc import Iterator
from typing import Literal, get_args

import torch
from torch import Tensor

from . import _extension
from ._validation import check_choice
from .ops.registry import OPS

__all__ = ["BACKENDS", "FUNCTIONS", "BackendName", "automatic", "available", "resolve", "use_backend"]

BackendName = Literal["auto", "cpu", "cuda", "triton", "reference"]
BACKENDS: tuple[str, ...] = get_args(BackendName)

# The registered ops that each public function needs kernels of. On a GPU those without "cuda" are Triton's: matrix
# products, which it writes for the tensor cores of every GPU, and what takes as little time as a single channel does.
_STATISTICS = ("non_local_statistics_forward", "non_local_statistics_backward_")
_CALLED = {
    "attention_pool": ("attention_pool_forward", "attention_pool_backward"),
    "attention_masks": ("attention_masks",),
    "masked_l2_loss": ("masked_l2_forward", "masked_l2_backward"),
    "adapted_masked_l2_loss": ("adapted_masked_l2_forward", "adapted_masked_l2_backward"),
    "spatial_l2_loss": ("spatial_l2",),
    "channel_correlation_loss": ("channel_correlation_forward", "channel_correlation_backward"),
    "channel_divergence_loss": ("channel_divergence_forward", "channel_divergence_backward"),
    "non_local": _STATISTICS,
    "relation_loss": (*_STATISTICS, "relation_residual_forward", "relation_residual_backward"),
}

# The public functions, each with the backends that have kernels of all its ops.
FUNCTIONS = {
    function: tuple(backend for backend in BACKENDS if all(backend in OPS[op].backends for op in called))
    for function, called in _CALLED.items()
}

# Their literal formulas need memory that grows with the square of the number of pixels.
_LINEAR_IN_TORCH = ("non_local", "relation_loss")

_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_INTERPRET = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on")
_TRITON = importlib.util.find_spec("triton") is not None

# A plain threading.local: torch.compile guards its attributes, but neither a context variable nor a subclass's default.
_choice = threading.local()


def _forced() -> str:
    return getattr(_choice, "backend", "auto")


@contextlib.contextmanager
def use_backend(name: BackendName) -> Iterator[None]:
    """Run every op inside the block on one backend.

    ``name`` is "auto" (the default choice), "cpu" or "cuda" (compiled kernels), "triton", or "reference"
    (literal formulas in plain PyTorch). A forced backend that cannot serve a call raises ``RuntimeError`` at
    the call. The choice holds for this thread; backward, on any thread, uses the backend of its forward.

    Raises:
        ValueError: unknown name.

    Example:
        >>> with use_backend("reference"):
        ...     expected = fbkd_ops.functional.attention_pool(x)
        >>> torch.allclose(fbkd_ops.functional.attention_pool(x).spatial_mean, expected.spatial_mean, atol=1e-6)
        True
    """
    name = check_choice(name, BACKENDS, "use_backend: the backend")
    previous, _choice.backend = _forced(), name
    try:
        yield
    finally:
        _choice.backend = previous


def available(backend: str, device: str) -> str:
    """Why a backend's kernels cannot run on tensors of a device type; empty if they can."""
    if backend == "triton":
        return _triton_obstacle(device)
    if device != backend:
        return f"backend {backend!r} runs on {backend} tensors, got a {device} tensor"
    library = _extension.cpu if backend == "cpu" else _extension.cuda
    return "" if library.loaded else f"the compiled {backend} part is {library.status}"


def _triton_obstacle(device: str) -> str:
    if not _TRITON:
        return "triton is not installed"
    if device == "cuda" or (device == "cpu" and _INTERPRET):
        return ""
    return (
        f"backend 'triton' runs on cuda tensors, got a {device} tensor "
        "(with TRITON_INTERPRET=1 set before the import of fbkd_ops it also runs on cpu tensors)"
    )


def resolve(function: str, tensor: Tensor) -> str:
    """Backend that a call of ``function`` with ``tensor`` uses: "cpu", "cuda", "triton", "torch" or "reference".

    "torch" is plain PyTorch in linear memory, for the ops of the relation term where no kernels of theirs can run.
    Where the forced backend has no kernels of it, it is the automatic choice on that backend's device.

    Raises:
        RuntimeError: a backend is forced and cannot serve the call; the message says why.
    """
    forced, device = _forced(), tensor.device.type
    if forced == "reference":
        return "reference"
    if forced == "auto":
        backend = automatic(function, device)
        _warn_of_slow(device, backend)
        return backend
    served = forced in FUNCTIONS[function]
    obstacle = available(forced, device) if served else _device_mismatch(forced, device)
    if obstacle:
        raise RuntimeError(f"{function}: backend {forced!r} is forced and cannot serve the call: {obstacle}")
    return forced if served else automatic(function, device)


def automatic(function: str, device: str) -> str:
    """Backend of ``function`` on a device type where none is forced: the first that has kernels and can run."""
    for backend in _AUTOMATIC.get(device, ()):
        if backend in FUNCTIONS[function] and not available(backend, device):
            return backend
    return "torch" if function in _LINEAR_IN_TORCH else "reference"


_warned_of_slow: set[str] = set()


def _warn_of_slow(device: str, backend: str) -> None:
    """Say once a process that calls on a device type run without the compiled part, and how to get it.

    Not where a build left out the CUDA part alone: Triton's kernels stand in for it.
    """
    if torch.compiler.is_compiling() or device in _warned_of_slow or device not in _AUTOMATIC or backend == device:
        return
    library = _extension.cpu if device == "cpu" else _extension.cuda
    if library.loaded or library.status.startswith("broken"):  # which is said when it is loaded
        return
    if backend == "triton" and _extension.cpu.loaded and library.status.startswith("not built"):
        return
    _warned_of_slow.add(device)
    instead = "Triton's kernels run" if backend == "triton" else "plain PyTorch runs, which is slower"
    warnings.warn(
        f"fbkd_ops on {device} tensors: {instead}, because the compiled {device} part is {library.status}. "
        f"To build it: {_extension.REBUILD} (said once a process)",
        RuntimeWarning,
    )


def _device_mismatch(backend: str, device: str) -> str:
    """Why a forced backend does not fit a tensor of a function that it has no kernels of; empty if it does."""
    if backend == "triton":
        return _triton_obstacle(device)
    return "" if device == backend else f"it runs on {backend} tensors, got a {device} tensor"
