"""The spatial term's op on every backend: values and gradients, shapes, levels together, determinism, compilation."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    BACKENDS,
    COMPILED,
    DTYPES,
    INTERPRETED,
    NO_CPU,
    accumulation_of,
    assert_as_good,
    assert_compiled_agrees,
    assert_same_bits,
    draw,
    name_of,
    op_of,
    threads,
)

import fbkd_ops
from fbkd_ops import functional
from fbkd_ops.ops.spatial_l2 import SpatialLevels, spatial_l2_squares

pytestmark = pytest.mark.usefixtures("poison")

# Edges without a neighbour, odd sizes, and both sides of Triton's blocks of 256 pixels.
EDGES = [(2, 1, 1), (2, 1, 2), (1, 2, 1), (2, 1, 9), (2, 9, 1), (0, 3, 4), (3, 2, 2), (2, 3, 5)]
SHAPES = [*EDGES, (2, 15, 17), (1, 16, 16), (1, 1, 257), (1, 513, 1)]
# Around the CPU's tiles of 8192 pixels and pieces of 1024: tiles of a row, rows of several pieces, a last row alone.
LARGE = [(2, 200, 336), (1, 3, 8191), (1, 3, 8193), (1, 17, 1025), (1, 33, 1023), (1, 65, 256), (1, 64, 128)]


def leaves_of(shape, dtypes, device="cpu"):
    """Student, weight, bias and teacher; ``dtypes`` of the student, the parameters and the teacher.

    The teacher's values are around 4: were the residual's around 0, its sum could be as small as any rounding error.
    """
    student, parameters, teacher = dtypes
    return [
        draw(shape, student, device).requires_grad_(),
        draw((3, 3), parameters, device).requires_grad_(),
        draw((1,), parameters, device).requires_grad_(),
        draw(shape, teacher, device) + 4,
    ]


def run(leaves, backend):
    """The term, the gradient of the student, and those of weight and bias in one tensor."""
    with fbkd_ops.use_backend(backend):
        loss = functional.spatial_l2_loss(*leaves)
    ds, dweight, dbias = torch.autograd.grad(loss, leaves[:3])
    return loss.detach(), ds, torch.cat([dweight.flatten(), dbias])


def exact_leaves(leaves):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in leaves]


def check(leaves, backend):
    """No further from float64 than twice eager's error. A 16-bit parameter's gradient is rounded to 16 bits."""
    ours, eager, exact = run(leaves, backend), run(leaves, "reference"), run(exact_leaves(leaves), "reference")
    accumulation = accumulation_of(leaves[0].dtype, leaves[3].dtype)
    for result, expected, truth in zip(ours, eager, exact, strict=True):
        extra = torch.finfo(result.dtype).eps if result.element_size() == 2 else 0.0
        assert_as_good(result, expected, truth, accumulation=accumulation, extra=extra)


@pytest.mark.parametrize("shape", SHAPES, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_shapes(backend, device, shape):
    check(leaves_of(shape, [torch.float32] * 3, device), backend)


@pytest.mark.parametrize("shape", LARGE, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_shapes(backend, device, shape):
    check(leaves_of(shape, [torch.float32] * 3, device), backend)


@NO_CPU
@given(shape=st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 40)), seed=st.integers(0, 999))
def test_any_shape_on_cpu(shape, seed):
    torch.manual_seed(seed)
    check(leaves_of(shape, [torch.float32] * 3), "cpu")


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, repeat=3)), ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_mixtures_of_dtypes(backend, device, dtypes):
    check(leaves_of((2, 5, 7), dtypes, device), backend)


MIXTURES = [(torch.float64, torch.float32, torch.float32), (torch.bfloat16, torch.float16, torch.float64)]


@pytest.mark.parametrize("dtypes", [*MIXTURES, (torch.float16, torch.bfloat16, torch.bfloat16)], ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_mixtures_of_dtypes_in_the_interpreter(backend, device, dtypes):
    check(leaves_of((2, 5, 7), dtypes, device), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_maps_that_are_not_contiguous(backend, device):
    student, weight, bias, teacher = leaves_of((2, 4, 6), [torch.float32] * 3, device)
    turned = [x.detach().transpose(1, 2).requires_grad_(x.requires_grad) for x in (student, teacher)]
    check([turned[0], weight.detach().t().requires_grad_(), bias, turned[1]], backend)


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu")])
def test_equal_maps_have_no_gradient(backend, device):
    """The root of exactly 0 has none that is finite."""
    student = draw((2, 3, 4), torch.float32, device).requires_grad_()
    weight = torch.zeros(3, 3, device=device)
    weight[1, 1] = 1
    leaves = student, weight.requires_grad_(), torch.zeros(1, device=device, requires_grad=True), student.detach()
    assert not any(value.any() for value in run(leaves, backend))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_value_that_is_not_finite_reaches_its_neighbours_only(backend, device, value):
    leaves = leaves_of((2, 6, 7), [torch.float32] * 3, device)
    with torch.no_grad():
        leaves[0][1, 2, 3] = value
    with fbkd_ops.use_backend(backend):
        squares = spatial_l2_squares(backend, SpatialLevels(*([leaf] for leaf in leaves)))
        assert not squares.isfinite()
        (gradient,) = torch.autograd.grad(squares, leaves[0], torch.ones_like(squares))
    affected = torch.zeros(2, 6, 7, dtype=torch.bool, device=device)
    affected[1, 0:5, 1:6] = True
    assert torch.equal(gradient.isfinite(), ~affected)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradcheck(backend, device):
    leaves = leaves_of((2, 3, 4), [torch.float64] * 3, device)
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(functional.spatial_l2_loss, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    leaves = leaves_of((1, 2, 3), [torch.float32] * 3, device)
    with fbkd_ops.use_backend(backend):
        loss = functional.spatial_l2_loss(*leaves)
    (gradient,) = torch.autograd.grad(loss, leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_twice_gives_the_same(backend, device):
    leaves = leaves_of((2, 3, 4), [torch.float32] * 3, device)
    with fbkd_ops.use_backend(backend):
        loss = functional.spatial_l2_loss(*leaves)
    first = torch.autograd.grad(loss, leaves[:3], retain_graph=True)
    assert_same_bits(first, torch.autograd.grad(loss, leaves[:3]))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_teachers_get_no_gradient(backend, device):
    leaves = [x.detach().requires_grad_() for x in leaves_of((1, 2, 3), [torch.float32] * 3, device)]
    with fbkd_ops.use_backend(backend):
        functional.spatial_l2_loss(*leaves).backward()
    assert [leaf.grad is None for leaf in leaves] == [False, False, False, True]


def pyramid(device):
    """Levels that share a launch: two dtypes, one without images, one pixel, more than one tile of everything."""
    single, double = [torch.float32] * 3, [torch.float64] * 3
    levels = [
        leaves_of((2, 9, 8), single, device),
        leaves_of((1, 3, 4), double, device),
        leaves_of((0, 3, 4), single, device),
        leaves_of((1, 31, 17), single, device),
        leaves_of((3, 1, 1), single, device),
    ]
    return levels


def squares_and_gradients(levels, backend, scales):
    lists = SpatialLevels(*map(list, zip(*levels, strict=True)))
    with fbkd_ops.use_backend(backend):
        squares = spatial_l2_squares(backend, lists)
    gradients = torch.autograd.grad((squares * scales).sum(), [x for group in lists[:3] for x in group])
    return squares, [list(gradients[index :: len(levels)]) for index in range(len(levels))]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(backend, device):
    levels, scales = pyramid(device), torch.tensor([0.5, 2.0, 3.0, -1.5, 1.0], device=device)
    squares, gradients = squares_and_gradients(levels, backend, scales.double())
    assert squares.dtype == torch.float64
    for index, level in enumerate(levels):
        dtype = level[0].dtype
        alone, alone_gradients = squares_and_gradients([level], backend, scales[index : index + 1].to(dtype))
        assert torch.equal(squares[index : index + 1].to(dtype), alone)
        torch.testing.assert_close(gradients[index], alone_gradients[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_without_gradient_the_sums_are_the_same(backend, device):
    """And the gradients are not made."""
    levels = pyramid(device)
    lists = [list(group) for group in zip(*levels, strict=True)]
    arguments = [[x.detach().to(lists[0][index].dtype) for index, x in enumerate(group)] for group in lists]
    (sums,), (both, *_) = (op_of("spatial_l2", backend)(*arguments, gradient) for gradient in (False, True))
    assert sums.shape == (5, 1) and both.shape == (5, 11)
    torch.testing.assert_close(sums[:, 0], both[:, 0], rtol=1e-6, atol=0)
    with torch.no_grad(), fbkd_ops.use_backend(backend):
        assert_same_bits([spatial_l2_squares(backend, SpatialLevels(*lists))], [sums[:, 0]])


@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device):
    leaves = leaves_of((2, 200, 336), [torch.float32] * 3, device)
    first = run(leaves, backend)
    for _ in range(3):
        assert_same_bits(first, run(leaves, backend))


@NO_CPU
def test_bit_equal_for_any_number_of_threads():
    levels = [*pyramid("cpu"), *(leaves_of(shape, [torch.float32] * 3) for shape in LARGE)]
    scales = torch.linspace(0.5, 2, len(levels), dtype=torch.float64)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            squares, gradients = squares_and_gradients(levels, "cpu", scales)
        results.append([squares, *(x for level in gradients for x in level)])
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device, gradient):
    arguments = [[x.detach() for x in group] for group in zip(*pyramid(device), strict=True)]
    torch.library.opcheck(op_of("spatial_l2", backend), (*arguments, gradient))


@NO_CPU
def test_op_names_what_is_wrong():
    op, x, w, b = torch.ops.fbkd_ops.spatial_l2, torch.rand(2, 3, 4), torch.rand(3, 3), torch.rand(1)
    with pytest.raises(RuntimeError, match="weight must have 1 entries, got 2"):
        op([x], [w, w], [b], [x], False)
    with pytest.raises(RuntimeError, match=r"student must have 3 dimensions \(N, H, W\), got 2"):
        op([x[0]], [w], [b], [x], False)
    with pytest.raises(RuntimeError, match="teacher must be float32 or float64"):
        op([x], [w], [b], [x.half()], False)
    with pytest.raises(RuntimeError, match="student and teacher must agree in N, H and W"):
        op([x], [w], [b], [x[:1]], False)
    with pytest.raises(RuntimeError, match="teacher must be float32 unless the features are float64"):
        op([x], [w], [b], [x.double()], False)
    with pytest.raises(RuntimeError, match="weight must be contiguous with 9 elements, got 6"):
        op([x], [w[:2]], [b], [x], False)
    with pytest.raises(RuntimeError, match="student must be contiguous"):
        op([x.transpose(1, 2)], [w], [b], [x.transpose(1, 2)], False)
    with pytest.raises(RuntimeError, match="student must have at least one pixel"):
        op([x[:, :0]], [w], [b], [x[:, :0]], False)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda x, w, b, t: (x[0], w, b, t), ValueError, r"student must have shape \(N, H, W\), got \(3, 4\)"),
        (lambda x, w, b, t: (x, w, b, t[:1]), ValueError, r"teacher must have shape \(2, 3, 4\), got \(1, 3, 4\)"),
        (lambda x, w, b, t: (x, w[None], b, t), ValueError, r"weight must have shape \(3, 3\), got \(1, 3, 3\)"),
        (lambda x, w, b, t: (x, w, b[0], t), ValueError, r"bias must have shape \(1,\), got \(\)"),
        (lambda x, w, b, t: (x[:, :0], w, b, t[:, :0]), ValueError, r"student must have at least one pixel"),
        (lambda x, w, b, t: (x.int(), w, b, t), TypeError, r"student must be a floating-point tensor, got torch.int32"),
        (lambda x, w, b, t: (x, w, None, t), TypeError, r"bias must be a torch.Tensor, got NoneType"),
        (lambda x, w, b, t: (x, w, b, t.to("meta")), ValueError, r"teacher .* one device, got meta and cpu"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    arguments = torch.rand(2, 3, 4), torch.rand(3, 3), torch.rand(1), torch.rand(2, 3, 4)
    with pytest.raises(error, match=message):
        functional.spatial_l2_loss(*change(*arguments))


def test_the_reference_is_the_convolution_layer():
    """Against torch's own layer, and against a sum written out by hand."""
    layer = torch.nn.Conv2d(1, 1, 3, padding=1).double()
    student, teacher = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    expected = (layer(student[:, None])[:, 0] - teacher).norm()
    with fbkd_ops.use_backend("reference"):
        ours = functional.spatial_l2_loss(student, layer.weight[0, 0], layer.bias, teacher)
    torch.testing.assert_close(ours, expected)
    padded = F.pad(student, (1, 1, 1, 1))
    convolved = sum(layer.weight[0, 0, i, j] * padded[:, i : i + 4, j : j + 5] for i in range(3) for j in range(3))
    torch.testing.assert_close(ours, (convolved + layer.bias - teacher).norm())


def inputs_to_compile(device):
    return [leaves_of(shape, [torch.float32] * 3, device) for shape in ((2, 3, 4), (3, 5, 7))]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_compiles_to_a_full_graph(backend, device):
    assert_compiled_agrees(functional.spatial_l2_loss, inputs_to_compile(device), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor():
    assert_compiled_agrees(functional.spatial_l2_loss, inputs_to_compile("cpu"), "cpu", "inductor")
