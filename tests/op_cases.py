"""Backends, dtypes, sizes, layouts and tolerances that the test files of the ops share."""

import contextlib
import importlib.util
import itertools

import pytest
import torch
from helpers import pairs_of, rms

import fbkd_ops
from fbkd_ops import _extension

NO_CPU = pytest.mark.skipif(not _extension.cpu.loaded, reason=f"cpu library is {_extension.cpu.status}")
NO_CUDA = pytest.mark.skipif(not _extension.cuda.loaded, reason=f"cuda library is {_extension.cuda.status}")
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU, not in the interpreter")

ON_CPU = pytest.param("cpu", "cpu", marks=NO_CPU, id="cpu")
INTERPRETED = pytest.param("triton", "cpu", marks=[NO_TRITON, INTERPRETER], id="triton-interpreter")
ON_CUDA = pytest.param("cuda", "cuda", marks=[NO_CUDA, pytest.mark.gpu], id="cuda")
ON_TRITON = pytest.param("triton", "cuda", marks=[NO_TRITON, pytest.mark.gpu], id="triton")
BACKENDS = [ON_CPU, INTERPRETED, ON_CUDA, ON_TRITON]
# The interpreter takes 10 ms and more a program: it gets the smallest cases that reach every line.
COMPILED = [ON_CPU, ON_CUDA, ON_TRITON]

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]

# (C, H, W) and what each size reaches, read with channels as rows and (channels_last) with pixels as rows.
SMALL = [
    (1, 1, 1),  # a single element
    (3, 1, 1),  # one pixel: both layouts at once
    (1, 5, 3),  # one channel: both layouts at once
    (5, 3, 7),  # below a vector either way, and no multiple of four rows
    (4, 4, 4),  # exactly one step of four rows and one vector of columns
    (16, 3, 11),  # one column more than two vectors of float32 in AVX-512; one row more than a CUDA tile of 32
    (33, 1, 17),  # one more than a warp's lanes; a vector and one
    (9, 16, 32),  # 512 columns: two Triton tiles
    (9, 19, 27),  # 513 columns: one more than that
]
LARGE = [
    (7, 23, 45),  # 1035 float32 columns: over 4096 bytes a row and over a piece of 1024, three rows after a step
    (3, 64, 128),  # 8192 columns: the pool's narrowest CPU tile, two of the masked distance's; fewer rows than a step
    (6, 129, 131),  # 16899 columns: two and five CPU tiles, the last one narrower; two rows after a step of four
    (260, 13, 17),  # row tiles on the CPU, the last one shorter
    (2100, 2, 2),  # tall and narrow: many row tiles of four columns
]


def with_sizes(backends, sizes):
    """Parameters ``backend, device, size``; the interpreter gets four sizes."""
    return with_values(
        backends, sizes, [size for size in sizes if size in ((1, 1, 1), (3, 1, 1), (1, 5, 3), (5, 3, 7))]
    )


def with_dtypes(backends, dtypes=DTYPES):
    """Parameters ``backend, device, dtype``; the interpreter gets bfloat16."""
    return with_values(backends, dtypes, [torch.bfloat16])


def with_layouts(backends, layouts):
    """Parameters ``backend, device, layout``; the interpreter gets two layouts."""
    return with_values(backends, layouts, [contiguous, channels_last])


def with_values(backends, values, interpreted, names=None):
    """Parameters ``backend, device, value``, with values of its own for the interpreter."""
    parameters = []
    for backend in backends:
        chosen = interpreted if backend is INTERPRETED else values
        ids = names[: len(chosen)] if names else map(name_of, chosen)
        for value, name in zip(chosen, ids, strict=True):
            parameters.append(pytest.param(*backend.values, value, marks=backend.marks, id=f"{backend.id}-{name}"))
    return parameters


def with_pairs(backends, *values):
    """Parameters ``backend, device, *values``: all combinations; the interpreter gets those of ``pairs_of``."""
    parameters = []
    for backend in backends:
        rows = pairs_of(*values) if backend is INTERPRETED else itertools.product(*values)
        for row in rows:
            name = "-".join([backend.id, *map(name_of, row)])
            parameters.append(pytest.param(*backend.values, *row, marks=backend.marks, id=name))
    return parameters


def contiguous(x):
    return x.contiguous()


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def channel_slice(x):
    wide = torch.cat([x, x[:, :1], x], dim=1)
    return wide[:, : x.shape[1]]


def channels_last_slice(x):
    wide = torch.cat([x[:, :1], x, x], dim=1).contiguous(memory_format=torch.channels_last)
    return wide[:, 1 : 1 + x.shape[1]]


def batch_slice(x):
    return torch.stack([x, x], dim=1).flatten(0, 1)[::2]


def spatial_slice(x):
    return torch.nn.functional.pad(x, (1, 2, 1, 0))[:, :, 1:, 1:-2]


def permuted(x):
    return x.permute(3, 0, 1, 2).contiguous().permute(1, 2, 3, 0)


def expanded(x):
    return x[:, :, :1].expand_as(x)


def overlapping(x):
    """Images that share memory, as windows that slide over one long map by two pixels do."""
    _, channels, height, width = x.shape
    pixels = height * width + 2 * x.shape[0]
    memory = x.permute(0, 2, 3, 1).reshape(-1).repeat(3)[: pixels * channels]
    return memory.as_strided(x.shape, (2 * channels, 1, width * channels, channels))


IN_PLACE = [contiguous, channels_last, channel_slice, channels_last_slice, batch_slice]
COPIED = [spatial_slice, permuted, expanded]
LAYOUTS = [*IN_PLACE, *COPIED]
PAIRS_OF_LAYOUTS = [(s, t) for s in (contiguous, channels_last) for t in (contiguous, channels_last)]

# Levels that share a launch: (dtype, layout, (N, C, H, W)); one without images, two of them alike but for the dtype.
PYRAMID = [
    (torch.float32, contiguous, (2, 5, 9, 8)),
    (torch.bfloat16, channels_last, (1, 6, 3, 4)),
    (torch.float32, channels_last_slice, (0, 3, 4, 4)),
    (torch.float64, channel_slice, (2, 4, 3, 5)),
    (torch.float16, contiguous, (2, 5, 9, 8)),
    (torch.float32, batch_slice, (3, 1, 1, 1)),
]


def name_of(value):
    """Test ids of layouts, dtypes, sizes and tuples of them."""
    if isinstance(value, tuple):
        return ("x" if isinstance(value[0], int) else "-").join(map(name_of, value))
    return value.__name__ if callable(value) else str(value).removeprefix("torch.")


@contextlib.contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def draw(shape, dtype, device="cpu"):
    """Values around 0 with some exact zeros of both signs."""
    x = torch.randn(shape, device=device, dtype=torch.float64)
    x[torch.rand_like(x) < 0.05] = 0.0
    x[torch.rand_like(x) < 0.05] = -0.0
    return x.to(dtype)


def op_of(name, backend):
    """The registered op that a backend runs."""
    return getattr(torch.ops.fbkd_ops, name + ("_triton" if backend == "triton" else "")).default


def accumulation_of(*dtypes):
    return torch.float64 if torch.float64 in dtypes else torch.float32


def assert_as_good(ours, eager, exact, extra=0.0, accumulation=None, units=8, terms=None):
    """|ours - exact| <= 2 |eager - exact| + 8 eps of the accumulation dtype * RMS(exact), element by element.

    ``terms`` are the sums of the absolute values of what cancels in ``exact``: their RMS is the yardstick then.
    """
    assert ours.shape == exact.shape and ours.dtype == eager.dtype
    if not exact.numel():
        return
    accumulation = accumulation or accumulation_of(eager.dtype)
    floor = units * torch.finfo(accumulation).eps * (exact if terms is None else terms).square().mean().sqrt()
    allowed = 2 * (eager.double() - exact).abs() + floor + extra * exact.abs()
    excess = (ours.double() - exact).abs() - allowed
    assert not ours.isnan().any()
    assert (excess <= 0).all(), f"worst excess {excess.max():.3g} with a floor of {floor:.3g}"


def correlation_terms(student, teacher, eps=1e-6):
    """How large the terms are that cancel in the channel correlation, and in each element of its gradient.

    Kernels add them up in float64, of maps that are shifted by their first elements.
    """
    maps = [student.detach().double(), teacher.detach().double()]
    if not student.numel():
        return torch.ones((), dtype=torch.float64), maps[0]
    correction = min(1, student.numel() // student.shape[1] - 1)
    deviations = [x.std(dim=(0, 2, 3), keepdim=True, correction=correction) + eps for x in maps]
    shifts = [x[:1, :, :1, :1] - x.mean(dim=(0, 2, 3), keepdim=True) for x in maps]
    spread = 1 + sum((shift / deviation).square() for shift, deviation in zip(shifts, deviations, strict=True))
    terms = sum(x.abs() / deviation for x, deviation in zip(maps, deviations, strict=True))
    return spread.mean(), spread * terms / (student.numel() * deviations[0])


def divergence_terms(student, teacher, temperature):
    """How large the terms are that cancel in the channel divergence, and in each element of its gradient.

    An error of an exponential's argument is one of its value.
    """
    logits = [x.detach().double().flatten(2) / temperature for x in (student, teacher)]
    logs = [torch.log_softmax(x, dim=2) for x in logits]
    sizes = [1 + x.abs() + log.abs() for x, log in zip(logits, logs, strict=True)]
    losses = (logs[1].exp() * (sizes[0] + sizes[1])).sum(2)
    mean = losses.mean() if losses.numel() else losses.sum()
    gradient = sum(log.exp() * size for log, size in zip(logs, sizes, strict=True))
    return temperature**2 * mean, temperature / max(losses.numel(), 1) * gradient


def units_of_sum(count):
    """Return by how many eps a float sum of ``count`` numbers of one sign may be off, whatever the vector width.

    Kernels add up to 1024 numbers in float, one after the other where there are no vectors.
    """
    return max(8, min(count, 1024) ** 0.5)


def assert_close_to_truth(ours, eager, truth, eps):
    """No further from the truth than twice plain PyTorch, on the RMS, plus some eps."""
    assert ours.shape == truth.shape and ours.dtype == eager.dtype
    if ours.numel():
        assert rms(ours.double() - truth) <= 2 * rms(eager.double() - truth) + eps * rms(truth)


def precision_of(backend, student, teacher):
    """In which dtype plain PyTorch is as precise as a backend's products, and the eps that it may be off besides.

    Triton's tensor cores multiply features of one 16-bit dtype with matrices and residuals rounded to it. The CPU
    vendor's products of very few rows add all pixels into one float.
    """
    if backend == "triton" and student.dtype == teacher.dtype and student.dtype.itemsize == 2:
        return student.dtype, torch.finfo(student.dtype).eps / 4
    accumulation = accumulation_of(student.dtype, teacher.dtype)
    return accumulation, 16 * torch.finfo(accumulation).eps


def truncation(backend, device, dtype):
    """What a bfloat16 result may be off besides: Triton's interpreter truncates where GPUs round."""
    truncates = backend == "triton" and device == "cpu" and dtype == torch.bfloat16
    return torch.finfo(torch.bfloat16).eps if truncates else 0.0


def assert_same_bits(ours, theirs):
    """Equal in dtype, shape, strides and every bit; Nones in the same places."""
    ours, theirs = list(ours), list(theirs)
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride()
        integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
        assert torch.equal(a.detach().view(integer), b.detach().view(integer))


def far_apart(x, layout=contiguous):
    """``x`` in bfloat16, its images so far apart that 32 bits cannot count the elements between them.

    The memory is never touched but for the images themselves; poison would fill it.
    """
    torch.use_deterministic_algorithms(False)
    n, channels, height, width = x.shape
    far = 2**32 + 64  # cut to 32 bits this is an address beside the first image: wrong values, not a crash
    memory = torch.empty((n - 1) * far + x.numel(), dtype=torch.bfloat16)
    strides = layout(x[:1]).stride()
    view = memory.as_strided(x.shape, (far, *strides[1:]))
    return view.copy_(x)


def assert_compiled_agrees(function, inputs, backend, compiler):
    """``function`` and its gradients, compiled into one graph for any size, against eager.

    Args:
        function: of the tensors of one entry of inputs; gives a scalar.
        inputs: sets of tensors, of different sizes; those that need a gradient say so.
        backend: of the package.
        compiler: torch.compile's backend.
    """
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=compiler, dynamic=True)
    for tensors in inputs:
        leaves = [x for x in tensors if x.requires_grad]
        with fbkd_ops.use_backend(backend):
            expected = function(*tensors)
            result = compiled(*tensors)
            grads = torch.autograd.grad(result, leaves), torch.autograd.grad(expected, leaves)
        torch.testing.assert_close(result, expected)
        for ours, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(ours, theirs)
            assert ours.stride() == theirs.stride()
