"""Every op forward and backward, for tools that watch a program: compute-sanitizer and ncu.

    python -m scripts.gpu.op_calls small --backend triton                       # ragged shapes, dtypes, layouts
    python -m scripts.gpu.op_calls large --backend cuda --dtype bfloat16        # one call each, with the profiler on
    python -m scripts.gpu.op_calls loss --backend auto --dtype bfloat16         # a step of the whole loss, likewise

With ``--device cpu`` it runs the CPU's kernels, or Triton's interpreter where TRITON_INTERPRET=1 is set. Ends with an
error if the backend has an op that ``small`` has not called.
"""

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import Case
from benchmarks.measurement import Runner
from benchmarks.small import in_form
from benchmarks.suites import SUITES
from fbkd_ops import FBKDLoss, NonLocalBlock2d, backends, functional
from fbkd_ops.ops import registry

# Of P2; what the whole loss gets are P2..P5.
SIZES = {"large": (4, 256, 200, 336), "loss": (16, 256, 200, 336)}
SHAPES = [(2, 5, 3, 7), (1, 33, 1, 17), (3, 16, 9, 12)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Features(NamedTuple):
    """The students need gradients."""

    student: Tensor  # (N, C, H, W)
    teacher: Tensor  # the same shape
    wide: Tensor  # a teacher of one channel more


def contiguous(x: Tensor) -> Tensor:
    return x.contiguous()


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def channel_slice(x: Tensor) -> Tensor:
    return torch.cat([x, x[:, :1]], dim=1)[:, :-1]


LAYOUTS = [contiguous, channels_last, channel_slice]


def features(shape: tuple[int, ...], dtype: torch.dtype, layout: Callable[[Tensor], Tensor], device: str) -> Features:
    n, channels, height, width = shape
    widths = (channels, channels, channels + 1)
    maps = [layout(torch.randn(n, width_, height, width, device=device).to(dtype)) for width_ in widths]
    return Features(maps[0].requires_grad_(), *maps[1:])


def attention_pool(f: Features) -> Tensor:
    return sum(mean.sum() for mean in functional.attention_pool(f.student))


def attention_masks(f: Features) -> tuple[Tensor, Tensor]:
    pools = functional.attention_pools([f.student.detach(), f.teacher])
    functional.attention_mask(None, pools[1].spatial_attention, temperature=0.5)
    functional.attention_masks(*pools, spatial_temperature=0.5, channel_temperature=0.5, mask_rule="joint")
    return functional.attention_masks(*pools, spatial_temperature=0.5, channel_temperature=0.5)


def masked_l2_loss(f: Features) -> Tensor:
    masked = functional.masked_l2_loss(f.student, f.teacher, *attention_masks(f))
    return masked + functional.masked_l2_loss(f.student, f.teacher)


def adaptation(f: Features) -> tuple[Tensor, Tensor]:
    """Weight and bias from the student's width to the wide teacher's."""
    wide, channels = f.wide.shape[1], f.student.shape[1]
    weight = torch.randn(wide, channels, device=f.wide.device) / channels**0.5
    return weight.requires_grad_(), torch.randn(wide, device=f.wide.device).requires_grad_()


def adapted_masked_l2_loss(f: Features) -> Tensor:
    spatial_mask, channel_mask = f.wide.float().abs().mean(1), f.wide.float().abs().mean((2, 3))
    masked = functional.adapted_masked_l2_loss(f.student, *adaptation(f), f.wide, spatial_mask, channel_mask)
    return masked + functional.adapted_masked_l2_loss(f.student, *adaptation(f), f.wide)


def spatial_l2_loss(f: Features) -> Tensor:
    """With gradients, and without."""
    student, teacher = f.student.float().mean(1), f.teacher.float().mean(1)
    weight, bias = torch.randn(3, 3, device=student.device), torch.randn(1, device=student.device)
    functional.spatial_l2_loss(student.detach(), weight, bias, teacher)
    return functional.spatial_l2_loss(student, weight.requires_grad_(), bias.requires_grad_(), teacher)


def channel_correlation_loss(f: Features) -> Tensor:
    return functional.channel_correlation_loss(f.student, f.teacher)


def channel_divergence_loss(f: Features) -> Tensor:
    return functional.channel_divergence_loss(f.student, f.teacher)


def non_local(f: Features) -> Tensor:
    return NonLocalBlock2d(f.student.shape[1], stride=2).to(f.student.device)(f.student).sum()


def relation_loss(f: Features) -> Tensor:
    """In both forms where the backend has both."""
    forms = ("collapsed", "cells") if backends.resolve("relation_loss", f.student) == "cpu" else ("collapsed",)
    return sum(in_form(lambda: relation_losses(f), form)() for form in forms)


def relation_losses(f: Features) -> Tensor:
    """With φ and g pooled and at full resolution, keeping a map for backward and not."""
    total = 0.0
    for stride, memory_efficient in itertools.product((1, 2), (False, True)):
        maps = (f.student, f.wide)
        blocks = [NonLocalBlock2d(x.shape[1], stride=stride).to(x.device) for x in maps]
        weights = [block.weights() for block in blocks]
        norms = {"student_norm": blocks[0].norm, "teacher_norm": blocks[1].norm}
        options = norms | {"stride": stride, "memory_efficient": memory_efficient}
        total = total + functional.relation_loss(*maps, *weights, *adaptation(f), **options)
    return total


def whole_loss(f: Features) -> Tensor:
    total = 0.0
    for memory_efficient in (False, True):
        options = {"num_levels": 2, "stride": [2, 1], "memory_efficient": memory_efficient}
        module = FBKDLoss(f.student.shape[1], f.wide.shape[1], **options).to(f.student.device)
        total = total + sum(module([f.student] * 2, [f.wide] * 2).values())
    return total


# By the ops' names in backends.FUNCTIONS, and whatever uses several of them.
CASES = {
    "attention_pool": attention_pool,
    "attention_masks": attention_masks,
    "masked_l2_loss": masked_l2_loss,
    "adapted_masked_l2_loss": adapted_masked_l2_loss,
    "spatial_l2_loss": spatial_l2_loss,
    "channel_correlation_loss": channel_correlation_loss,
    "channel_divergence_loss": channel_divergence_loss,
    "non_local": non_local,
    "relation_loss": relation_loss,
    "whole_loss": whole_loss,
}


def cases_of(backend: str) -> dict[str, Callable[[Features], object]]:
    """The cases that run a backend's own kernels; the others would run those of another one."""
    if backend != "cuda":
        return CASES
    return {name: case for name, case in CASES.items() if "cuda" in backends.FUNCTIONS.get(name, ())}


def small_features(backend: str, device: str) -> Iterator[Features]:
    """Every dtype in every shape, layouts in turn; for Triton, which compiles each of them, two of those."""
    pairs = list(itertools.product(DTYPES, SHAPES))
    layouts = [LAYOUTS[(index + index // len(SHAPES)) % len(LAYOUTS)] for index in range(len(pairs))]
    chosen = [(dtype, shape, layout) for (dtype, shape), layout in zip(pairs, layouts, strict=True)]
    if backend == "triton":
        chosen = [(torch.float32, SHAPES[0], contiguous), (torch.bfloat16, SHAPES[0], channels_last)]
    for dtype, shape, layout in chosen:
        yield features(shape, dtype, layout, device)


def call(case: Callable[[Features], object], inputs: Features) -> None:
    """Forward, and backward where the result has a gradient."""
    result = case(inputs)
    if isinstance(result, Tensor):
        result.backward()


@contextlib.contextmanager
def called_ops() -> Iterator[set[str]]:
    """The names of the ops that are called in the block, on whatever thread."""
    names, before = set(), dict(registry._kernels)

    def recording(op):
        def called(*arguments):
            names.add(op._schema.name)
            return op(*arguments)

        return called

    registry._kernels.update({key: recording(op) for key, op in before.items()})
    try:
        yield names
    finally:
        registry._kernels.update(before)


def registered_ops(backend: str) -> set[str]:
    """The names of the ops that have a kernel of the backend."""
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("fbkd_ops::")}
    triton = {name for name in names if name.endswith("_triton")}
    if backend == "triton":
        return triton
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {name for name in names - triton if has_kernel(name, backend.upper())}


def small(backend: str, device: str, maps: Iterable[Features]) -> set[str]:
    """Run every case on every map; the names of the ops that were called."""
    with backends.use_backend(backend), called_ops() as names:
        for inputs in maps:
            for case in cases_of(backend).values():
                call(case, inputs)
    if device == "cuda":
        torch.cuda.synchronize()
    return names


def large(backend: str, device: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Every op's case on one map, after a call that compiles and allocates."""
    inputs = features(shape, dtype, contiguous, device)
    cases = [case for name, case in cases_of(backend).items() if name in backends.FUNCTIONS]
    with backends.use_backend(backend):
        for case in cases:
            call(case, inputs)
        with profiler_on(device):
            for case in cases:
                call(case, inputs)


def loss_step(shape: tuple[int, ...], dtype: str, device: str) -> Callable[[], object]:
    """The benchmark's step of the whole loss, forward and backward, beside float32 parameters; P2 has the shape."""
    suite = SUITES["fbkd_loss"]
    case = Case(shape, dtype, device=device, strides=suite.strides(shape))
    return Runner(suite.implementations["fbkd_ops"](case), suite.inputs(case)).step


def loss(backend: str, device: str, dtype: str, shape: tuple[int, ...]) -> None:
    """One step of the whole loss, after one that compiles and allocates."""
    step = loss_step(shape, dtype, device)
    with backends.use_backend(backend):
        step()
        with profiler_on(device):
            step()


@contextlib.contextmanager
def profiler_on(device: str) -> Iterator[None]:
    """What ``ncu --profile-from-start off`` measures."""
    if device != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    yield
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("size", choices=("small", *SIZES))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("auto", "cuda", "triton", "cpu"), required=True)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--shape", type=int, nargs=4, metavar=("N", "C", "H", "W"), help="of P2 in large and loss")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.manual_seed(0)
    if options.size in SIZES:
        shape = tuple(options.shape or SIZES[options.size])
        if options.size == "loss":
            loss(options.backend, options.device, options.dtype, shape)
        else:
            large(options.backend, options.device, getattr(torch, options.dtype), shape)
        return
    expected = registered_ops(options.backend)
    if not expected:
        sys.exit(f"there is no op with a {options.backend} kernel: python -m fbkd_ops says why")
    maps = small_features(options.backend, options.device)
    missing = expected - small(options.backend, options.device, maps)
    if missing:
        sys.exit(f"no case calls {', '.join(sorted(missing))}: add one to scripts/gpu/op_calls.py")
    print(f"called every op of the {options.backend} backend: {len(expected)}")


if __name__ == "__main__":
    main()
