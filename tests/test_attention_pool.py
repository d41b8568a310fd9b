"""The attention pool on every backend: values, gradients, layouts, determinism, compilation."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fbkd_ops
from fbkd_ops import _extension
from fbkd_ops._layout import matrix_layout, matrix_view
from fbkd_ops.autograd.attention_pool import attention_pool

NO_CPU = pytest.mark.skipif(not _extension.cpu.loaded, reason=f"cpu library is {_extension.cpu.status}")
NO_CUDA = pytest.mark.skipif(not _extension.cuda.loaded, reason=f"cuda library is {_extension.cuda.status}")
NO_TRITON = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
INTERPRETER = pytest.mark.skipif(torch.cuda.is_available(), reason="Triton runs on the GPU, not in the interpreter")

BACKENDS = [
    pytest.param("cpu", "cpu", marks=NO_CPU, id="cpu"),
    pytest.param("triton", "cpu", marks=[NO_TRITON, INTERPRETER], id="triton-interpreter"),
    pytest.param("cuda", "cuda", marks=[NO_CUDA, pytest.mark.gpu], id="cuda"),
    pytest.param("triton", "cuda", marks=[NO_TRITON, pytest.mark.gpu], id="triton"),
]
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
    (9, 16, 32),  # 512 columns: exactly one CUDA tile, two Triton tiles; one row more than the 8 warps
    (9, 19, 27),  # 513 columns: one more than that
]
LARGE = [
    (7, 23, 45),  # 1035 float32 columns: over 4096 bytes a row, so four rows a step, and three rows are left
    (3, 64, 128),  # 8192 columns: the narrowest CPU tile, fewer rows than a step
    (6, 129, 131),  # 16899 columns: two CPU tiles, the second narrower; two rows after a step of four
    (260, 13, 17),  # two row tiles on the CPU, the second shorter; 9 on CUDA
    (2100, 2, 2),  # tall and narrow: two CPU row tiles of four columns; on CUDA 66 tiles, added in 16 groups
]


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


LAYOUTS = [
    contiguous,
    channels_last,
    channel_slice,
    channels_last_slice,
    batch_slice,
    spatial_slice,
    permuted,
    expanded,
]


@pytest.fixture(autouse=True)
def poison():
    """Fills every new tensor with NaN, those that C++ allocates too: an unwritten output cannot pass."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(shape, dtype, device="cpu"):
    """Values around 0 with some exact zeros of both signs."""
    x = torch.randn(shape, device=device, dtype=torch.float64)
    x[torch.rand_like(x) < 0.05] = 0.0
    x[torch.rand_like(x) < 0.05] = -0.0
    return x.to(dtype)


def run(x, backend, fields=fbkd_ops.AttentionPool._fields):
    """Outputs on a backend, and the gradient of x from random gradients of some of them."""
    leaf = x.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(leaf)
    generator = torch.Generator(x.device).manual_seed(1)
    chosen = [getattr(outputs, field) for field in fields]
    grads = [torch.randn(o.shape, generator=generator, device=x.device, dtype=torch.float64) for o in chosen]
    grads = [grad.float().to(o.dtype) for grad, o in zip(grads, chosen)]
    (dx,) = torch.autograd.grad(chosen, leaf, grads)
    return [output.detach() for output in outputs], dx


def exact_means(x):
    """The four means in 80-bit arithmetic, rounded to float64."""
    wide = x.detach().double().cpu().numpy().astype(np.longdouble)
    means = abs(wide).mean(1), abs(wide).mean((2, 3)), wide.mean(1), wide.mean((2, 3))
    return [torch.from_numpy(mean.astype(np.float64)).to(x.device) for mean in means]


def assert_as_good(ours, eager, exact, extra=0.0):
    """|ours - exact| <= 2 |eager - exact| + 8 eps of the accumulation dtype * RMS(exact), element by element."""
    assert ours.shape == exact.shape
    if not exact.numel():
        return
    accumulation = torch.float64 if eager.dtype == torch.float64 else torch.float32
    floor = 8 * torch.finfo(accumulation).eps * exact.square().mean().sqrt()
    allowed = 2 * (eager.double() - exact).abs() + floor + extra * exact.abs()
    excess = (ours.double() - exact).abs() - allowed
    assert not ours.isnan().any()
    assert (excess <= 0).all(), f"worst excess {excess.max():.3g} with a floor of {floor:.3g}"


def check(x, backend, fields=fbkd_ops.AttentionPool._fields):
    ours, dx = run(x, backend, fields)
    eager, eager_dx = run(x, "reference", fields)
    _, exact_dx = run(x.double(), "reference", fields)
    for mine, theirs, truth in zip(ours, eager, exact_means(x)):
        assert mine.dtype == theirs.dtype and mine.is_contiguous()
        assert_as_good(mine, theirs, truth)
    assert dx.dtype == x.dtype
    # Triton's interpreter truncates to bfloat16 where GPUs round.
    truncates = backend == "triton" and x.device.type == "cpu" and x.dtype == torch.bfloat16
    assert_as_good(dx, eager_dx, exact_dx, extra=torch.finfo(torch.bfloat16).eps if truncates else 0.0)
    return dx


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_small_sizes_in_both_layouts(backend, device, dtype, size):
    for layout in (contiguous, channels_last):
        check(layout(draw((2, *size), dtype, device)), backend)


@pytest.mark.parametrize("size", LARGE, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, device", [BACKENDS[0], *BACKENDS[2:]])
def test_large_sizes_in_both_layouts(backend, device, dtype, size):
    for layout in (contiguous, channels_last):
        check(layout(draw((2, *size), dtype, device)), backend)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@INTERPRETER
def test_triton_tiles_in_the_interpreter():
    """Two row tiles and two column tiles each way, and more tiles than one step of the second stage (16)."""
    for shape in ((1, 40, 20, 15), (1, 530, 1, 2)):
        for layout in (contiguous, channels_last):
            check(layout(draw(shape, torch.float32)), "triton")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_layouts(backend, device, dtype, layout):
    x = layout(draw((3, 6, 5, 8), dtype, device))
    dx = check(x, backend)
    last = layout in (channels_last, channels_last_slice)
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("layout", [contiguous, channels_last, channel_slice, channels_last_slice, batch_slice])
def test_supported_layouts_are_read_in_place(layout):
    x = layout(torch.randn(3, 6, 5, 8))
    view = matrix_view(x)
    assert matrix_layout(x) is not None
    rebuilt = x.as_strided((view.images, view.rows, view.cols), (view.image_stride, view.row_stride, 1))
    expected = x.flatten(2) if view.rows_are_channels else x.flatten(2).transpose(1, 2)
    assert torch.equal(rebuilt, expected)


@pytest.mark.parametrize("layout", [spatial_slice, permuted, expanded])
def test_other_layouts_are_recognised(layout):
    assert matrix_layout(layout(torch.randn(3, 6, 5, 8))) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=NO_CUDA), pytest.param("triton", marks=NO_TRITON)])
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_pyramid_level_on_gpu(backend, layout, dtype):
    """P2 of two 800 x 1344 images: enough tiles for the tall row tiles."""
    check(layout(draw((2, 256, 200, 336), dtype, "cuda")), backend)


@pytest.mark.gpu
@NO_CUDA
def test_many_images_on_gpu():
    """More images than a grid's y or z dimension could hold."""
    check(draw((70_000, 2, 1, 3), torch.float32, "cuda"), "cuda")


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_each_output_alone(backend, device, layout):
    x = layout(draw((2, 5, 3, 7), torch.float32, device))
    for field in fbkd_ops.AttentionPool._fields:
        check(x, backend, [field])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_plain_means_need_no_input_in_backward(backend, device):
    """NaN in x reaches dx through sign(x) alone, as 0 * gradient; here not even the memory may be read."""
    x = draw((2, 5, 3, 7), torch.float32, device)
    leaf = x.clone().requires_grad_()
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(leaf)
    with torch.no_grad():
        leaf.data.fill_(float("nan"))
    (dx,) = torch.autograd.grad(outputs.spatial_mean.sum() + outputs.channel_mean.sum(), leaf)
    torch.testing.assert_close(dx, torch.full_like(x, 1 / 5 + 1 / 21))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_gradient_needed(backend, device):
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(draw((2, 5, 3, 7), torch.float32, device))
    assert not any(output.requires_grad for output in outputs)


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 3, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch_and_single_pixel(backend, device, layout, shape):
    dx = check(layout(draw(shape, torch.float32, device)), backend)
    assert dx.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_and_infinity_spread_as_in_eager(backend, device, layout, dtype):
    x = draw((2, 6, 5, 8), dtype, device)
    x[0, 1, 2, 3], x[0, 4, 0, 0], x[1, 2, 3, 4] = float("nan"), float("inf"), -float("inf")
    ours, dx = run(layout(x), backend)
    eager, eager_dx = run(layout(x), "reference")
    for mine, theirs in zip([*ours, dx], [*eager, eager_dx]):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_gradient_reaches_every_element(backend, device):
    x = torch.zeros(1, 3, 2, 2, device=device, requires_grad=True)
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(x)
    (dx,) = torch.autograd.grad(outputs.channel_attention.sum() * float("nan"), x)
    assert dx.isnan().all()


@NO_CPU
def test_half_conversions_of_every_value():
    """All 65536 bit patterns, read and written by the vectorised 16-bit code."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 256, 256)
        with fbkd_ops.use_backend("cpu"):
            assert torch.equal(attention_pool(x).spatial_mean.nan_to_num(7), x[:, 0].float().nan_to_num(7))
        zeros = torch.zeros_like(x)
        for shift in (0.0, 2.0**-26, -(2.0**-26), 2.0**-9, -(2.0**-9)):
            grad = (x[:, 0].float() * (1 + shift) + shift * 2.0**-10).contiguous()
            dx = torch.ops.fbkd_ops.attention_pool_backward(zeros, None, None, grad, None)
            assert torch.equal(dx.nan_to_num(7), grad.to(dtype)[:, None].nan_to_num(7))
            assert torch.equal(dx.isnan(), grad.isnan()[:, None])


@NO_CPU
def test_nan_of_any_payload_stays_nan_in_16_bits():
    """Rounding a payload of ones up would carry into the sign and give -0."""
    grad = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.zeros(1, 1, 2, 2, dtype=dtype)
        assert torch.ops.fbkd_ops.attention_pool_backward(x, None, None, grad.view(1, 2, 2), None).isnan().all()


@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("backend, device", [BACKENDS[0], *BACKENDS[2:]])
def test_repeats_are_bit_equal(backend, device, layout):
    x = layout(draw((2, 70, 60, 80), torch.float32, device))
    first = run(x, backend)
    for _ in range(3):
        again = run(x, backend)
        assert all(torch.equal(a, b) for a, b in zip([*first[0], first[1]], [*again[0], again[1]]))


@NO_CPU
@pytest.mark.parametrize("layout", [contiguous, channels_last])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bit_equal_for_any_number_of_threads(layout, dtype):
    x = layout(draw((2, 70, 60, 80), dtype))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outputs, dx = run(x, "cpu")
        results.append([*outputs, dx])
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))


@NO_CPU
@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 70)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape_on_cpu(shape, layout, dtype):
    check(layout(draw(shape, dtype)), "cpu")


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradcheck(backend, device, layout):
    x = layout(torch.randn(2, 3, 2, 4, device=device, dtype=torch.float64)).detach()
    x = torch.where(x.abs() < 1e-3, 0.1, x) if layout is not expanded else x.clone()
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(attention_pool, (x.requires_grad_(),), fast_mode=backend == "triton")


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    x = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(x)
    (dx,) = torch.autograd.grad(outputs.spatial_attention.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_backward_twice_gives_the_same():
    x = torch.randn(2, 5, 3, 7, requires_grad=True)
    outputs = attention_pool(x)
    total = sum((output * output.detach()).sum() for output in outputs)
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS[:5], ids=lambda layout: layout.__name__)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device, dtype, layout):
    suffix = "_triton" if backend == "triton" else ""
    x = layout(draw((2, 3, 4, 5), dtype, device))
    forward = getattr(torch.ops.fbkd_ops, f"attention_pool_forward{suffix}").default
    backward = getattr(torch.ops.fbkd_ops, f"attention_pool_backward{suffix}").default
    grads = forward(x)
    torch.library.opcheck(forward, (x,))
    for given_grads in (grads, (None, None, grads[2], None)):
        torch.library.opcheck(backward, (x, *given_grads))


@NO_CPU
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last])
def test_fake_strides_of_degenerate_shapes(layout, shape):
    x = layout(torch.randn(shape))
    backward = torch.ops.fbkd_ops.attention_pool_backward.default
    torch.library.opcheck(backward, (x, *torch.ops.fbkd_ops.attention_pool_forward(x)), test_utils="test_faketensor")


@NO_CPU
def test_op_names_what_is_wrong():
    op = torch.ops.fbkd_ops
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match=r"x must have 4 dimensions \(N, C, H, W\), got 3"):
        op.attention_pool_forward(x[0])
    with pytest.raises(RuntimeError, match="contiguous, channels_last or a batch or channel slice"):
        op.attention_pool_forward(x[:, :, :, 1:])
    with pytest.raises(RuntimeError, match="float16, bfloat16, float32 or float64"):
        op.attention_pool_forward(x.int())
    with pytest.raises(RuntimeError, match="grad_channel_mean must be contiguous with 6 elements, got 8"):
        op.attention_pool_backward(x, None, None, None, torch.zeros(2, 4))
    with pytest.raises(RuntimeError, match="grad_spatial_mean must be float64 for a float64 x and float32 otherwise"):
        op.attention_pool_backward(x, None, None, torch.zeros(2, 4, 5).half(), None)


def loss_of(x):
    pool = attention_pool(x)
    return pool.spatial_attention.square().sum() + pool.channel_mean.sin().sum()


def assert_compiled_agrees(backend, device, compiler, layouts):
    torch.use_deterministic_algorithms(False)
    torch._dynamo.reset()
    compiled = torch.compile(loss_of, fullgraph=True, backend=compiler, dynamic=True)
    for layout in layouts:
        for size in ((2, 3, 4, 5), (3, 6, 7, 8)):
            x = layout(torch.randn(size, device=device)).requires_grad_()
            with fbkd_ops.use_backend(backend):
                (expected,) = torch.autograd.grad(loss_of(x), x)
                (dx,) = torch.autograd.grad(compiled(x), x)
            torch.testing.assert_close(dx, expected)
            assert dx.stride() == expected.stride()


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu"), ("auto", "cpu")])
def test_compiles_to_a_full_graph(backend, device):
    assert_compiled_agrees(backend, device, "aot_eager", [contiguous, channels_last])


@NO_CPU
def test_compiles_through_inductor():
    assert_compiled_agrees("cpu", "cpu", "inductor", [contiguous])
