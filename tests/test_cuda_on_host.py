"""The CUDA kernels' own source, run on the host: indexing, tails, barriers and shuffles without a GPU."""

import ctypes
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import torch

from fbkd_ops import reference
from fbkd_ops._layout import matrix_view

ROOT = Path(__file__).resolve().parents[1]
DTYPES = {torch.float32: 0, torch.float64: 1, torch.float16: 2, torch.bfloat16: 3}


def cuda_headers():
    """Folder of cuda_fp16.h: of a toolkit, or of the wheels that torch brings; None without one."""
    site = Path(sysconfig.get_paths()["purelib"])
    candidates = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include", *site.glob("nvidia/*/include")]
    found = [folder for folder in candidates if (folder / "cuda_fp16.h").exists()]
    return found[0] if found else None


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    headers = cuda_headers()
    if shutil.which("g++") is None or headers is None or not (ROOT / "csrc").exists():
        pytest.skip("needs g++, CUDA's headers and the source tree")
    library = tmp_path_factory.mktemp("host") / "attention_pool.so"
    source = ROOT / "tests" / "cuda_on_host" / "attention_pool.cpp"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", "-pthread", "-w", f"-I{headers}"]
    # A misaligned 16-byte access is a crash on the GPU and would pass here.
    flags += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment", "-static-libubsan"]
    subprocess.run(["g++", *flags, str(source), "-o", str(library)], check=True, timeout=300)
    return ctypes.CDLL(str(library))


def pointers(tensors):
    return (ctypes.c_void_p * len(tensors))(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


def by_direction(view, spatial_abs, channel_abs, spatial_plain, channel_plain):
    spatial, channel = [spatial_abs, spatial_plain], [channel_abs, channel_plain]
    return [*channel, *spatial] if view.rows_are_channels else [*spatial, *channel]


def check(kernels, x, packs, row_tile, grid, groups, plain_only=False):
    leaf = x.detach().requires_grad_()
    expected = reference.attention_pool(leaf)
    grads = [torch.randn_like(output) for output in expected]
    used = [2, 3] if plain_only else [0, 1, 2, 3]
    (expected_dx,) = torch.autograd.grad([expected[i] for i in used], leaf, [grads[i] for i in used])
    view = matrix_view(x)
    means = [torch.full_like(output, float("nan")) for output in expected]
    given = [grad if index in used else None for index, grad in enumerate(grads)]
    dx = torch.full_like(x, float("nan")) if x.is_contiguous() else torch.full_like(expected_dx, float("nan"))
    dx = dx.contiguous(memory_format=torch.contiguous_format if view.rows_are_channels else torch.channels_last)
    sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 4)(*x.stride())
    kernels.attention_pool(
        DTYPES[x.dtype],
        packs,
        ctypes.c_void_p(x.data_ptr()),
        sizes,
        strides,
        ctypes.c_int64(row_tile),
        ctypes.c_uint(grid),
        groups,
        pointers(by_direction(view, *means)),
        pointers(by_direction(view, *given)),
        ctypes.c_void_p(dx.data_ptr()),
    )
    for mine, theirs in zip(means, expected):
        torch.testing.assert_close(mine, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dx, expected_dx)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize(
    "shape, packs, row_tile, grid, groups",
    [
        ((2, 9, 16, 34), True, 32, 2, False),  # 544 columns: two tiles, the second narrow; fewer blocks than tiles
        (
            (2, 9, 3, 7),
            False,
            8,
            3,
            False,
        ),  # rows start anywhere: one element a load; two row tiles, one row in the second
        ((1, 48, 4, 4), True, 2, 1, True),  # 24 row tiles: the second stage in 16 groups
        ((1, 16, 1, 1), True, 32, 1, False),  # one pixel
    ],
    ids=str,
)
def test_dense(kernels, dtype, layout, shape, packs, row_tile, grid, groups):
    x = torch.randn(shape).to(dtype).contiguous(memory_format=layout)
    columns = matrix_view(x).cols
    packs = packs and columns * x.element_size() % 16 == 0
    for plain_only in (False, True):
        check(kernels, x, packs, row_tile, grid, groups, plain_only)


def test_slices(kernels):
    """Rows and images further apart than they are long; the last pack of a row reaches past its end."""
    wide = torch.randn(2, 24, 5, 8).contiguous(memory_format=torch.channels_last)
    check(kernels, wide[:, 4:18], True, 32, 2, False)
    check(kernels, torch.randn(2, 7, 4, 8)[:, 2:5], True, 2, 2, False)


def test_nan_spreads(kernels):
    x = torch.randn(1, 5, 4, 8)
    x[0, 1, 2, 3] = float("nan")
    means = [torch.zeros(1, 5), torch.zeros(1, 5), torch.zeros(1, 4, 8), torch.zeros(1, 4, 8)]
    dx, grads = torch.empty_like(x), [torch.ones_like(mean) for mean in means]
    sizes, strides = (ctypes.c_int64 * 4)(*x.shape), (ctypes.c_int64 * 4)(*x.stride())
    kernels.attention_pool(
        0,
        True,
        ctypes.c_void_p(x.data_ptr()),
        sizes,
        strides,
        ctypes.c_int64(32),
        ctypes.c_uint(1),
        False,
        pointers(means),
        pointers(grads),
        ctypes.c_void_p(dx.data_ptr()),
    )
    assert [int(mean.isnan().sum()) for mean in means] == [1, 1, 1, 1]
    assert not dx.isnan().any()
