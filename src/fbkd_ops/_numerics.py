"""Precision rules that every layer of the package shares, and what tensors of special kinds need."""

import contextlib

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

__all__ = [
    "accumulation_dtype",
    "constant_vector",
    "is_fake",
    "recordable",
    "residual_dtype",
    "root",
    "without_autocast",
]


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where a tensor is float64, float32 for everything narrower."""
    wide = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if wide else torch.float32


def residual_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """Dtype of a kept residual of two features: the features' own where both have the same."""
    return student.dtype if student.dtype == teacher.dtype else accumulation_dtype(student, teacher)


def root(squares: Tensor) -> Tensor:
    """``sqrt`` of a sum of squares whose gradient at exactly 0 is 0 instead of infinite.

    Only an exact 0 is special: NaN stays NaN, so that a broken loss shows.
    """
    is_zero = squares == 0
    return torch.where(is_zero, squares, squares.masked_fill(is_zero, 1).sqrt())


def without_autocast(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Autocast off on the tensor's device, as a context. Meta tensors have none.

    The package reads the tensors' own dtypes and accumulates in float32 or better; autocast would round the small
    matrices inside the relation term to half precision.
    """
    return contextlib.nullcontext() if tensor.is_meta else torch.autocast(tensor.device.type, enabled=False)


def recordable(x: Tensor) -> Tensor:
    """``x`` itself, or a copy of one made in inference mode, which autograd refuses to save for a backward pass."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled() or not x.is_inference():
        return x
    return x.clone()


def is_fake(tensor: Tensor) -> bool:
    """Whether the tensor has a shape but no values that Python could read: FakeTensorMode, or a meta tensor."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


# Of every loss and size that was met. A full dictionary stays as it is: captured CUDA graphs read what is in it.
_constants: dict[tuple, Tensor] = {}
MAX_CONSTANTS = 1024


def constant_vector(values: list[float], dtype: torch.dtype, device: torch.device, keep: bool) -> Tensor:
    """Return ``values`` as a tensor, the same one in every step. It is filled on the device: nothing waits for a copy.

    Args:
        values: the elements.
        dtype, device: of the tensor.
        keep: whether later calls may get it too. False while a CUDA graph is captured, whose tensors are filled by its
            replays only.
    """
    if torch.compiler.is_compiling() or _fakes():
        return _filled_vector(values, dtype, device)
    key = (*values, dtype, device)
    if key in _constants:
        return _constants[key]
    # Made in inference mode it could not be saved for a backward pass later.
    with torch.inference_mode(False):
        vector = _filled_vector(values, dtype, device)
    if keep and len(_constants) < MAX_CONSTANTS and type(vector) is Tensor:
        _constants[key] = vector
    return vector


def _fakes() -> bool:
    """Whether FakeTensorMode is on, which takes no tensor that was made outside of it."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None


def _filled_vector(values: list[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.stack([torch.full((), value, dtype=dtype, device=device) for value in values])
