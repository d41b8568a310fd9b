"""The ops that compare each channel of two maps, on every backend: what all of them promise."""

import itertools

import pytest
import torch
from channel_ops import OPS, check, draw_pair, pyramid, run
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
    spatial_slice,
    threads,
    with_layouts,
    with_sizes,
)

import fbkd_ops

pytestmark = [pytest.mark.usefixtures("poison"), pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)]

MIXTURES = list(itertools.product(DTYPES, DTYPES))


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device, size", with_sizes(COMPILED, SMALL))
def test_small_sizes_in_every_mixture_of_dtypes_and_layouts(op, backend, device, size, dtypes):
    for of_student, of_teacher in PAIRS_OF_LAYOUTS:
        student, teacher = draw_pair((2, *size), dtypes, device)
        check(op, of_student(student), of_teacher(teacher), backend)


@pytest.mark.parametrize("size", LARGE, ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(op, backend, device, layouts, size):
    for dtypes in ((torch.float32, torch.float32), (torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        pair = draw_pair((2, *size), dtypes, device)
        check(op, *(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_mixtures_in_the_interpreter(op, backend, device, dtypes):
    layouts = PAIRS_OF_LAYOUTS[MIXTURES.index(dtypes) % 4]
    pair = draw_pair((2, 5, 3, 7), dtypes, device)
    check(op, *(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_in_the_interpreter(op, backend, device, layouts):
    """Two tiles of channels and of pixels; 16-byte loads; the second one aligned."""
    for shape in ((1, 33, 1, 130), (2, 36, 4, 34)):
        pair = draw_pair(shape, (torch.float32, torch.float32), device)
        check(op, *(layout(x) for layout, x in zip(layouts, pair, strict=True)), backend)


@pytest.mark.parametrize("of_teacher", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_layouts(op, backend, device, of_student, of_teacher):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16))[: 1 if backend == "triton" else 2]:
        student, teacher = draw_pair((3, 6, 5, 8), dtypes, device)
        _, gradient = check(op, of_student(student), of_teacher(teacher), backend)
        last = of_student in (channels_last, channels_last_slice)
        assert gradient.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@NO_CPU
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 70)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtypes=st.sampled_from(MIXTURES),
    seed=st.integers(0, 999),
)
def test_any_shape_on_cpu(op, shape, layouts, dtypes, seed):
    torch.manual_seed(seed)
    check(op, *(layout(x) for layout, x in zip(layouts, draw_pair(shape, dtypes), strict=True)), "cpu")


@pytest.mark.parametrize("of_teacher", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_gradcheck(op, backend, device, of_student, of_teacher):
    student, teacher = (torch.randn(2, 3, 2, 4, device=device, dtype=torch.float64) for _ in range(2))
    student, teacher = of_student(student).detach(), of_teacher(teacher)
    student = student.clone() if of_student is expanded else student
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda s: op.loss(s, teacher), (student.requires_grad_(),), fast_mode=backend == "triton"
        )


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_teacher_receives_no_gradient(op, backend, device):
    student, teacher = (draw((2, 3, 4, 5), torch.float32, device).requires_grad_() for _ in range(2))
    with fbkd_ops.use_backend(backend):
        op.loss(student, teacher).backward()
        assert student.grad is not None and teacher.grad is None
        assert not op.loss(student.detach(), teacher).requires_grad


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(op, backend, device):
    student = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    with fbkd_ops.use_backend(backend):
        loss = op.loss(student, torch.randn_like(student))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_equal_maps_have_loss_and_gradient_zero(op, backend, device, layouts):
    student = 3 * draw((2, 3, 4, 4), torch.float32, device) + 100
    loss, gradient = run(op, layouts[0](student), layouts[1](student), backend)
    if device == "cuda" and layouts[0] is not layouts[1]:  # the compiler may add the two maps in other orders
        assert loss.abs() < 1e-6 and gradient.abs().max() < 1e-6
        return
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 3, 1, 1)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_pixel_and_one_pixel(op, backend, device, layouts, shape):
    pair = (layout(torch.randn(shape, device=device)) for layout in layouts)
    loss, gradient = check(op, *pair, backend)
    assert loss == 0 and torch.equal(gradient, torch.zeros(shape, device=device))


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_and_infinity_reach_the_loss_and_their_channel(op, backend, device, where, value):
    maps = dict(zip(("student", "teacher"), draw_pair((2, 3, 4, 5), (torch.float32,) * 2, device), strict=True))
    maps[where][1, 2, 3, 4] = value
    ours, eager = (run(op, maps["student"], maps["teacher"], name) for name in (backend, "reference"))
    assert ours[0].isnan()
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(op, backend, device, layouts):
    pair = draw_pair((2, 70, 60, 80), (torch.float32, torch.float32), device)
    maps = [layout(x) for layout, x in zip(layouts, pair, strict=True)]
    first = run(op, *maps, backend)
    for _ in range(3):
        assert_same_bits(first, run(op, *maps, backend))


@NO_CPU
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_bit_equal_for_any_number_of_threads(op, layouts, dtypes):
    maps = [layout(x) for layout, x in zip(layouts, draw_pair((2, 70, 60, 80), dtypes), strict=True)]
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(op, *maps, "cpu"))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(op, backend, device):
    students, teachers = pyramid(device)
    weights = torch.rand(len(students), dtype=torch.float64).float()
    leaves = [x.detach().requires_grad_() for x in students]
    losses = op.losses(backend, leaves, teachers)
    together = torch.autograd.grad(losses, leaves, weights.to(losses))
    for index, level in enumerate(zip(leaves, teachers, strict=True)):
        alone = op.losses(backend, *([x] for x in level))
        assert_same_bits([losses[index].to(alone.dtype)], [alone[0]])
        (gradient,) = torch.autograd.grad(alone, level[0], weights[index : index + 1].to(alone))
        assert_same_bits([together[index]], [gradient])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_some_levels_used(op, backend, device):
    students, teachers = pyramid(device)
    leaves = [x.detach().requires_grad_(index != 1) for index, x in enumerate(students)]
    losses = op.losses(backend, leaves, teachers)
    (losses[0] + 3 * losses[4]).backward()
    assert leaves[1].grad is None
    for index in (3, 5):
        assert torch.equal(leaves[index].grad, torch.zeros_like(leaves[index]))
    for index in (0, 4):
        assert leaves[index].grad.abs().sum() > 0


@NO_CPU
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_offsets_beyond_32_bits(op, layouts):
    pair = draw_pair((2, 3, 4, 5), (torch.bfloat16, torch.bfloat16))
    student, teacher = (layout(x) for layout, x in zip(layouts, pair, strict=True))
    near = run(op, student, teacher, "cpu")
    assert_same_bits(near, run(op, far_apart(student, layouts[0]), teacher, "cpu"))
    assert_same_bits(near, run(op, student, far_apart(teacher, layouts[1]), "cpu"))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(op, backend, device):
    pair = draw_pair((2, 3, 4, 5), (torch.bfloat16, torch.float32), device)
    expected = run(op, *pair, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(expected, run(op, *pair, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_twice_gives_the_same(op, backend, device):
    student, teacher = draw_pair((2, 3, 4, 5), (torch.float32, torch.float32), device)
    with fbkd_ops.use_backend(backend):
        loss = op.loss(student.requires_grad_(), teacher)
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert_same_bits(torch.autograd.grad(loss, student), [kept])


def test_a_student_changed_in_place_is_noticed(op):
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    features = student * 2
    loss = op.loss(features, torch.randn_like(student))
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(op, backend, device):
    arguments = pyramid(device, PYRAMID[1:3] if backend == "triton" else PYRAMID)
    forward = op_of(f"{op.name}_forward", backend)
    losses, *kept = forward(*arguments, op.constant)
    torch.library.opcheck(forward, (*arguments, op.constant))
    torch.library.opcheck(op_of(f"{op.name}_backward", backend), op.backward_arguments(*arguments, kept, losses))


@NO_CPU
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1)], ids=name_of)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_fake_strides_of_degenerate_shapes(op, layout, shape):
    x = layout(torch.randn(shape))
    arguments = op.backward_arguments([x], [contiguous(x)], [op.kept(x)], torch.ones(1))
    torch.library.opcheck(op_of(f"{op.name}_backward", "cpu"), arguments, test_utils="test_faketensor")


@NO_CPU
def test_op_names_what_is_wrong(op):
    x, constant = torch.randn(2, 3, 4, 5), op.constant
    forward, backward = (op_of(f"{op.name}_{name}", "cpu") for name in ("forward", "backward"))
    with pytest.raises(RuntimeError, match="teacher must have 2 entries, got 1"):
        forward([x, x], [x], constant)
    with pytest.raises(RuntimeError, match="student and teacher must agree in N, C, H and W"):
        forward([x], [x[:, :2]], constant)
    with pytest.raises(RuntimeError, match=r"teacher must be contiguous, channels_last or .* teacher.contiguous\(\)"):
        forward([x], [x.mT], constant)
    with pytest.raises(RuntimeError, match="must have 1 entries, got 0"):
        backward(*op.backward_arguments([x], [x], [], torch.zeros(1)))
    kept = op.kept(x)
    with pytest.raises(RuntimeError, match=f"must be contiguous with {kept.numel()} elements, got 3"):
        backward(*op.backward_arguments([x], [x], [kept.new_zeros(3)], torch.zeros(1)))
    with pytest.raises(RuntimeError, match="grad must be contiguous with 1 elements, got 2"):
        backward(*op.backward_arguments([x], [x], [kept], torch.zeros(2)))


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (lambda x: (x, x[:, :2]), ValueError, r"agree in N, C, H and W, got \(2, 3, 4, 5\) and \(2, 2, 4, 5\)"),
        (lambda x: (x, x.to("meta")), ValueError, r"one device, got cpu and meta"),
        (lambda x: (x.int(), x), TypeError, r"student must have dtype float16, .* got int32"),
        (lambda x: (x, x[0]), ValueError, r"teacher must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
    ],
)
def test_bad_arguments_are_named(op, arguments, error, message):
    with pytest.raises(error, match=message):
        op.loss(*arguments(torch.randn(2, 3, 4, 5)))


def loss_of(op):
    return lambda student, teacher: op.loss(student.sin(), teacher)


def inputs_to_compile(device, layouts):
    for (of_student, of_teacher), shape in itertools.product(layouts, ((2, 3, 4, 5), (3, 6, 2, 8))):
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        yield [of_student(student).requires_grad_(), of_teacher(teacher)]


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu")])
def test_compiles_to_a_full_graph(op, backend, device):
    layouts = [(contiguous, contiguous), (channels_last, contiguous)]
    assert_compiled_agrees(loss_of(op), inputs_to_compile(device, layouts), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor(op):
    assert_compiled_agrees(loss_of(op), inputs_to_compile("cpu", [(contiguous, contiguous)]), "cpu", "inductor")


@NO_CPU
def test_maps_that_are_copied_compile(op):
    assert_compiled_agrees(loss_of(op), inputs_to_compile("cpu", [(contiguous, spatial_slice)]), "cpu", "aot_eager")
