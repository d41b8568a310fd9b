"""The masked distance on every backend: values, gradients, layouts, determinism, compilation, errors."""

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
    draw,
    expanded,
    far_apart,
    name_of,
    op_of,
    spatial_slice,
    threads,
    truncation,
    with_layouts,
    with_sizes,
)

import fbkd_ops
from fbkd_ops.functional import masked_l2_loss
from fbkd_ops.ops.masked_l2 import masked_l2_squares

pytestmark = pytest.mark.usefixtures("poison")

MIXTURES = list(itertools.product(DTYPES, DTYPES))
# Which of the spatial and the channel mask are there.
MASKS = [(True, True), (True, False), (False, True), (False, False)]


def draw_masks(shape, given=(True, True), dtype=torch.float64, device="cpu"):
    """Weights from 0 to 2, some of them exactly 0."""
    n, channels, height, width = shape
    masks = [(torch.rand(size, device=device) * 2.2 - 0.2).clamp_min(0) for size in ((n, height, width), (n, channels))]
    return [mask.to(dtype) if wanted else None for mask, wanted in zip(masks, given, strict=True)]


def run(student, teacher, masks, backend):
    """The loss on a backend and the gradient of the student."""
    leaf = student.detach().requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = masked_l2_loss(leaf, teacher, *masks)
    (gradient,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), gradient


def check(student, teacher, masks, backend):
    accumulation = accumulation_of(student.dtype, teacher.dtype)
    masks = [mask if mask is None else mask.to(accumulation) for mask in masks]
    ours = run(student, teacher, masks, backend)
    eager = run(student, teacher, masks, "reference")
    wide = [mask if mask is None else mask.double() for mask in masks]
    exact = run(student.double(), teacher.double(), wide, "reference")
    assert ours[0].dtype == accumulation and ours[1].dtype == student.dtype
    assert_as_good(ours[0], eager[0], exact[0], accumulation=accumulation)
    # The gradient's elements are products, with relative errors of their own beside those that their RMS measures.
    extra = 4 * torch.finfo(accumulation).eps + truncation(backend, student.device.type, student.dtype)
    assert_as_good(ours[1], eager[1], exact[1], extra, accumulation)
    return ours


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device, size", with_sizes(COMPILED, SMALL))
def test_small_sizes_in_every_mixture_of_dtypes_and_layouts(backend, device, size, dtypes):
    shape = (2, *size)
    for (of_student, of_teacher), given_masks in zip(PAIRS_OF_LAYOUTS, MASKS, strict=True):
        student, teacher = (draw(shape, dtype, device) for dtype in dtypes)
        masks = draw_masks(shape, given_masks, device=device)
        check(of_student(student), of_teacher(teacher), masks, backend)


@pytest.mark.parametrize("size", LARGE, ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(backend, device, layouts, size):
    shape = (2, *size)
    mixtures = [(dtype, dtype) for dtype in DTYPES] + [(torch.bfloat16, torch.float32)]
    for dtypes in mixtures:
        maps = [layout(draw(shape, dtype, device)) for layout, dtype in zip(layouts, dtypes, strict=True)]
        check(*maps, draw_masks(shape, device=device), backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_mixtures_in_the_interpreter(backend, device, dtypes):
    shape = (1, 5, 3, 7)
    layouts = PAIRS_OF_LAYOUTS[MIXTURES.index(dtypes) % 4]
    maps = [layout(draw(shape, dtype, device)) for layout, dtype in zip(layouts, dtypes, strict=True)]
    check(*maps, draw_masks(shape, MASKS[MIXTURES.index(dtypes) // 4], device=device), backend)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_in_the_interpreter(backend, device, layouts):
    """Two tiles of rows and of columns; 16-byte loads."""
    for shape in ((1, 65, 1, 66), (1, 68, 2, 34)):
        maps = [layout(draw(shape, torch.float32, device)) for layout in layouts]
        check(*maps, draw_masks(shape, device=device), backend)


@pytest.mark.parametrize("of_teacher", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_layouts(backend, device, of_student, of_teacher):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float16))[: 1 if backend == "triton" else 2]:
        student, teacher = (draw((3, 6, 5, 8), dtype, device) for dtype in dtypes)
        _, gradient = check(of_student(student), of_teacher(teacher), draw_masks((3, 6, 5, 8), device=device), backend)
        last = of_student in (channels_last, channels_last_slice)
        assert gradient.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@NO_CPU
@given(
    shape=st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 20), st.integers(1, 70)),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtypes=st.sampled_from(MIXTURES),
    masks=st.sampled_from(MASKS),
    seed=st.integers(0, 999),
)
def test_any_shape_on_cpu(shape, layouts, dtypes, masks, seed):
    torch.manual_seed(seed)
    maps = [layout(draw(shape, dtype)) for layout, dtype in zip(layouts, dtypes, strict=True)]
    check(*maps, draw_masks(shape, masks), "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_masks_of_another_dtype_and_layout(backend, device, dtype):
    shape = (2, 3, 4, 5)
    student, teacher = (draw(shape, torch.float32, device) for _ in range(2))
    spatial, channel = draw_masks(shape, dtype=dtype, device=device)
    strided = spatial.mT.contiguous().mT, channel.mT.contiguous().mT
    ours = run(student, teacher, strided, backend)
    assert_same_bits(ours, run(student, teacher, [spatial.float(), channel.float()], backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_teacher_and_masks_receive_no_gradient(backend, device):
    shape = (2, 3, 4, 5)
    student, teacher = (draw(shape, torch.float32, device).requires_grad_() for _ in range(2))
    masks = [mask.requires_grad_() for mask in draw_masks(shape, dtype=torch.float32, device=device)]
    with fbkd_ops.use_backend(backend):
        masked_l2_loss(student, teacher, *masks).backward()
    assert student.grad is not None and all(x.grad is None for x in (teacher, *masks))
    with fbkd_ops.use_backend(backend):
        assert not masked_l2_loss(student.detach(), teacher, *masks).requires_grad
        with torch.no_grad():
            assert not masked_l2_loss(student, teacher, *masks).requires_grad


@pytest.mark.parametrize("of_teacher", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device, of_student", with_layouts(BACKENDS, LAYOUTS))
def test_gradcheck(backend, device, of_student, of_teacher):
    student, teacher = (torch.randn(2, 3, 2, 4, device=device, dtype=torch.float64) for _ in range(2))
    student, teacher = of_student(student).detach(), of_teacher(teacher)
    student = student.clone() if of_student is expanded else student
    masks = draw_masks((2, 3, 2, 4), device=device)
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda s: masked_l2_loss(s, teacher, *masks), (student.requires_grad_(),), fast_mode=backend == "triton"
        )


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    student = torch.randn(1, 3, 2, 4, device=device, requires_grad=True)
    with fbkd_ops.use_backend(backend):
        loss = masked_l2_loss(student, torch.zeros_like(student))
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float64)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_equal_maps_have_loss_and_gradient_zero(backend, device, dtypes):
    student = draw((2, 3, 4, 4), dtypes[0], device)
    loss, gradient = run(student, student.to(dtypes[1]), draw_masks(student.shape, device=device), backend)
    assert loss == 0 and torch.equal(gradient, torch.zeros_like(student))


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch(backend, device, layouts):
    student, teacher = (layout(torch.zeros(0, 3, 4, 5, device=device)) for layout in layouts)
    loss, gradient = check(student, teacher, draw_masks((0, 3, 4, 5), device=device), backend)
    assert loss == 0 and gradient.shape == student.shape


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")], ids=str)
@pytest.mark.parametrize("where", ["student", "teacher", "spatial_mask", "channel_mask"])
@pytest.mark.parametrize("backend, device", COMPILED)
def test_nan_and_infinity_reach_the_loss(backend, device, where, value):
    check_spread(backend, device, where, value)


@pytest.mark.parametrize("where", ["student", "channel_mask"])
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_nan_reaches_the_loss_in_the_interpreter(backend, device, where):
    check_spread(backend, device, where, float("nan"))


def check_spread(backend, device, where, value):
    """Everything that is NaN or infinite in eager is so here; Inf in both maps is NaN."""
    student, teacher = (torch.randn(2, 3, 4, 5, device=device) for _ in range(2))
    spatial, channel = (mask + 0.1 for mask in draw_masks(student.shape, dtype=torch.float32, device=device))
    tensors = dict(student=student, teacher=teacher, spatial_mask=spatial, channel_mask=channel)
    tensors[where][1, 2] = value
    ours, eager = (run(student, teacher, [spatial, channel], name) for name in (backend, "reference"))
    assert not ours[0].isfinite()
    for mine, theirs in zip(ours, eager, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layouts):
    maps = [layout(draw((2, 70, 60, 80), torch.float32, device)) for layout in layouts]
    masks = draw_masks((2, 70, 60, 80), device=device)
    first = run(*maps, masks, backend)
    for _ in range(3):
        assert_same_bits(first, run(*maps, masks, backend))


@NO_CPU
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_bit_equal_for_any_number_of_threads(layouts, dtypes):
    maps = [layout(draw((2, 70, 60, 80), dtype)) for layout, dtype in zip(layouts, dtypes, strict=True)]
    masks = draw_masks((2, 70, 60, 80))
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(run(*maps, masks, "cpu"))
    for other in results[1:]:
        assert_same_bits(results[0], other)


def pyramid(device, of_levels=PYRAMID):
    """Students, teachers of dtypes and layouts of their own, and masks of which some are absent."""
    students, teachers, masks = [], [], []
    for index, (dtype, layout, shape) in enumerate(of_levels):
        other, of_teacher, _ = of_levels[index - 1]
        students.append(layout(draw(shape, dtype, device)))
        teachers.append(of_teacher(draw(shape, other, device)))
        masks.append(draw_masks(shape, MASKS[index % 4], accumulation_of(dtype, other), device))
    return students, teachers, *zip(*masks, strict=True)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(backend, device):
    levels = pyramid(device)
    check_together(levels, backend)


@NO_CPU
@pytest.mark.parametrize("count", [1, 3])
def test_large_levels_together_equal_levels_alone(count):
    levels = [(torch.float32, layout, (2, *size)) for size in LARGE for layout in (contiguous, channels_last)]
    with threads(count):
        check_together(pyramid("cpu", levels), "cpu")


def check_together(levels, backend):
    """Squares and gradients of a list of levels against lists of one; float64 if any level is."""
    students, teachers, *masks = levels
    weights = torch.rand(len(students), dtype=torch.float64).float()
    leaves = [x.detach().requires_grad_() for x in students]
    squares = masked_l2_squares(backend, leaves, teachers, *map(list, masks))
    together = torch.autograd.grad(squares, leaves, weights.to(squares))
    for index, level in enumerate(zip(leaves, teachers, *masks, strict=True)):
        alone = masked_l2_squares(backend, *([x] for x in level))
        assert_same_bits([squares[index].to(alone.dtype)], [alone[0]])
        (gradient,) = torch.autograd.grad(alone, level[0], weights[index : index + 1].to(alone))
        assert_same_bits([together[index]], [gradient])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_some_levels_used(backend, device):
    students, teachers, *masks = pyramid(device)
    leaves = [x.detach().requires_grad_(index != 1) for index, x in enumerate(students)]
    squares = masked_l2_squares(backend, leaves, teachers, *map(list, masks))
    (squares[0] + 3 * squares[4]).backward()
    assert leaves[1].grad is None
    for index in (3, 5):
        assert torch.equal(leaves[index].grad, torch.zeros_like(leaves[index]))
    for index in (0, 4):
        assert leaves[index].grad.abs().sum() > 0


@NO_CPU
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_offsets_beyond_32_bits(layouts):
    shape = (2, 3, 4, 5)
    student, teacher = (layout(draw(shape, torch.bfloat16)) for layout in layouts)
    masks = draw_masks(shape)
    near = run(student, teacher, masks, "cpu")
    assert_same_bits(near, run(far_apart(student, layouts[0]), teacher, masks, "cpu"))
    assert_same_bits(near, run(student, far_apart(teacher, layouts[1]), masks, "cpu"))


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device, enabled):
    shape = (2, 3, 4, 5)
    student, teacher = draw(shape, torch.bfloat16, device), draw(shape, torch.float32, device)
    masks = draw_masks(shape, device=device)
    expected = run(student, teacher, masks, backend)
    with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled):
        assert_same_bits(expected, run(student, teacher, masks, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_twice_gives_the_same(backend, device):
    student = draw((2, 3, 4, 5), torch.float32, device).requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = masked_l2_loss(student, torch.ones_like(student))
    (first,) = torch.autograd.grad(loss, student, retain_graph=True)
    kept = first.clone()
    first.zero_()
    assert_same_bits(torch.autograd.grad(loss, student), [kept])


def test_a_student_changed_in_place_is_noticed():
    student = torch.randn(2, 3, 4, 5, requires_grad=True)
    features = student * 2
    loss = masked_l2_loss(features, torch.zeros_like(student))
    features.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    students, teachers, *masks = pyramid(device, PYRAMID[1:3] if backend == "triton" else PYRAMID)
    arguments = [students, teachers, *map(list, masks)]
    forward, backward = op_of("masked_l2_forward", backend), op_of("masked_l2_backward", backend)
    torch.library.opcheck(forward, arguments)
    torch.library.opcheck(backward, (*arguments, forward(*arguments)))


@NO_CPU
@pytest.mark.parametrize("shape", [(2, 1, 4, 5), (2, 3, 1, 1), (0, 3, 4, 5), (2, 3, 1, 5), (2, 3, 5, 1)], ids=name_of)
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_fake_strides_of_degenerate_shapes(layout, shape):
    x = layout(torch.randn(shape))
    arguments = ([x], [contiguous(x)], [None], [None], torch.ones(1))
    torch.library.opcheck(torch.ops.fbkd_ops.masked_l2_backward.default, arguments, test_utils="test_faketensor")


@NO_CPU
def test_op_names_what_is_wrong():
    op, x = torch.ops.fbkd_ops, torch.randn(2, 3, 4, 5)
    with pytest.raises(RuntimeError, match="teacher must have 2 entries, got 1"):
        op.masked_l2_forward([x, x], [x], [None], [None])
    with pytest.raises(RuntimeError, match="spatial_mask must have 1 entries, got 0"):
        op.masked_l2_forward([x], [x], [], [None])
    with pytest.raises(RuntimeError, match="student and teacher must agree in N, C, H and W"):
        op.masked_l2_forward([x], [x[:, :2]], [None], [None])
    with pytest.raises(RuntimeError, match=r"teacher must be contiguous, channels_last or .* teacher.contiguous\(\)"):
        op.masked_l2_forward([x], [x.mT], [None], [None])
    with pytest.raises(RuntimeError, match="channel_mask must be contiguous with 6 elements, got 8"):
        op.masked_l2_forward([x], [x], [None], [torch.zeros(2, 4)])
    with pytest.raises(RuntimeError, match="spatial_mask must be float32 unless the features are float64"):
        op.masked_l2_forward([x], [x], [torch.zeros(2, 4, 5).half()], [None])
    with pytest.raises(RuntimeError, match="spatial_mask must be float64 where the features are"):
        op.masked_l2_forward([x], [x.double()], [torch.zeros(2, 4, 5)], [None])
    with pytest.raises(RuntimeError, match="grad must be contiguous with 1 elements, got 2"):
        op.masked_l2_backward([x], [x], [None], [None], torch.zeros(2))
    for empty in (x[:, :0].contiguous(), x[:, :, :0].contiguous(), x[..., :0].contiguous()):
        with pytest.raises(RuntimeError, match="student must have at least one channel and one pixel"):
            op.masked_l2_forward([empty], [empty], [None], [None])


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (lambda x: (x, x[:, :2]), ValueError, r"agree in N, C, H and W, got \(2, 3, 4, 5\) and \(2, 2, 4, 5\)"),
        (lambda x: (x, x.to("meta")), ValueError, r"one device, got cpu and meta"),
        (lambda x: (x, x, x[:, 0, 1:]), ValueError, r"spatial_mask must have shape \(2, 4, 5\), got \(2, 3, 5\)"),
        (lambda x: (x, x, None, x[:, 0]), ValueError, r"channel_mask must have shape \(2, 3\), got \(2, 4, 5\)"),
        (lambda x: (x, x, 1.0), TypeError, r"spatial_mask must be a torch.Tensor, got float"),
        (lambda x: (x, x, None, x[..., 0, 0].int()), TypeError, r"channel_mask must be a floating-point tensor"),
        (lambda x: (x, x, x[:, 0].to("meta")), ValueError, r"spatial_mask .* on one device, got meta and cpu"),
        (lambda x: (x, x, None, x[..., 0, 0].to("meta")), ValueError, r"channel_mask .* on one device, got meta"),
        (lambda x: (x.int(), x), TypeError, r"student must have dtype float16, .* got int32"),
        (lambda x: (x, x[0]), ValueError, r"teacher must have shape \(N, C, H, W\), got \(3, 4, 5\)"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        masked_l2_loss(*arguments(torch.randn(2, 3, 4, 5)))


def loss_of(student, teacher, spatial, channel):
    return masked_l2_loss(student.sin(), teacher, spatial, channel)


def inputs_to_compile(device, layouts):
    for (of_student, of_teacher), shape in itertools.product(layouts, ((2, 3, 4, 5), (3, 6, 2, 8))):
        student, teacher = (torch.randn(shape, device=device) for _ in range(2))
        masks = draw_masks(shape, dtype=torch.float32, device=device)
        yield [of_student(student).requires_grad_(), of_teacher(teacher), *masks]


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
