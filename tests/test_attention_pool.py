"""The attention pool on every backend: values, gradients, layouts, determinism, compilation."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BACKENDS,
    COMPILED,
    COPIED,
    DTYPES,
    IN_PLACE,
    INTERPRETER,
    LARGE,
    LAYOUTS,
    NO_CPU,
    NO_CUDA,
    NO_TRITON,
    PYRAMID,
    SMALL,
    accumulation_of,
    assert_as_good,
    assert_compiled_agrees,
    assert_same_bits,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    expanded,
    far_apart,
    name_of,
    op_of,
    threads,
    truncation,
    units_of_sum,
    with_dtypes,
    with_layouts,
    with_sizes,
)

import fbkd_ops
from fbkd_ops._layout import matrix_layout, matrix_view
from fbkd_ops.functional import attention_pool, attention_pools

pytestmark = pytest.mark.usefixtures("poison")

FIELDS = fbkd_ops.AttentionPool._fields


def run(x, backend, fields=FIELDS):
    """Outputs on a backend, and the gradient of x from random gradients of some of them."""
    leaf = x.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        outputs = attention_pool(leaf)
    generator = torch.Generator(x.device).manual_seed(1)
    chosen = [getattr(outputs, field) for field in fields]
    grads = [torch.randn(o.shape, generator=generator, device=x.device, dtype=torch.float64) for o in chosen]
    grads = [grad.float().to(o.dtype) for grad, o in zip(grads, chosen, strict=True)]
    (dx,) = torch.autograd.grad(chosen, leaf, grads)
    return [output.detach() for output in outputs], dx


def exact_means(x):
    """The four means in 80-bit arithmetic, rounded to float64."""
    wide = x.detach().double().cpu().numpy().astype(np.longdouble)
    means = abs(wide).mean(1), abs(wide).mean((2, 3)), wide.mean(1), wide.mean((2, 3))
    return [torch.from_numpy(mean.astype(np.float64)).to(x.device) for mean in means]


def check(x, backend, fields=FIELDS):
    ours, dx = run(x, backend, fields)
    eager, eager_dx = run(x, "reference", fields)
    _, exact_dx = run(x.double(), "reference", fields)
    exact = exact_means(x)
    # Plain means cancel: their yardstick are the means of what they add, the attention maps.
    for mine, theirs, truth, terms, count in zip(
        ours, eager, exact, exact[:2] * 2, 2 * [x.shape[1], x.shape[2] * x.shape[3]], strict=True
    ):
        assert mine.dtype == theirs.dtype and mine.is_contiguous()
        assert_as_good(mine, theirs, truth, units=units_of_sum(count), terms=terms)
    assert dx.dtype == x.dtype
    assert_as_good(dx, eager_dx, exact_dx, truncation(backend, x.device.type, x.dtype), accumulation_of(x.dtype))
    return dx


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend, device, size", [*with_sizes(BACKENDS, SMALL), *with_sizes(COMPILED, LARGE)])
def test_sizes_in_both_layouts(backend, device, size, dtype):
    for layout in (contiguous, channels_last):
        check(layout(draw((2, *size), dtype, device)), backend)


@NO_TRITON
@INTERPRETER
def test_triton_tiles_in_the_interpreter():
    """Two row tiles and two column tiles either way, and more tiles than one step of the second stage (16)."""
    for layout, shape in (
        (contiguous, (1, 33, 1, 257)),
        (channels_last, (1, 257, 1, 33)),
        (contiguous, (1, 530, 1, 2)),
    ):
        check(layout(draw(shape, torch.float32)), "triton")


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device, dtype", with_dtypes(BACKENDS))
def test_layouts(backend, device, dtype, layout):
    x = layout(draw((3, 6, 5, 8), dtype, device))
    dx = check(x, backend)
    last = layout in (channels_last, channels_last_slice)
    assert dx.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize("layout", IN_PLACE, ids=name_of)
def test_supported_layouts_are_read_in_place(layout):
    x = layout(torch.randn(3, 6, 5, 8))
    view = matrix_view(x)
    assert matrix_layout(x) is not None
    rebuilt = x.as_strided((view.images, view.rows, view.cols), (view.image_stride, view.row_stride, 1))
    expected = x.flatten(2) if view.rows_are_channels else x.flatten(2).transpose(1, 2)
    assert torch.equal(rebuilt, expected)


@pytest.mark.parametrize("layout", COPIED, ids=name_of)
def test_other_layouts_are_recognised(layout):
    assert matrix_layout(layout(torch.randn(3, 6, 5, 8))) is None


@pytest.mark.gpu
@pytest.mark.parametrize("backend", [pytest.param("cuda", marks=NO_CUDA), pytest.param("triton", marks=NO_TRITON)])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
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
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_each_output_alone(backend, device, layout):
    x = layout(draw((2, 5, 3, 7), torch.float32, device))
    for field in FIELDS:
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
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch_and_single_pixel(backend, device, layout, shape):
    dx = check(layout(draw(shape, torch.float32, device)), backend)
    assert dx.shape == shape


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_and_infinity_spread_as_in_eager(backend, device, layout, dtype):
    x = draw((2, 6, 5, 8), dtype, device)
    x[0, 1, 2, 3], x[0, 4, 0, 0], x[1, 2, 3, 4] = float("nan"), float("inf"), -float("inf")
    ours, dx = run(layout(x), backend)
    eager, eager_dx = run(layout(x), "reference")
    for mine, theirs in zip([*ours, dx], [*eager, eager_dx], strict=True):
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
            dx = torch.ops.fbkd_ops.attention_pool_backward([zeros], [None, None, grad, None])[0]
            assert torch.equal(dx.nan_to_num(7), grad.to(dtype)[:, None].nan_to_num(7))
            assert torch.equal(dx.isnan(), grad.isnan()[:, None])


@NO_CPU
def test_nan_of_any_payload_stays_nan_in_16_bits():
    """Rounding a payload of ones up would carry into the sign and give -0."""
    grad = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.zeros(1, 1, 2, 2, dtype=dtype)
        (dx,) = torch.ops.fbkd_ops.attention_pool_backward([x], [None, None, grad.view(1, 2, 2), None])
        assert dx.isnan().all()


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layout):
    x = layout(draw((2, 70, 60, 80), torch.float32, device))
    first = run(x, backend)
    for _ in range(3):
        again = run(x, backend)
        assert all(torch.equal(a, b) for a, b in zip([*first[0], first[1]], [*again[0], again[1]], strict=True))


@NO_CPU
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bit_equal_for_any_number_of_threads(layout, dtype):
    x = layout(draw((2, 70, 60, 80), dtype))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            outputs, dx = run(x, "cpu")
        results.append([*outputs, dx])
    for other in results[1:]:
        assert_same_bits(results[0], other)


def pyramid(device):
    return [layout(draw(shape, dtype, device)) for dtype, layout, shape in PYRAMID]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(backend, device):
    levels = pyramid(device)
    alone = [run(x, backend) for x in levels]
    leaves = [x.detach().requires_grad_() for x in levels]
    with fbkd_ops.use_backend(backend):
        pools = attention_pools(leaves)
    grads = []
    for pool in pools:
        generator = torch.Generator(device).manual_seed(1)
        for mean in pool:
            grad = torch.randn(mean.shape, generator=generator, device=device, dtype=torch.float64)
            grads.append(grad.float().to(mean.dtype))
    together = torch.autograd.grad([mean for pool in pools for mean in pool], leaves, grads)
    assert_same_bits([mean for pool in pools for mean in pool], [mean for means, _ in alone for mean in means])
    assert_same_bits(together, [dx for _, dx in alone])


@NO_CPU
@pytest.mark.parametrize("count", [1, 2, 3])
def test_large_levels_together_equal_levels_alone(count):
    """Levels that share threads and turns, in both orders."""
    levels = [layout(draw((2, *size), torch.float32)) for size in LARGE for layout in (contiguous, channels_last)]
    alone = [torch.ops.fbkd_ops.attention_pool_forward([x]) for x in levels]
    with threads(count):
        for order in (1, -1):
            means = torch.ops.fbkd_ops.attention_pool_forward(levels[::order])
            assert_same_bits(means, [mean for pool in alone[::order] for mean in pool])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_without_a_gradient_are_left_alone(backend, device):
    levels = [x.requires_grad_() for x in pyramid(device)]
    with fbkd_ops.use_backend(backend):
        pools = attention_pools(levels)
        alone = attention_pools(levels[1:2])
    used = pools[1].spatial_attention.sum() + pools[4].channel_mean.sum()
    grads = torch.autograd.grad(used, levels, allow_unused=True)
    assert [grad is not None for grad in grads] == [False, True, False, False, True, False]
    assert_same_bits(grads[1:2], torch.autograd.grad(alone[0].spatial_attention.sum(), levels[1]))
    images, channels, height, width = levels[4].shape
    assert torch.equal(grads[4], torch.full_like(levels[4], 1 / (height * width)))


def test_no_levels():
    assert attention_pools([]) == []


def test_a_level_elsewhere_is_named():
    x = torch.ones(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"features\[1\] and features\[0\] must be on one device, got meta and cpu"):
        attention_pools([x, x.to("meta")])
    with pytest.raises(TypeError, match=r"features\[1\] must have dtype .* got int64"):
        attention_pools([x, x.long()])


@NO_CPU
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_offsets_beyond_32_bits(layout):
    near = layout(draw((2, 3, 4, 5), torch.bfloat16))
    far = far_apart(near, layout)
    for ours, theirs in zip(run(far, "cpu"), run(near, "cpu"), strict=True):
        assert_same_bits(*([x] if isinstance(x, torch.Tensor) else x for x in (ours, theirs)))


@NO_CPU
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 70)),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
)
def test_any_shape_on_cpu(shape, layout, dtype, seed):
    torch.manual_seed(seed)
    check(layout(draw(shape, dtype)), "cpu")


@pytest.mark.parametrize("backend, device, layout", with_layouts(BACKENDS, LAYOUTS))
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
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_backward_twice_gives_the_same():
    x = torch.randn(2, 5, 3, 7, requires_grad=True)
    outputs = attention_pool(x)
    total = sum((output * output.detach()).sum() for output in outputs)
    (first,) = torch.autograd.grad(total, x, retain_graph=True)
    (second,) = torch.autograd.grad(total, x)
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", IN_PLACE, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_opcheck(backend, device, dtype, layout):
    check_registration(backend, [layout(draw((2, 3, 4, 5), dtype, device))])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck_of_several_levels(backend, device):
    check_registration(backend, pyramid(device)[1:3])


def check_registration(backend, levels):
    forward, backward = op_of("attention_pool_forward", backend), op_of("attention_pool_backward", backend)
    grads = forward(levels)
    torch.library.opcheck(forward, (levels,))
    torch.library.opcheck(backward, (levels, grads))
    some = [mean if index % 4 == 2 else None for index, mean in enumerate(grads)]
    torch.library.opcheck(backward, (levels, some))


@NO_CPU
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1)], ids=str)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_fake_strides_of_degenerate_shapes(layout, shape):
    x = layout(torch.randn(shape))
    backward = torch.ops.fbkd_ops.attention_pool_backward.default
    grads = torch.ops.fbkd_ops.attention_pool_forward([x])
    torch.library.opcheck(backward, ([x], grads), test_utils="test_faketensor")


@NO_CPU
def test_op_names_what_is_wrong():
    op = torch.ops.fbkd_ops
    x = torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match=r"x must have 4 dimensions \(N, C, H, W\), got 3"):
        op.attention_pool_forward([x[0]])
    with pytest.raises(RuntimeError, match="contiguous, channels_last or a batch or channel slice"):
        op.attention_pool_forward([x, x[:, :, :, 1:]])
    with pytest.raises(RuntimeError, match="float16, bfloat16, float32 or float64"):
        op.attention_pool_forward([x.int()])
    with pytest.raises(RuntimeError, match="grads must have 8 entries, got 4"):
        op.attention_pool_backward([x, x], [None] * 4)
    with pytest.raises(RuntimeError, match="grad_channel_mean must be contiguous with 6 elements, got 8"):
        op.attention_pool_backward([x], [None, None, None, torch.zeros(2, 4)])
    with pytest.raises(RuntimeError, match="grad_spatial_mean must be float32 unless the features are float64"):
        op.attention_pool_backward([x], [None, None, torch.zeros(2, 4, 5).half(), None])
    for empty in (x[:, :0].contiguous(), x[:, :, :0].contiguous(), x[..., :0].contiguous()):
        with pytest.raises(RuntimeError, match="x must have at least one channel and one pixel"):
            op.attention_pool_forward([empty])


def loss_of(x):
    pool = attention_pool(x)
    return pool.spatial_attention.square().sum() + pool.channel_mean.sin().sum()


def inputs_to_compile(device, layouts):
    sizes = ((2, 3, 4, 5), (3, 6, 2, 8))
    return [[layout(torch.randn(size, device=device)).requires_grad_()] for layout in layouts for size in sizes]


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu"), ("auto", "cpu")])
def test_compiles_to_a_full_graph(backend, device):
    assert_compiled_agrees(loss_of, inputs_to_compile(device, [contiguous, channels_last]), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor():
    assert_compiled_agrees(loss_of, inputs_to_compile("cpu", [contiguous]), "cpu", "inductor")
