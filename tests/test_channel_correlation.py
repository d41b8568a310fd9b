"""The channel correlation on every backend: values, gradients, layouts, determinism, compilation, errors."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BACKENDS,
    COMPILED,
    DTYPES,
    INTERPRETED,
    LARGE,
    LAYOUTS,
    NO_CPU,
    PAIRS_OF_LAYOUTS,
    PYRAMID,
    SMALL,
    accumulation_of,
    assert_as_good,
    assert_compiled_agrees,
    assert_same_bits,
    channels_last,
    channels_last_slice,
    contiguous,
    correlation_terms,
    draw,
    expanded,
    far_apart,
    name_of,
    op_of,
    spatial_slice,
    threads,
    truncation,
    units_of_sum,
    with_layouts,
    with_sizes,
)

import fbkd_ops
from fbkd_ops.functional import channel_correlation_loss
from fbkd_ops.ops.channel_correlation import channel_correlation_losses

pytestmark = pytest.mark.usefixtures("poison")

MIXTURES = list(itertools.product(DTYPES, DTYPES))
EPS = 1e-6


def draw_pair(shape, dtypes, device="cpu"):
    """A student, and a teacher that agrees with it in part, with a mean far from 0."""
    student = draw(shape, torch.float64, device)
    teacher = 2 * student + draw(shape, torch.float64, device) + 5
    return student.to(dtypes[0]), teacher.to(dtypes[1])


def run(student, teacher, backend):
    """The loss on a backend and the gradient of the student."""
    leaf = student.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = channel_correlation_loss(leaf, teacher)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def check(student, teacher, backend):
    """As good as eager, up to the rounding of sums in float64 whatever the accumulation dtype."""
    accumulation = accumulation_of(student.dtype, teacher.dtype)
    ours, eager = run(student, teacher, backend), run(student, teacher, "reference")
    exact = run(student.double(), teacher.double(), "reference")
    assert ours[0].dtype == accumulation and ours[1].dtype == student.dtype
    values = student.numel() // student.shape[1]
    rounding = torch.finfo(torch.float64).eps / torch.finfo(accumulation).eps
    # The gradient's elements are rounded once more, to the student's dtype.
    extras = 0.0, 4 * torch.finfo(accumulation).eps + truncation(backend, student.device.type, student.dtype)
    for mine, theirs, true, size, extra in zip(
        ours, eager, exact, correlation_terms(student, teacher), extras, strict=True
    ):
        terms = true.abs() + rounding * size
        assert_as_good(mine, theirs, true, extra, accumulation, units_of_sum(values), terms)
    return ours


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device, size", with_sizes(COMPILED, SMALL))
def test_small_sizes_in_every_mixture_of_dtypes_and_layouts(backend, device, size, dtypes):
    for of_student, of_teacher in PAIRS_OF_LAYOUTS:
        student, teacher = draw_pair((2, *size), dtypes, device)
        check(of_student(student), of_teacher(teacher), backend)


@pytest.mark.parametrize("size", LARGE, ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(backend, device, layouts, size):
    for dtypes in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        pair = draw_pair((2, *size), dtypes, device)
        check(*(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_mixtures_in_the_interpreter(backend, device, dtypes):
    layouts = PAIRS_OF_LAYOUTS[MIXTURES.index(dtypes) % 4]
    pair = draw_pair((2, 5, 3, 7), dtypes, device)
    check(*(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_in_the_interpreter(backend, device, layouts):
    """Two tiles of channels and of pixels; 16-byte loads; the second one aligned."""
    for shape in ((1, 33, 1, 130), (2, 36, 4, 34)):
        pair = draw_pair(shape, (torch.float32, torch.float32), device)
        check(*(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("of_teacher", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_layouts(backend, device, of_student, of_teacher):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16))[: 1 if backend == "triton" else 2]:
        student, teacher = draw_pair((3, 6, 5, 8), dtypes, device)
        _, gradient = check(of_student(student), of_teacher(teacher), backend)
        last = of_student in (channels_last, channels_last_slice)
        assert gradient.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@NO_CPU
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 70)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtypes=st.sampled_from(MIXTURES),
    seed=st.integers(0, 999),
)
def test_any_shape_on_cpu(shape, layouts, dtypes, seed):
    torch.manual_seed(seed)
    check(*(layout(x) for layout, x in zip(layouts, draw_pair(shape, dtypes), strict=True)), "cpu")


@pytest.mark.parametrize("of_teacher", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_gradcheck(backend, device, of_student, of_teacher):
    student, teacher = (torch.randn(2, 3, 2, 4, device=device, dtype=torch.float64) for _ in range(2))
    student, teacher = of_student(student).detach(), of_teacher(teacher)
    student = student.clone() if of_student is expanded else student
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda s: channel_correlation_loss(s, teacher), (student.requires_grad_(),), fast_mode=backend == "triton"
        )


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_teacher_receives_no_gradient(backend, device):
    student, teacher = (draw((2, 3, 4, 5), torch.float32, device).requires_grad_() for _ in range(2))
    with fbkd_ops.use_backend(backend):
        channel_correlation_loss(student, teacher).backward()
        assert student.grad is not None and teacher.grad is None
        assert not channel_correlation_loss(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    student = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    with fbkd_ops.use_backend(backend):
        loss = channel_correlation_loss(student, torch.randn_like(student))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_equal_maps_have_loss_and_gradient_zero(backend, device, layouts):
    student = 3 * draw((2, 3, 4, 4), torch.float32, device) + 100
    loss, gradient = run(layouts[0](student), layouts[1](student), backend)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_maps_that_nearly_agree_keep_their_digits(backend, device, dtype):
    """The loss is 5e-11 of what its sums are: in float32 they would leave nothing of it."""
    teacher = torch.randn(2, 4, 6, 7, dtype=torch.float64, device=device).to(dtype)
    student = (2 * teacher + 1e-5 * torch.randn_like(teacher)).to(dtype)
    ours, exact = run(student, teacher, backend), run(student.double(), teacher.double(), "reference")
    assert 0 < exact[0] < 1e-10
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-4, atol=0)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-3, atol=1e-3 * exact[1].abs().max().item())


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_scale_and_a_shift_of_each_channel_change_nothing(backend, device):
    student, teacher = draw_pair((2, 3, 4, 5), (torch.float64, torch.float64), device)
    factor, shift = torch.rand(1, 3, 1, 1).to(student) + 0.5, 1e4 * torch.randn(1, 3, 1, 1).to(student)
    expected, _ = run(student, teacher, backend)
    torch.testing.assert_close(run(factor * student + shift, teacher, backend)[0], expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("constant", ["student", "teacher", "both"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_constant_channels(backend, device, constant, layouts):
    """A channel without variance is 0 after standardising; its deviation has no gradient."""
    maps = dict(zip(("student", "teacher"), draw_pair((2, 3, 4, 5), (torch.float32,) * 2, device), strict=True))
    for name in maps if constant == "both" else (constant,):
        maps[name][:, 1] = 0.1
    student, teacher = (layout(maps[name]) for layout, name in zip(layouts, maps, strict=True))
    loss, gradient = check(student, teacher, backend)
    assert loss.isfinite() and gradient.isfinite().all()
    # n - 1 of n from the one that is not constant, less what eps takes
    others = run(student[:, ::2].contiguous(), teacher[:, ::2].contiguous(), backend)[0]
    share = 0 if constant == "both" else 39 / 40 / 2
    torch.testing.assert_close(3 * loss, 2 * others + share, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 3, 1, 1)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_pixel_and_one_pixel(backend, device, layouts, shape):
    pair = (layout(torch.randn(shape, device=device)) for layout in layouts)
    loss, gradient = check(*pair, backend)
    assert loss == 0 and torch.equal(gradient, torch.zeros(shape, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_and_infinity_reach_the_loss_and_their_channel(backend, device, where, value):
    maps = dict(zip(("student", "teacher"), draw_pair((2, 3, 4, 5), (torch.float32,) * 2, device), strict=True))
    maps[where][1, 2, 3, 4] = value
    ours, eager = (run(maps["student"], maps["teacher"], name) for name in (backend, "reference"))
    assert ours[0].isnan()
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layouts):
    pair = draw_pair((2, 70, 60, 80), (torch.float32, torch.float32), device)
    maps = [layout(x) for layout, x in zip(layouts, pair, strict=True)]
    first = run(*maps, backend)
    for _ in range(3):
        assert_same_bits(first, run(*maps, backend))


@NO_CPU
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_bit_equal_for_any_number_of_threads(layouts, dtypes):
    maps = [layout(x) for layout, x in zip(layouts, draw_pair((2, 70, 60, 80), dtypes), strict=True)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(*maps, "cpu"))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def pyramid(device, of_levels=PYRAMID):
    """Students and teachers of dtypes and layouts of their own."""
    students, teachers = [], []
    for index, (dtype, layout, shape) in enumerate(of_levels):
        other, of_teacher, _ = of_levels[index - 1]
        students.append(layout(draw(shape, dtype, device)))
        teachers.append(of_teacher(draw(shape, other, device)))
    return students, teachers


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(backend, device):
    students, teachers = pyramid(device)
    weights = torch.rand(len(students), dtype=torch.float64).float()
    leaves = [x.detach().requires_grad_() for x in students]
    losses = channel_correlation_losses(backend, leaves, teachers, EPS)
    together = torch.autograd.grad(losses, leaves, weights.to(losses))
    for index, level in enumerate(zip(leaves, teachers, strict=True)):
        alone = channel_correlation_losses(backend, *([x] for x in level), EPS)
        assert_same_bits([losses[index].to(alone.dtype)], [alone[0]])
        (gradient,) = torch.autograd.grad(alone, level[0], weights[index : index + 1].to(alone))
        assert_same_bits([together[index]], [gradient])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_some_levels_used(backend, device):
    students, teachers = pyramid(device)
    leaves = [x.detach().requires_grad_(index != 1) for index, x in enumerate(students)]
    losses = channel_correlation_losses(backend, leaves, teachers, EPS)
    (losses[0] + 3 * losses[4]).backward()
    assert leaves[1].grad is None
    for index in (3, 5):
        assert torch.equal(leaves[index].grad, torch.zeros_like(leaves[index]))
    for index in (0, 4):
        assert leaves[index].grad.abs().sum() > 0


@NO_CPU
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_offsets_beyond_32_bits(layouts):
    pair = draw_pair((2, 3, 4, 5), (torch.bfloat16, torch.bfloat16))
    student, teacher = (layout(x) for layout, x in zip(layouts, pair, strict=True))
    near = run(student, teacher, "cpu")
    assert_same_bits(near, run(far_apart(student, layouts[0]), teacher, "cpu"))
    assert_same_bits(near, run(student, far_apart(teacher, layouts[1]), "cpu"))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    pair = draw_pair((2, 3, 4, 5), (torch.bfloat16, torch.float32), device)
    expected = run(*pair, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(expected, run(*pair, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_twice_gives_the_same(backend, device):
    student, teacher = draw_pair((2, 3, 4, 5), (torch.float32, torch.float32), device)
    with fbkd_ops.use_backend(backend):
        loss = channel_correlation_loss(student.requires_grad_(), teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert_same_bits(torch.autograd.grad(loss, student), [kept])


def test_a_student_changed_in_place_is_noticed():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    features = student * 2
    loss = channel_correlation_loss(features, torch.randn_like(student))
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    arguments = pyramid(device, PYRAMID[1:3] if backend == "triton" else PYRAMID)
    forward = op_of("channel_correlation_forward", backend)
    losses, *coefficients = forward(*arguments, EPS)
    torch.library.opcheck(forward, (*arguments, EPS))
    torch.library.opcheck(op_of("channel_correlation_backward", backend), (*arguments, coefficients, losses))


@NO_CPU
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1)], ids=name_of)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_fake_strides_of_degenerate_shapes(layout, shape):
    x = layout(torch.randn(shape))
    coefficients = torch.zeros(4, shape[1], dtype=torch.float64)
    arguments = ([x], [contiguous(x)], [coefficients], torch.ones(1))
    torch.library.opcheck(op_of("channel_correlation_backward", "cpu"), arguments, test_utils="test_faketensor")


@NO_CPU
def test_op_names_what_is_wrong():
    x = torch.randn(2, 3, 4, 5)
    forward, backward = (op_of(f"channel_correlation_{name}", "cpu") for name in ("forward", "backward"))
    with pytest.raises(RuntimeError, match="teacher must have 2 entries, got 1"):
        forward([x, x], [x], EPS)
    with pytest.raises(RuntimeError, match="student and teacher must agree in N, C, H and W"):
        forward([x], [x[:, :2]], EPS)
    with pytest.raises(RuntimeError, match=r"teacher must be contiguous, channels_last or .* teacher.contiguous\(\)"):
        forward([x], [x.mT], EPS)
    with pytest.raises(RuntimeError, match="coefficients must have 1 entries, got 0"):
        backward([x], [x], [], torch.zeros(1))
    with pytest.raises(RuntimeError, match="coefficients must be contiguous with 12 elements, got 3"):
        backward([x], [x], [torch.zeros(3, dtype=torch.float64)], torch.zeros(1))
    with pytest.raises(RuntimeError, match="grad must be contiguous with 1 elements, got 2"):
        backward([x], [x], [torch.zeros(4, 3, dtype=torch.float64)], torch.zeros(2))


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (lambda x: (x, x[:, :2]), ValueError, r"agree in N, C, H and W, got \(2, 3, 4, 5\) and \(2, 2, 4, 5\)"),
        (lambda x: (x, x.to("meta")), ValueError, r"one device, got cpu and meta"),
        (lambda x: (x.int(), x), TypeError, r"student must have dtype float16, .* got int32"),
        (lambda x: (x, x[0]), ValueError, r"teacher must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        channel_correlation_loss(*arguments(torch.randn(2, 3, 4, 5)))


@pytest.mark.parametrize("eps", [0, -1e-6, float("nan"), float("inf"), "1e-6", None, True])
def test_bad_eps_is_named(eps):
    with pytest.raises((TypeError, ValueError), match="eps must be a number > 0"):
        channel_correlation_loss(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), eps=eps)


def loss_of(student, teacher):
    return channel_correlation_loss(student.sin(), teacher)


def inputs_to_compile(device, layouts):
    for (of_student, of_teacher), shape in itertools.product(layouts, ((2, 3, 4, 5), (3, 6, 2, 8))):
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        yield [of_student(student).requires_grad_(), of_teacher(teacher)]


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu")])
def test_compiles_to_a_full_graph(backend, device):
    layouts = [(contiguous, contiguous), (channels_last, contiguous)]
    assert_compiled_agrees(loss_of, inputs_to_compile(device, layouts), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor():
    assert_compiled_agrees(loss_of, inputs_to_compile("cpu", [(contiguous, contiguous)]), "cpu", "inductor")


@NO_CPU
def test_maps_that_are_copied_compile():
    assert_compiled_agrees(loss_of, inputs_to_compile("cpu", [(contiguous, spatial_slice)]), "cpu", "aot_eager")
