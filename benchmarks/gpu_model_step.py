"""What one training step of a loss would have a GPU do, found out without one.

The step runs on meta tensors, which have sizes and no memory, with the ops resolved as on a GPU. Triton kernels are
compiled for sm_90 in place of being launched; ops of the CUDA library and PyTorch's own are noted with their sizes.
"""

import contextlib
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import fbkd_ops
from benchmarks.code_report import compiled_for
from benchmarks.gpu_model_ttir import Pointer, Value
from benchmarks.inputs import Case
from fbkd_ops import backends, kernels
from fbkd_ops._warnings import UpdateWatch
from fbkd_ops.losses.registry import LOSSES

ARCH = 90
CUDA_SOURCES = Path(fbkd_ops.__file__).resolve().parents[2] / "csrc" / "cuda"
ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "_unsafe_view")


@dataclass(frozen=True)
class TritonLaunch:
    """A launch of a Triton kernel."""

    kernel: str
    compiled: Any  # Triton's
    programs: int
    arguments: Mapping[str, Value]  # by name; an entry of a tuple is "name.index"
    tensors: Mapping[str, tuple[int, int]]  # of the pointers among them: storage, bytes


@dataclass(frozen=True)
class CudaLaunch:
    """A launch of a kernel of the CUDA library, with the fewest bytes that it can move."""

    kernel: str
    bytes: int


@dataclass(frozen=True)
class SmallOp:
    """A dispatched op of PyTorch that runs a kernel."""

    name: str
    bytes: int
    flops: int


@dataclass
class Step:
    """A forward and a backward pass."""

    launches: list = field(default_factory=list)  # TritonLaunch and CudaLaunch, in order
    ops: dict[str, list[SmallOp]] = field(default_factory=lambda: {"forward": [], "backward": []})
    views: int = 0  # and allocations: dispatched ops without a kernel
    nodes: int = 0  # of the autograd graph, but for those that accumulate gradients


def captured_step(case: Case, loss_name: str = "FBKDLoss") -> Step:
    """The step of a loss that needs nothing but features; those have the case's dtype, parameters are float32."""
    students, teachers = (
        [torch.empty(shape, dtype=getattr(torch, case.dtype), device="meta") for shape in case.shapes] for _ in range(2)
    )
    step, channels = Step(), case.shape[1]
    preset = {"preset": "mmrazor"} if loss_name == "FBKDLoss" else {}
    loss = LOSSES[loss_name](channels, num_levels=len(students), **preset).to("meta")
    inputs = [*(x.requires_grad_() for x in students), *loss.parameters()]
    with _as_on_a_gpu(), launches_noted(step.launches), _Noted(step) as noted:
        total = sum(loss(students, teachers).values())
        step.nodes = _count_nodes(total)
        noted.phase = "backward"
        torch.autograd.grad(total, inputs, allow_unused=True)
    return step


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Ops take the backend that is automatic on a GPU, and the step is one of those behind the first ten.

    Until then parameters are copied to see whether they change. Autocast is off anyway; meta tensors have none.
    """

    def resolved(op: str, tensor: Tensor) -> str:
        return "cuda" if "cuda" in backends.FUNCTIONS[op] else "triton"

    with (
        mock.patch.object(backends, "resolve", resolved),
        mock.patch.object(UpdateWatch, "see", lambda *arguments: None),
        mock.patch.object(torch, "autocast", lambda *arguments, **options: contextlib.nullcontext()),
    ):
        yield


@contextlib.contextmanager
def launches_noted(launches: list) -> Iterator[None]:
    """Every launch of a Triton kernel compiles it and is added to ``launches``."""

    def note(kernel, compiled, arguments: Mapping[str, Any], grid: tuple) -> None:
        values = {name: value for root, given in arguments.items() for name, value in _flat(root, given)}
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        launches.append(
            TritonLaunch(
                kernel.__name__,
                compiled,
                grid[0],
                {name: _value(name, value) for name, value in values.items()},
                {name: (x.untyped_storage()._cdata, x.numel() * x.element_size()) for name, x in tensors.items()},
            )
        )

    with compiled_for(ARCH, note):
        yield


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, (tuple, list)):
        for index, entry in enumerate(value):
            yield from _flat(f"{name}.{index}", entry)
    else:
        yield name, value


def _value(name: str, value: Any) -> Value:
    if isinstance(value, Tensor):
        return Pointer(name)
    return int(value) if isinstance(value, (bool, int)) else None


class _Noted(TorchDispatchMode):
    """Adds what is dispatched to a step. An op with a Triton launcher runs that, and what it calls is added too."""

    def __init__(self, step: Step):
        super().__init__()
        self.step, self.phase = step, "forward"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        namespace, name = func._schema.name.split("::")
        if namespace == "fbkd_ops":
            return self._fused(func, name, args, kwargs)
        with self:
            if (result := func.decompose(*args, **kwargs)) is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        aliases = [each.alias_info for each in func._schema.returns]
        if name in ALLOCATIONS or any(alias is not None and not alias.is_write for alias in aliases):
            self.step.views += 1
        else:
            read = () if name.startswith("new_") else (args, kwargs)  # those take a tensor for its dtype and device
            self.step.ops[self.phase].append(SmallOp(name, _bytes((read, result)), _flops(func, args, result)))
        return result

    def _fused(self, func, name: str, args, kwargs):
        if name.endswith("_triton"):
            with self:
                return _launcher(name.removesuffix("_triton"))(*args, **kwargs)
        result = func(*args, **kwargs)
        first, *rest = cuda_kernels(name) or [name]
        self.step.launches.append(CudaLaunch(first, _bytes((args, kwargs, result))))
        self.step.launches += [CudaLaunch(kernel, 2 * _bytes(result)) for kernel in rest]
        return result


def _launcher(op: str) -> Callable:
    """The Triton launcher of an op."""
    for module in pkgutil.iter_modules(kernels.__path__):
        found = getattr(importlib.import_module(f"{kernels.__name__}.{module.name}"), op, None)
        if callable(found):
            return found
    raise LookupError(f"no launcher of {op} in {kernels.__name__}")


def cuda_kernels(op: str) -> list[str]:
    """Kernels that the launcher of an op queues, in order, by its source; empty where it has none of that name."""
    for source in sorted(CUDA_SOURCES.glob("*.cuh")):
        body = re.search(rf"^void launch_{op}_?\(.*?^}}", source.read_text(), re.DOTALL | re.MULTILINE)
        if body:
            return re.findall(r"queue\.launch\((\w+)", body.group())
    return []


def _bytes(tree: Any) -> int:
    """Of all tensors, each once."""
    tensors = {id(leaf): leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


def _flops(func, args, result) -> int:
    count = flop_registry.get(func.overloadpacket)
    return count(*args, out_val=result) if count else 0


def _count_nodes(total: Tensor) -> int:
    seen, waiting = set(), [total.grad_fn]
    while waiting:
        node: Any | None = waiting.pop()
        if node is not None and node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
    return sum("AccumulateGrad" not in type(node).__name__ for node in seen)
