"""The relation term's residual on every backend with kernels of it: values, gradients, memory, compilation, errors."""

import itertools

import pytest
import torch
from helpers import rms
from op_cases import (
    DTYPES,
    IN_PLACE,
    INTERPRETED,
    NO_CPU,
    ON_CPU,
    ON_TRITON,
    PAIRS_OF_LAYOUTS,
    accumulation_of,
    assert_close_to_truth,
    assert_compiled_agrees,
    assert_same_bits,
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    far_apart,
    name_of,
    op_of,
    overlapping,
    permuted,
    precision_of,
    threads,
    truncation,
    with_pairs,
    with_values,
)

from fbkd_ops._layout import empty_gradient, in_place_layout
from fbkd_ops._numerics import residual_dtype
from fbkd_ops.ops.relation_residual import RelationLevels, relation_residual

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = [ON_CPU, INTERPRETED, ON_TRITON]
COMPILED = [ON_CPU, ON_TRITON]
MIXTURES = list(itertools.product(DTYPES, DTYPES))

# (N, Cs, Ct, c, H, W); c of None: no projection.
SMALL = [
    (2, 1, 1, None, 1, 1),  # a single element an image
    (2, 3, 5, 2, 1, 1),  # one pixel: both layouts at once
    (2, 1, 4, 1, 5, 3),  # one channel: both layouts at once
    (1, 4, 4, None, 4, 4),
    (3, 16, 7, 3, 3, 11),
    (2, 33, 17, 20, 5, 9),
]
LARGE = [
    (1, 2, 3, 2, 17, 241),  # CPU blocks of 2049 and 2048 pixels
    (1, 300, 40, None, 43, 61),  # four blocks, of 656 and 655 pixels
    (3, 64, 48, 12, 70, 70),  # several blocks and groups an image
    (40, 3, 4, 2, 2, 2),  # more images than groups
    (2, 6, 1030, 5, 3, 50),  # more channels than a piece; pixels in two pieces of 128
    (2, 900, 900, 30, 9, 9),  # so large that the product's own threads run it
]
LEVEL = (2, 3, 4, 2, 3, 5)  # where one size is enough
# For the Triton kernels: more than one tile of every extent on both code paths, and an image in two splits.
TILES = [
    (torch.bfloat16, (1, 66, 66, 5, 3, 45)),
    (torch.bfloat16, (1, 72, 136, None, 12, 12)),
    (torch.float32, (1, 66, 66, 5, 3, 45)),
    (torch.float32, (1, 24, 72, None, 12, 12)),
    (torch.float32, (2, 3, 4, 2, 26, 40)),
    (torch.float64, (1, 18, 66, 5, 5, 13)),
    (torch.bfloat16, (1, 72, 72, None, 6, 6)),  # pixels by 8 bytes, and by 4
    (torch.float16, (1, 16, 8, None, 5, 6)),
    (torch.bfloat16, (1, 8, 264, None, 2, 9)),
]


def draw_level(size, dtypes=(torch.float32, torch.float32), device="cpu", layouts=(contiguous, contiguous)):
    """Student, P, teacher, U, W and v; parameters in the accumulation dtype."""
    n, from_channels, to_channels, inner, height, width = size
    wide = accumulation_of(*dtypes)
    student = layouts[0](draw((n, from_channels, height, width), dtypes[0], device))
    teacher = layouts[1](draw((n, to_channels, height, width), dtypes[1], device))
    rank = to_channels if inner is None else inner
    matrix = (draw((n, to_channels, from_channels), torch.float64, device) / from_channels**0.5).to(wide)
    teacher_matrix = (draw((n, to_channels, rank), torch.float64, device) / rank**0.5).to(wide)
    projection = None if inner is None else (draw((inner, to_channels), torch.float64, device) / inner**0.5).to(wide)
    return [student, matrix, teacher, teacher_matrix, projection, draw((n, to_channels), wide, device)]


def leaves_of(level):
    """The level with new leaves, and these without the teacher."""
    level = [x if x is None else x.detach() for x in level]
    leaves = [x.requires_grad_() for index, x in enumerate(level) if x is not None and index != 2]
    return level, leaves


def run(level, backend, memory_efficient=False, scale=1.0):
    """The squares, and the gradients of student, P, U, W and v."""
    level, leaves = leaves_of(level)
    (squares,) = relation_residual(backend, RelationLevels(*([x] for x in level)), memory_efficient)
    return squares.detach(), *torch.autograd.grad(scale * squares, leaves)


def residual_in(level, dtype):
    """The residual ``(N, Ct, H, W)`` in plain PyTorch in ``dtype``."""
    s, p, t, u, w, v = (x if x is None else x.to(dtype) for x in level)
    pixels, t, s = t.shape[2:], t.flatten(2), s.flatten(2)
    response = t if w is None else w @ t
    return (t + u @ response - p @ s + v[:, :, None]).unflatten(2, pixels)


def literal(level, dtype):
    """The squares of the residual in ``dtype``, and the gradients in the level's own dtypes."""
    level, leaves = leaves_of(level)
    squares = residual_in(level, dtype).to(accumulation_of(level[0].dtype, level[2].dtype)).square().sum()
    return squares.detach(), *torch.autograd.grad(squares, leaves)


def wide(level):
    return [x if x is None else x.double() for x in level]


def check(level, backend, **options):
    dtype, eps = precision_of(backend, level[0], level[2])
    results = run(level, backend, **options), literal(level, dtype), literal(wide(level), torch.float64)
    for ours, eager, truth in zip(*results, strict=True):
        assert_close_to_truth(ours, eager, truth, eps + truncation(backend, ours.device.type, ours.dtype))
    assert results[0][1].stride() == empty_gradient(in_place_layout(level[0])).stride()


FLOATS = [(torch.float32,) * 2, (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize(
    "backend, device, size, layouts, dtypes",
    [
        *with_pairs(COMPILED, SMALL, PAIRS_OF_LAYOUTS, FLOATS),
        *with_pairs([INTERPRETED], [SMALL[1], LEVEL], PAIRS_OF_LAYOUTS, FLOATS),
    ],
)
def test_small_sizes_in_both_layouts(backend, device, size, layouts, dtypes):
    check(draw_level(size, dtypes, device, layouts), backend)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(backend, device, layouts):
    for size in LARGE:
        check(draw_level(size, device=device, layouts=layouts), backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_every_mixture_of_dtypes(backend, device, dtypes):
    interpreted = backend == "triton" and device == "cpu"
    sizes, first = SMALL[3:], 0
    if interpreted:
        sizes, first = [LEVEL], MIXTURES.index(dtypes) % 4
    for size, of_both in zip(sizes, PAIRS_OF_LAYOUTS[first : first + len(sizes)], strict=True):
        check(draw_level(size, dtypes, device, of_both), backend)


@pytest.mark.parametrize("narrow", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize(
    "backend, device, layout", with_values(BACKENDS, [*IN_PLACE, overlapping], [channels_last_slice, overlapping])
)
def test_16_bits_of_any_layout_beside_float64(backend, device, layout, narrow):
    """Triton's kernels read a converted copy in place of them."""
    for dtypes, layouts in (
        ((torch.float64, narrow), (contiguous, layout)),
        ((narrow, torch.float64), (layout, contiguous)),
    ):
        check(draw_level(LEVEL, dtypes, device=device, layouts=layouts), backend)


@pytest.mark.parametrize("index", range(len(TILES)))
@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_tiles(backend, device, index):
    dtype, size = TILES[index]
    check(draw_level(size, (dtype, dtype), device, PAIRS_OF_LAYOUTS[index % 4]), backend)


@pytest.mark.parametrize("size", [(1, 72, 136, None, 12, 12), (1, 264, 136, 5, 2, 9)], ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_of_a_large_gpu_in_the_interpreter(backend, device, size, tiles_of):
    tiles_of("90")
    check(draw_level(size, (torch.bfloat16,) * 2, device, PAIRS_OF_LAYOUTS[1]), backend)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS[:4:3], ids=name_of)
@pytest.mark.parametrize("dtypes", [(torch.float16,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_kept_residual(backend, device, dtypes, layouts):
    """It is the residual, it changes nothing, and the backward pass makes the same of it as of one computed anew."""
    level = draw_level(LEVEL, dtypes, device, layouts)
    arguments = [[x] for x in level]
    forward, backward = (op_of(f"relation_residual_{which}", backend) for which in ("forward", "backward"))
    squares, residual = forward(*arguments, True)
    dtype, eps = precision_of(backend, level[0], level[2])
    assert_close_to_truth(
        residual,
        residual_in(level, dtype).to(residual_dtype(level[0], level[2])),
        residual_in(wide(level), torch.float64),
        eps,
    )
    assert residual.stride() == empty_gradient(level[2]).stride()
    assert_same_bits([squares], forward(*arguments, False))
    grad = torch.full_like(squares, 0.37)
    kept, again = (backward(*arguments, residuals, grad, True) for residuals in ([residual], []))
    assert_same_bits(kept, again)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_float16_with_a_factor_beyond_its_range(backend, device):
    """The factor comes from a scaled loss, or from a root of large squares: it meets sums, not 16-bit values."""
    level = draw_level(LEVEL, (torch.float16,) * 2, device)
    level[1] /= 64
    expected = run(level, backend)[1:]
    for factor in (2.0**-40, 2.0**13):
        of_student, *gradients = run(level, backend, scale=factor)[1:]
        for ours, of_one in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(ours, factor * of_one, rtol=1e-5, atol=1e-5 * factor)
    torch.testing.assert_close(of_student, factor * expected[0], rtol=2e-3, atol=2e-3 * factor)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_float16_with_a_gradient_that_only_its_factor_brings_into_range(backend, device):
    level = draw_level(LEVEL, (torch.float16,) * 2, device)
    level[1] *= 2.0**10
    ours, truth = run(level, backend, scale=2.0**-13)[1].double(), literal(wide(level), torch.float64)[1]
    assert truth.abs().max() > 2**16
    assert rms(ours - truth / 2**13) <= 2e-3 * rms(truth / 2**13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_what_forward_keeps(backend, device, dtype):
    """Nothing under memory_efficient; else, on the CPU, the gradients where they need no rounding, on a GPU e."""
    level, _ = leaves_of(draw_level(LEVEL, (dtype, dtype), device))
    for memory_efficient in (False, True):
        squares = relation_residual(backend, RelationLevels(*([x] for x in level)), memory_efficient)
        node = squares.grad_fn  # torch 2.11 frees what a node has saved when its outputs are gone
        residuals = node.saved_tensors[len(level) :]
        assert (node.ready is not None) == (backend == "cpu" and dtype == torch.float32 and not memory_efficient)
        assert len(residuals) == (backend == "triton" and not memory_efficient)


@pytest.mark.parametrize("layout", [channel_slice, channels_last_slice, batch_slice, permuted], ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_slices_and_copies(backend, device, layout):
    for layouts in (layout, contiguous), (channels_last, layout), (layout, layout):
        check(draw_level((3, 5, 7, 2, 4, 6), device=device, layouts=layouts), backend)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nothing_kept_gives_the_same_gradients(backend, device):
    """To rounding: the factor enters before the products instead of after them."""
    for size in (SMALL[3], LEVEL):
        level = draw_level(size, (torch.float64,) * 2, device)
        kept, again = (run(level, backend, memory_efficient, scale=0.37) for memory_efficient in (False, True))
        for ours, expected in zip(again, kept, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_backward_pass(backend, device, memory_efficient):
    """It leaves the first one's results alone, and is not touched by what was done to them."""
    level, leaves = leaves_of(draw_level(LEVEL, (torch.float64,) * 2, device))
    (squares,) = relation_residual(backend, RelationLevels(*([x] for x in level)), memory_efficient)
    first = torch.autograd.grad(2 * squares, leaves, retain_graph=True)
    kept = [gradient.clone() for gradient in first]
    second = torch.autograd.grad(3 * squares, leaves, retain_graph=True)
    assert_same_bits(first, kept)
    for gradient in first:
        gradient.fill_(float("nan"))
    for one, two, three in zip(kept, second, torch.autograd.grad(2 * squares, leaves), strict=True):
        torch.testing.assert_close(two, 1.5 * one, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(three, one, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    level = draw_level(LEVEL, device=device)
    expected = run(level, backend)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(expected, run(level, backend))


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS[:4:3], ids=name_of)
@pytest.mark.parametrize("backend, device", [ON_CPU, INTERPRETED])
def test_offsets_beyond_32_bits(backend, device, layouts):
    level = draw_level((2, 3, 4, 2, 5, 6), (torch.bfloat16,) * 2, device, layouts)
    near = run(level, backend)
    assert_same_bits(near, run([far_apart(level[0], layouts[0]), *level[1:]], backend))
    assert_same_bits(near, run([*level[:2], far_apart(level[2], layouts[1]), *level[3:]], backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_frozen_student_and_frozen_parameters(backend, device):
    level = draw_level(LEVEL, device=device)
    expected = run(level, backend)[1:]
    for wanted in ((0,), (1, 2, 3, 4), (3,)):
        tensors, leaves = leaves_of(level)
        for index, leaf in enumerate(leaves):
            leaf.requires_grad_(index in wanted)
        relation_residual(backend, RelationLevels(*([x] for x in tensors)))[0].backward()
        assert tensors[2].grad is None
        for index, leaf in enumerate(leaves):
            assert (leaf.grad is not None) == (index in wanted)
            if index in wanted:
                torch.testing.assert_close(leaf.grad, expected[index])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_gradient_needed(backend, device):
    level = draw_level(LEVEL, device=device)
    squares = relation_residual(backend, RelationLevels(*([x] for x in level)))
    assert not squares.requires_grad
    assert_same_bits([squares[0]], [run(level, backend, memory_efficient=True)[0]])


@pytest.mark.parametrize("inner", [None, 2])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch(backend, device, inner):
    squares, *gradients = run(draw_level((0, 3, 4, inner, 5, 6), device=device), backend)
    assert squares == 0
    assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


@pytest.mark.parametrize("where", range(6))
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nan_reaches_the_result(backend, device, where):
    level = draw_level((2, 3, 4, 2, 5, 6), device=device)
    level[where].view(-1)[1] = float("nan")
    ours, theirs = run(level, backend), literal(level, torch.float32)
    for mine, expected in zip(ours, theirs, strict=True):
        assert mine[expected.isnan()].isnan().all()
    assert ours[0].isnan()


# One level without images, one of them with its pixels in another layout than the teacher's.
PYRAMID = [
    ((torch.float32, torch.float32), (contiguous, contiguous), (2, 5, 4, 2, 9, 8)),
    ((torch.bfloat16, torch.float32), (channels_last, contiguous), (1, 6, 7, None, 3, 4)),
    ((torch.float32, torch.float16), (contiguous, channels_last), (0, 3, 4, 2, 4, 4)),
    ((torch.float64, torch.float32), (channels_last_slice, contiguous), (2, 4, 3, 1, 3, 5)),
    ((torch.float16, torch.float16), (contiguous, contiguous), (3, 1, 2, None, 1, 1)),
]


# Levels of one accumulation dtype: those of a pyramid of which the CPU's forward pass makes the gradients.
WIDE = [((torch.float32,) * 2, layouts, size) for _, layouts, size in PYRAMID]


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize(
    "backend, device, of_levels",
    with_values(BACKENDS, [PYRAMID, WIDE], [PYRAMID[1:4]], ["mixed", "float32"]),
)
def test_levels_together_equal_levels_alone(backend, device, of_levels, memory_efficient):
    levels = [leaves_of(draw_level(size, dtypes, device, layouts)) for dtypes, layouts, size in of_levels]
    together = relation_residual(
        backend, RelationLevels(*map(list, zip(*(level for level, _ in levels), strict=True))), memory_efficient
    )
    factors = torch.arange(1, len(levels) + 1, dtype=together.dtype, device=device) / 4
    gradients = iter(torch.autograd.grad(together, [leaf for _, leaves in levels for leaf in leaves], factors))
    for index, (level, leaves) in enumerate(levels):
        (alone,) = relation_residual(backend, RelationLevels(*([x] for x in level)), memory_efficient)
        assert_same_bits([together[index].to(alone.dtype)], [alone])
        expected = torch.autograd.grad(alone, leaves, factors[index].to(alone.dtype))
        assert_same_bits([next(gradients) for _ in leaves], expected)


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layouts):
    for dtypes in (torch.float32,) * 2, (torch.bfloat16,) * 2:
        level = draw_level(LARGE[2], dtypes, device, layouts)
        first = run(level, backend)
        for _ in range(2):
            assert_same_bits(first, run(level, backend))


@NO_CPU
def test_bit_equal_for_any_number_of_threads():
    """From two on: see the test of this name of the adapted distance."""
    for size in (LARGE[2], (1, 256, 256, 64, 13, 13), (1, 48, 40, None, 8, 8)):
        level = draw_level(size)
        results = []
        for count in (2, 3, 4):
            with threads(count):
                results.append(run(level, "cpu"))
        for other in results[1:]:
            assert_same_bits(results[0], other)


@pytest.mark.parametrize("inner", [None, 2])
@pytest.mark.parametrize("backend, device, layouts", with_values(BACKENDS, PAIRS_OF_LAYOUTS, PAIRS_OF_LAYOUTS[1:2]))
def test_gradcheck(backend, device, layouts, inner):
    level, leaves = leaves_of(draw_level((2, 3, 4, inner, 2, 3), (torch.float64,) * 2, device, layouts))

    def squares(*_):
        return relation_residual(backend, RelationLevels(*([x] for x in level)))

    # The first pass takes the gradient that was made in the forward pass, the next ones compute it.
    assert torch.autograd.gradcheck(squares, leaves, fast_mode=backend == "triton", nondet_tol=1e-12)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    level, leaves = leaves_of(draw_level(SMALL[3], device=device))
    (squares,) = relation_residual(backend, RelationLevels(*([x] for x in level)))
    (gradient,) = torch.autograd.grad(squares.sqrt(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend, device, compiler", with_values(BACKENDS, ["inductor"], ["aot_eager"]))
def test_compiles_into_one_graph_for_any_size(backend, device, compiler):
    inputs = [leaves_of(draw_level((2, 3, 4, 2, *size), device=device))[0] for size in ((5, 6), (7, 4), (9, 9))]

    def squares(*level):
        return relation_residual(backend, RelationLevels(*([x] for x in level)))[0]

    assert_compiled_agrees(squares, inputs, backend, compiler)


@pytest.mark.parametrize("inner", [None, 2])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device, inner):
    torch.use_deterministic_algorithms(False)
    tests = ("test_schema", "test_faketensor")
    for layouts in PAIRS_OF_LAYOUTS[1:3]:
        arguments = [[x] for x in draw_level((2, 3, 4, inner, 5, 6), device=device, layouts=layouts)]
        torch.library.opcheck(op_of("relation_residual_forward", backend), (*arguments, False), test_utils=tests)
        residuals = []
        if backend == "triton":
            torch.library.opcheck(op_of("relation_residual_forward", backend), (*arguments, True), test_utils=tests)
            residuals = op_of("relation_residual_forward", backend)(*arguments, True)[1:]
        else:
            op = op_of("relation_residual_with_gradient", backend)
            torch.library.opcheck(op, (*arguments, True), test_utils=tests)
        grad = torch.rand(1, device=device)
        for student_gradient in (True, False):
            op = op_of("relation_residual_backward", backend)
            torch.library.opcheck(op, (*arguments, residuals, grad, student_gradient), test_utils=tests)


@NO_CPU
@pytest.mark.parametrize(
    "position, change, message",
    [
        (1, lambda p: p[:, :, 1:], "student_matrix must be contiguous with 24 elements, got 16"),
        (1, lambda p: p.double(), "student_matrix must be float32 unless the features are float64"),
        (2, lambda t: t[:, :, 1:], "student and teacher must agree in N, H and W"),
        (3, lambda u: u[0], "teacher_matrix must have shape"),
        (4, lambda w: None, "where teacher_projection is absent"),
        (5, lambda v: v[:1], "offset must be contiguous with 8 elements, got 4"),
    ],
)
def test_bad_arguments_of_the_op(position, change, message):
    level = draw_level((2, 3, 4, 2, 5, 6))
    level[position] = change(level[position])
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fbkd_ops.relation_residual_forward(*([x] for x in level), False)


@NO_CPU
def test_the_cpu_keeps_no_residual():
    with pytest.raises(RuntimeError, match="keep must be false on the CPU"):
        torch.ops.fbkd_ops.relation_residual_forward(*([x] for x in draw_level(SMALL[3])), True)
