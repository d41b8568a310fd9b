"""The adapted masked distance on every backend with kernels of it: values, gradients, memory, compilation, errors."""

import importlib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import TEST_ALL, rms
from hypothesis import given
from hypothesis import strategies as st
from op_cases import (
    DTYPES,
    IN_PLACE,
    INTERPRETED,
    LAYOUTS,
    NO_CPU,
    ON_CPU,
    ON_TRITON,
    PAIRS_OF_LAYOUTS,
    accumulation_of,
    assert_as_good,
    assert_close_to_truth,
    assert_compiled_agrees,
    assert_same_bits,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    far_apart,
    name_of,
    op_of,
    overlapping,
    precision_of,
    threads,
    truncation,
    with_values,
)

import fbkd_ops
from fbkd_ops._layout import empty_gradient, in_place_layout
from fbkd_ops._numerics import residual_dtype
from fbkd_ops.functional import adapted_masked_l2_loss, attention_pool
from fbkd_ops.ops.adapted_masked_l2 import AdaptedLevels, adapted_masked_l2_squares, student_pyramid

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = [ON_CPU, INTERPRETED, ON_TRITON]
COMPILED = [ON_CPU, ON_TRITON]
MIXTURES = list(itertools.product(DTYPES, DTYPES))
MASKS = [(True, True), (True, False), (False, True), (False, False)]

# (N, Cs, Ct, H, W)
SMALL = [
    (2, 1, 1, 1, 1),  # a single element an image
    (2, 3, 5, 1, 1),  # one pixel: both layouts at once
    (2, 5, 1, 3, 7),
    (2, 1, 4, 5, 3),  # one channel: both layouts at once
    (1, 4, 4, 4, 4),
    (3, 16, 7, 3, 11),
    (2, 33, 17, 5, 9),
]
LARGE = [
    (1, 2, 3, 64, 64),  # exactly one CPU block of 4096 pixels, in pieces of 1024
    (2, 3, 2, 17, 241),  # 4097 pixels: one more
    (1, 300, 40, 29, 31),  # a block of 873 pixels, and one of 26
    (3, 64, 48, 70, 70),  # six blocks, in as many groups of partial gradients
    (40, 3, 4, 2, 2),  # 40 blocks in 32 groups; sums over pixels shorter than a vector
    (2, 6, 1030, 3, 50),  # more channels than a piece; pixels in two pieces of 128
]
# For the Triton kernels: more than one tile of every extent on both code paths, and an image in several splits.
TILES = [
    (torch.bfloat16, (1, 72, 136, 12, 12)),
    (torch.bfloat16, (1, 66, 67, 3, 45)),
    (torch.float16, (1, 136, 72, 12, 12)),
    (torch.float16, (2, 3, 4, 26, 40)),
    (torch.float32, (1, 24, 72, 12, 12)),
    (torch.float32, (1, 66, 67, 3, 45)),
    (torch.float64, (1, 18, 66, 5, 13)),
    (torch.bfloat16, (1, 72, 72, 6, 6)),  # pixels by 8 bytes, and by 4
    (torch.float16, (1, 16, 8, 5, 6)),
]
# Weights so large that the product's own threads run it, one image after the other.
ONE_BY_ONE = (2, 1100, 1100, 9, 9)


def draw_level(size, dtypes=(torch.float32, torch.float32), masks=(True, True), device="cpu", layouts=None):
    """Student, weight, bias, teacher and masks; parameters and masks in the accumulation dtype."""
    n, from_channels, to_channels, height, width = size
    of_student, of_teacher = layouts or (contiguous, contiguous)
    wide = accumulation_of(*dtypes)
    student = of_student(draw((n, from_channels, height, width), dtypes[0], device))
    weight = (draw((to_channels, from_channels), torch.float64, device) / from_channels**0.5).to(wide)
    bias = draw((to_channels,), wide, device)
    teacher = of_teacher(draw((n, to_channels, height, width), dtypes[1], device))
    sizes = (n, height, width), (n, to_channels)
    masks = [
        (2.2 * torch.rand(s, device=device) - 0.2).clamp_min(0) if m else None
        for s, m in zip(sizes, masks, strict=True)
    ]
    return [student, weight, bias, teacher, *(m if m is None else m.to(wide) for m in masks)]


def run(level, backend, scale=1.0):
    """The loss on a backend, and the gradients of student, weight and bias where they want one."""
    leaves = [x.detach().requires_grad_() for x in level[:3]]
    with fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*leaves, *level[3:])
    return loss.detach(), *torch.autograd.grad(scale * loss, leaves)


def wide(level):
    return [x if x is None else x.double() for x in level]


def difference_in(level, dtype):
    """``A S + a - T`` in plain PyTorch in ``dtype``."""
    student, weight, bias, teacher = (x.to(dtype) for x in level[:4])
    return torch.nn.functional.conv2d(student, weight[:, :, None, None], bias) - teacher


def literal(level, dtype):
    """The loss and its gradients, with the products in plain PyTorch in ``dtype``: as under autocast."""
    leaves = [x.detach().requires_grad_() for x in level[:3]]
    squares = difference_in([*leaves, level[3]], dtype).to(accumulation_of(level[0].dtype, level[3].dtype)).square()
    spatial, channel = level[4:]
    squares = squares if spatial is None else squares * spatial[:, None]
    squares = squares if channel is None else squares * channel[:, :, None, None]
    loss = squares.sum().sqrt()
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def absolute_terms(level, loss):
    """Sums of absolute values behind the loss and its gradients: ``|A| |S| + |a| + |T|`` in place of the difference.

    Rounding errors are parts of these: where the terms cancel, the loss can be smaller than any of its errors.
    """
    student, weight, bias, teacher = (x.double().abs() for x in level[:4])
    total, *gradients = literal([student, weight, bias, -teacher, *wide(level[4:])], torch.float64)
    if not loss:  # masks of zeros, or equal features: the gradients are exact zeros
        return [total, *(torch.zeros_like(gradient) for gradient in gradients)]
    return [total, *(total / loss * gradient for gradient in gradients)]


def check(level, backend, terms_cancel=False):
    dtype, eps = precision_of(backend, level[0], level[3])
    ours, exact = run(level, backend), run(wide(level), "reference")
    student, teacher = level[0], level[3]
    accumulation = accumulation_of(student.dtype, teacher.dtype)
    assert [x.dtype for x in ours] == [accumulation, *(x.dtype for x in level[:3])]
    assert ours[1].stride() == empty_gradient(in_place_layout(student)).stride()
    if dtype != accumulation:
        for mine, theirs, truth in zip(ours, literal(level, dtype), exact, strict=True):
            assert_close_to_truth(mine, theirs, truth, eps + truncation(backend, student.device.type, student.dtype))
        return ours
    eager = run(level, "reference")
    terms = absolute_terms(level, exact[0]) if terms_cancel else exact
    assert_as_good(ours[0], eager[0], exact[0], accumulation=accumulation, terms=terms[0])
    for mine, theirs, truth, size in zip(ours[1:], eager[1:], exact[1:], terms[1:], strict=True):
        extra = 4 * torch.finfo(accumulation).eps + truncation(backend, student.device.type, mine.dtype)
        assert_products_as_good(mine, theirs, truth, extra, accumulation, size)
    return ours


def assert_products_as_good(ours, eager, exact, extra, accumulation, terms):
    """The rule of assert_as_good for the elements' root mean square.

    The vendor's product has errors of its own at every size and every stride: the worst elements, both of eager's
    call of it and of ours, are off by up to 30 eps of the RMS, and seldom the same ones.
    """
    # In float64 the exact result is eager's, and as far off.
    units = 400 if accumulation == torch.float64 else 40
    assert_as_good(ours, eager, exact, extra, accumulation, units, terms)
    mine, theirs, size = (x.double().square().mean().sqrt() for x in (ours - exact, eager - exact, terms))
    if exact.numel():
        assert mine <= 2 * theirs + (units / 5 * torch.finfo(accumulation).eps + extra) * size


@pytest.mark.parametrize("size", SMALL, ids=name_of)
@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_small_sizes_in_every_mixture_of_dtypes_and_layouts(backend, device, dtypes, size):
    for layouts, masks in zip(PAIRS_OF_LAYOUTS, MASKS, strict=True):
        check(draw_level(size, dtypes, masks, device, layouts), backend)


@pytest.mark.parametrize("size", [*LARGE, ONE_BY_ONE], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(backend, device, layouts, size):
    check(draw_level(size, device=device, layouts=layouts), backend)
    if size != ONE_BY_ONE:
        check(draw_level(size, (torch.bfloat16, torch.float16), (True, False), device, layouts), backend)
        check(draw_level(size, (torch.bfloat16, torch.float64), (False, True), device, layouts), backend)


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_mixtures_in_the_interpreter(backend, device, dtypes):
    index = MIXTURES.index(dtypes)
    check(draw_level((1, 5, 4, 3, 7), dtypes, MASKS[index // 4], device, PAIRS_OF_LAYOUTS[index % 4]), backend)


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
        check(draw_level((3, 5, 4, 3, 7), dtypes, device=device, layouts=layouts), backend)


@pytest.mark.parametrize("index", range(len(TILES)))
@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_tiles(backend, device, index):
    dtype, size = TILES[index]
    check(draw_level(size, (dtype, dtype), device=device, layouts=PAIRS_OF_LAYOUTS[index % 4]), backend)


@pytest.mark.parametrize("size", [(1, 72, 136, 12, 12), (1, 264, 136, 2, 9)], ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_of_a_large_gpu_in_the_interpreter(backend, device, size, tiles_of):
    tiles_of("90")
    check(draw_level(size, (torch.bfloat16,) * 2, device=device, layouts=PAIRS_OF_LAYOUTS[1]), backend)


# What the gradients of features of 16 bits, and of other mixtures, are made from on a GPU.
KEPT = [(torch.float16,) * 2, (torch.bfloat16, torch.float32), (torch.float32,) * 2]


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS[:4:3], ids=name_of)
@pytest.mark.parametrize("dtypes", KEPT, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_kept_difference(backend, device, dtypes, layouts):
    """It has no masks, keeping it changes nothing, and backward makes the same of it as of one computed anew."""
    level = draw_level((2, 5, 4, 3, 7), dtypes, device=device, layouts=layouts)
    arguments = [[x] for x in level]
    forward, backward = (op_of(f"adapted_masked_l2_{which}", backend) for which in ("forward", "backward"))
    squares, difference = forward(*arguments, True)
    dtype, eps = precision_of(backend, level[0], level[3])
    plain = difference_in(level, dtype).to(residual_dtype(level[0], level[3]))
    assert_close_to_truth(difference, plain, difference_in(wide(level), torch.float64), eps)
    assert difference.stride() == empty_gradient(level[3]).stride()
    assert_same_bits([squares], forward(*arguments, False))
    added = torch.full_like(squares, 0.37), pool_gradients(level), [None]
    assert_same_bits(*(backward(*arguments, kept, *added) for kept in ([difference], [])))


@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_launches(backend, device, monkeypatch):
    """No more of them than gradients are made, whatever the number of levels; without the difference one again."""
    names, pyramid = [], importlib.import_module("fbkd_ops.kernels.pyramid")
    launch_once = pyramid._launch_once

    def recording(kernel, *arguments):
        names.append(kernel.fn.__name__)
        launch_once(kernel, *arguments)

    monkeypatch.setattr(pyramid, "_launch_once", recording)
    levels = [draw_level((1, 3, 4, height, 5), device=device) for height in (2, 3)]
    for memory_efficient in (False, True):
        total, leaves = squares_of(levels, backend, memory_efficient)
        assert names == ["adapted_sums", "add_partials"]
        names.clear()
        torch.autograd.grad(total, leaves)
        again = ["adapted_sums"] if memory_efficient else []
        assert names == [*again, "student_gradients", "weight_gradients", "add_splits"]
        names.clear()


def squares_of(levels, backend, memory_efficient=False):
    """The sum of the levels' squares as a part of FBKDLoss makes them, and the leaves."""
    levels, leaves = leaves_of(levels)
    with torch.no_grad(), fbkd_ops.use_backend("reference"):
        means = [attention_pool(level[0]) for level in levels]
    squares, _, _ = student_pyramid(
        backend, AdaptedLevels(*map(list, zip(*levels, strict=True))), means, memory_efficient
    )
    return squares.sum(), leaves


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_what_forward_keeps(backend, device, dtype):
    """Nothing under memory_efficient; else, on the CPU, the gradients where they need no rounding, on a GPU D."""
    levels = [draw_level((2, 5, 4, 3, 7), (dtype, dtype), device=device) for _ in range(2)]
    for memory_efficient in (False, True):
        total, _ = squares_of(levels, backend, memory_efficient)
        node = total.grad_fn.next_functions[0][0]
        kept = node.saved_tensors[sum(map(len, levels)) :]
        wide_on_cpu = backend == "cpu" and dtype == torch.float32 and not memory_efficient
        assert (node.ready is not None) == wide_on_cpu
        shapes = [level[3].shape for level in levels] if backend == "triton" and not memory_efficient else []
        assert [x.shape for x in kept] == shapes and all(x.dtype == dtype for x in kept)


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.bfloat16,) * 2], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_nothing_kept_gives_the_same_gradients(backend, device, dtypes):
    levels = [draw_level(size, dtypes, device=device) for size in ((2, 5, 4, 3, 7), (1, 3, 6, 4, 4))]
    results = []
    for memory_efficient in (False, True):
        total, leaves = squares_of(levels, backend, memory_efficient)
        results.append(torch.autograd.grad(0.37 * total, leaves))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-11)


def enlarge_tiles(monkeypatch):
    """Tiles that no GPU has registers for: the interpreter's time goes by the number of programs."""
    products = importlib.import_module("fbkd_ops.kernels.products")
    tiles = {"adapted_sums": (4096, 16, 16), "student_gradients": (4096, 16, 16), "weight_gradients": (16, 16, 4096)}
    monkeypatch.setattr(products, "blocks_of", lambda kernel, *_: products.Blocks(*tiles[kernel.__name__], 8))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_float16_with_one_pixel_that_takes_the_whole_softmax(backend, device, monkeypatch):
    """A mask beyond float16's largest number, on a map of the size that it takes, and a channel mask of that kind.

    Ms D is a million where float16 ends at 65504. Parameters of 1 / 16 keep the gradients themselves in range.
    """
    if (backend, device) == ("triton", "cpu"):
        enlarge_tiles(monkeypatch)
    n, from_channels, to_channels, height, width = size = (1, 8, 16, 200, 336)
    level = draw_level(size, (torch.float16,) * 2, (False, False), device)
    for index in (0, 3):
        level[index] = (10 * level[index].float().sign() + level[index].float()).half()
    level[1] /= 16
    attention = torch.randn(n, height, width, device=device)
    attention[0, 150, 200] = 60.0
    level[4] = height * width * attention.flatten(1).softmax(1).view_as(attention)
    level[5] = to_channels * (6 * torch.eye(to_channels, device=device)[:n]).softmax(1)
    assert level[4].max() > 2**16
    for result in check(level, backend):
        assert result.isfinite().all()


@pytest.mark.parametrize("spatial", [1e-6, 1.0, 1e30], ids=str)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_float16_with_masks_of_any_size(backend, device, spatial):
    """The loss does not see how large the spatial mask is: its gradients grow with the root."""
    level = draw_level((2, 5, 4, 3, 7), (torch.float16,) * 2, device=device)
    expected = run(level, backend)
    level[4] *= spatial
    loss, of_student, *gradients = run(level, backend, scale=spatial**-0.5)
    torch.testing.assert_close(loss * spatial**-0.5, expected[0])
    for ours, of_one in zip(gradients, expected[2:], strict=True):
        assert rms(ours - of_one) <= torch.finfo(torch.float16).eps * rms(of_one)
    torch.testing.assert_close(of_student, expected[1], rtol=2e-3, atol=2e-3 * rms(expected[1]))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_float16_with_a_factor_beyond_its_range(backend, device):
    """The factor comes from a scaled loss: it meets sums, not 16-bit values."""
    level = draw_level((2, 5, 4, 3, 7), (torch.float16,) * 2, device=device)
    level[1] /= 64
    expected = run(level, backend)[1:]
    for factor in (2.0**-40, 2.0**13):
        of_student, *gradients = run(level, backend, scale=factor)[1:]
        for ours, of_one in zip(gradients, expected[1:], strict=True):
            torch.testing.assert_close(ours, factor * of_one, rtol=1e-5, atol=1e-5 * factor)
    torch.testing.assert_close(of_student, factor * expected[0], rtol=2e-3, atol=2e-3 * factor)


@pytest.mark.parametrize("allowed", [False, True])
@pytest.mark.parametrize("backend, device", [INTERPRETED, ON_TRITON])
def test_tf32_where_pytorch_may_use_it(backend, device, monkeypatch, allowed):
    products, seen = importlib.import_module("fbkd_ops.kernels.products"), {}
    launch = products.launch_by_constants

    def recording(kernel, *arguments, **constants):
        seen[kernel.fn.__name__] = constants.get("PRECISION")
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(products, "launch_by_constants", recording)
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if allowed else "ieee"
    try:
        run(draw_level((1, 3, 4, 2, 5), device=device), backend)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert {seen[name] for name in ("adapted_sums", "student_gradients", "weight_gradients")} == {
        "tf32" if allowed else "tf32x3"
    }


@pytest.mark.parametrize("of_teacher", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("of_student", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_layouts(backend, device, of_student, of_teacher):
    check_layouts(backend, device, of_student, of_teacher)


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_layouts_in_the_interpreter(backend, device, layout):
    check_layouts(backend, device, layout, layout)


def check_layouts(backend, device, of_student, of_teacher):
    for dtypes in ((torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.bfloat16,) * 2):
        level = draw_level((3, 6, 7, 5, 8), dtypes, device=device, layouts=(of_student, of_teacher))
        gradient = check(level, backend)[1]
        last = of_student in (channels_last, channels_last_slice)
        assert gradient.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@NO_CPU
@given(
    size=st.tuples(*(st.integers(*bounds) for bounds in ((0, 3), (1, 40), (1, 40), (1, 20), (1, 70)))),
    layouts=st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS)),
    dtypes=st.sampled_from(MIXTURES),
    masks=st.sampled_from(MASKS),
    seed=st.integers(0, 999),
)
def test_any_shape_on_cpu(size, layouts, dtypes, masks, seed):
    torch.manual_seed(seed)
    check(draw_level(size, dtypes, masks, layouts=layouts), "cpu", terms_cancel=True)


@NO_CPU
def test_masks_of_zeros_on_cpu():
    level = draw_level((1, 1, 1, 1, 5))
    check([*level[:4], *(torch.zeros_like(mask) for mask in level[4:])], "cpu", terms_cancel=True)


@NO_CPU
def test_terms_that_cancel_are_the_yardstick():
    """3 * 0.7 + 0.1 - 2.2: a loss of 1e-8 of its terms, all of it rounding."""
    level = draw_level((1, 1, 1, 1, 1), masks=(False, False))
    level[:4] = [torch.full(x.shape, value) for x, value in zip(level[:4], (3.0, 0.7, 0.1, 2.2), strict=True)]
    exact = run(wide(level), "reference")
    terms = absolute_terms(level, exact[0])
    assert 0 < exact[0] < 1e-6
    torch.testing.assert_close(terms[0].item(), 4.4, rtol=1e-6, atol=0)
    torch.testing.assert_close(terms[1].item(), 0.7 * 4.4 / exact[0].item(), rtol=1e-6, atol=0)
    check(level, "cpu", terms_cancel=True)


@pytest.mark.parametrize("parameters", MIXTURES, ids=name_of)
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.float64,) * 2], ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_parameters_of_other_dtypes(backend, device, dtypes, parameters):
    """Each gradient is rounded once, to the parameter's dtype."""
    level = draw_level((2, 16, 12, 9, 11), dtypes, device=device)
    level[1:3] = [parameter.to(dtype) for parameter, dtype in zip(level[1:3], parameters, strict=True)]
    check(level, backend)


@pytest.mark.parametrize("parameter", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_parameters_of_other_dtypes_in_the_interpreter(backend, device, parameter):
    for dtypes in (torch.float32,) * 2, (torch.bfloat16,) * 2:
        level = draw_level((1, 5, 4, 3, 7), dtypes, device=device)
        check([level[0], level[1].to(parameter), level[2].to(parameter), *level[3:]], backend)


@pytest.mark.parametrize("backend, device", COMPILED)
def test_half_precision_parameters_do_not_overflow(backend, device):
    """The sum of squares' gradient is beyond float16, the loss's is not."""
    level = draw_level((1, 4, 3, 40, 40), device=device, masks=(False, False))
    level[3] += 200
    level[1:3] = [parameter.half() for parameter in level[1:3]]
    assert all(x.isfinite().all() for x in check(level, backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_parameters_and_masks_of_another_layout(backend, device):
    level = draw_level((2, 3, 4, 5, 6), device=device)
    ours = run([x if x.dim() == 4 else x.mT.contiguous().mT if x.dim() > 1 else x for x in level], backend)
    strided = [*level[:2], level[2].repeat_interleave(2)[::2], *level[3:]]
    for other in (ours, run(strided, backend)):
        assert_same_bits(run(level, backend), other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_masks_of_another_dtype(backend, device, dtype):
    level = draw_level((2, 3, 4, 5, 6), device=device)
    masks = [mask.to(dtype) for mask in level[4:]]
    assert_same_bits(run([*level[:4], *masks], backend), run([*level[:4], *(m.float() for m in masks)], backend))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_teacher_and_masks_receive_no_gradient(backend, device):
    level = [x.requires_grad_() for x in draw_level((2, 3, 4, 5, 6), device=device)]
    with fbkd_ops.use_backend(backend):
        adapted_masked_l2_loss(*level).backward()
    assert [x.grad is not None for x in level] == [True, True, True, False, False, False]


@pytest.mark.parametrize("wanted", [w for w in itertools.product((True, False), repeat=3) if any(w)], ids=str)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_some_gradients_wanted(backend, device, wanted):
    """Of student, weight and bias; the same as where all are wanted."""
    level = draw_level((2, 3, 4, 5, 6), device=device)
    expected = run(level, backend)
    leaves = [x.detach().requires_grad_(want) for x, want in zip(level[:3], wanted, strict=True)]
    with fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*leaves, *level[3:])
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected[0])
    for leaf, want, gradient in zip(leaves, wanted, expected[1:], strict=True):
        assert (leaf.grad is not None) == want
        if want:
            torch.testing.assert_close(leaf.grad, gradient)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_no_gradient_needed(backend, device):
    level = draw_level((2, 3, 4, 5, 6), device=device)
    with fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*level)
        with torch.no_grad():
            leaves = [x.detach().requires_grad_() for x in level[:3]]
            assert_same_bits([loss], [adapted_masked_l2_loss(*leaves, *level[3:])])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, run(level, backend)[0])


@pytest.mark.parametrize("dtypes", [(torch.float64,) * 2, (torch.float64, torch.float32)], ids=name_of)
@pytest.mark.parametrize("backend, device, layouts", with_values(BACKENDS, PAIRS_OF_LAYOUTS, PAIRS_OF_LAYOUTS[1:2]))
def test_gradcheck(backend, device, dtypes, layouts):
    level = draw_level((2, 3, 4, 2, 3), dtypes, device=device, layouts=layouts)
    with fbkd_ops.use_backend(backend):
        assert torch.autograd.gradcheck(
            lambda *leaves: adapted_masked_l2_loss(*leaves, *level[3:]),
            [x.requires_grad_() for x in level[:3]],
            fast_mode=backend == "triton",
            # The first pass takes the gradient that was made in the forward pass, the next ones compute it.
            nondet_tol=1e-12,
        )


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    level = draw_level((1, 3, 4, 2, 4), device=device)
    student = level[0].requires_grad_()
    with fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*level)
    (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_perfect_adaptation_has_loss_and_gradients_zero(backend, device):
    student = draw((2, 3, 4, 4), torch.float32, device)
    level = [student, torch.eye(3, device=device), torch.zeros(3, device=device), student.clone(), None, None]
    for result in run(level, backend):
        assert torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch(backend, device, dtype, layouts):
    loss, *gradients = run(draw_level((0, 3, 4, 5, 6), (dtype, dtype), device=device, layouts=layouts), backend)
    assert loss == 0 and [tuple(x.shape) for x in gradients] == [(0, 3, 5, 6), (4, 3), (4,)]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in gradients)


@pytest.mark.parametrize("where", range(6), ids=["student", "weight", "bias", "teacher", "spatial", "channel"])
@pytest.mark.parametrize(
    "backend, device, value",
    with_values(BACKENDS, [float("nan"), float("inf"), -float("inf")], [float("nan")]),
)
def test_nan_and_infinity_reach_the_loss(backend, device, where, value):
    level = draw_level((2, 3, 4, 5, 6), device=device)
    level[where].view(-1)[1] = value
    level[4], level[5] = level[4] + 0.1, level[5] + 0.1
    ours, eager = run(level, backend), run(level, "reference")
    assert not ours[0].isfinite()
    for mine, theirs in zip(ours, eager, strict=True):
        assert not mine[~theirs.isfinite()].isfinite().any()


@pytest.mark.parametrize("size", [(2, 64, 48, 70, 70), (40, 3, 4, 2, 2)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layouts, size):
    for dtype in (torch.float32, torch.bfloat16):
        level = draw_level(size, (dtype, torch.float32), device=device, layouts=layouts)
        first = run(level, backend)
        for _ in range(2):
            assert_same_bits(first, run(level, backend))


@NO_CPU
@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_bit_equal_for_any_number_of_threads(layouts, dtypes):
    """Of many blocks, of one block, of one that is small; not of the largest weights, whose product has its threads.

    From two threads on: on some processors the vendor's product of one block adds in another order where the whole
    process has one thread.
    """
    for size in ((2, 64, 48, 70, 70), (1, 256, 256, 13, 13), (1, 48, 40, 8, 8), (2, 33, 17, 5, 9)):
        level = draw_level(size, dtypes, layouts=layouts)
        results = []
        for count in (2, 3, 4):
            with threads(count):
                results.append(run(level, "cpu"))
        for other in results[1:]:
            assert_same_bits(results[0], other)


# (dtypes of student and teacher, layouts, size); one level without images.
PYRAMID = [
    ((torch.float32, torch.float32), (contiguous, contiguous), (2, 5, 4, 9, 8)),
    ((torch.bfloat16, torch.float32), (channels_last, contiguous), (1, 6, 7, 3, 4)),
    ((torch.float32, torch.float16), (contiguous, channels_last), (0, 3, 4, 4, 4)),
    ((torch.float64, torch.float32), (channels_last_slice, contiguous), (2, 4, 3, 3, 5)),
    ((torch.float16, torch.bfloat16), (contiguous, contiguous), (3, 1, 2, 1, 1)),
]
IN_FLOAT32 = [((torch.float32,) * 2, layouts, size) for _, layouts, size in PYRAMID]


def pyramid(device, of_levels=PYRAMID):
    levels = enumerate(of_levels)
    return [draw_level(size, dtypes, MASKS[i % 4], device, layouts) for i, (dtypes, layouts, size) in levels]


def leaves_of(levels):
    """The levels with their first three tensors as leaves, and those in the order of the op: by kind, then by level."""
    levels = [[*(x.detach().requires_grad_() for x in level[:3]), *level[3:]] for level in levels]
    return levels, [level[kind] for kind in range(3) for level in levels]


@pytest.mark.parametrize(
    "backend, device, of_levels", with_values(BACKENDS, [PYRAMID, IN_FLOAT32], [PYRAMID[1:4]], ["mixed", "float32"])
)
def test_levels_together_equal_levels_alone(backend, device, of_levels):
    check_together(pyramid(device, of_levels), backend)


@NO_CPU
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_large_levels_together_equal_levels_alone(dtype, count):
    sizes = [*LARGE, (1, 256, 256, 13, 13), (1, 48, 40, 8, 8), (1, 256, 256, 3, 3), (1, 900, 1, 5, 5)]
    levels = [draw_level(size, (dtype, torch.float32), layouts=PAIRS_OF_LAYOUTS[i % 4]) for i, size in enumerate(sizes)]
    with threads(count):
        check_together(levels, "cpu")


def check_together(levels, backend):
    """Squares and gradients of a list of levels against lists of one.

    Lists of one of them are in the same situation: made in the forward pass if and only if the list's are.
    """
    levels, leaves = leaves_of(levels)
    weights = torch.rand(len(levels), dtype=torch.float64).float()
    for keeps in (True, False):
        for level in levels:
            level[0].requires_grad_(keeps)
        wanted = leaves if keeps else leaves[len(levels) :]
        squares = adapted_masked_l2_squares(backend, AdaptedLevels(*map(list, zip(*levels, strict=True))))
        together = dict(zip(wanted, torch.autograd.grad(squares, wanted, weights.to(squares)), strict=True))
        all_keep = len({(level[0].dtype, accumulation_of(level[0].dtype, level[3].dtype)) for level in levels}) == 1
        for index, level in enumerate(levels):
            alone = adapted_masked_l2_squares(backend, AdaptedLevels(*([x] for x in level)))
            assert_same_bits([squares[index].to(alone.dtype)], [alone[0]])
            of = level[:3] if keeps else level[1:3]
            gradients = torch.autograd.grad(alone, of, weights[index : index + 1].to(alone))
            if all_keep or not keeps or backend != "cpu":
                assert_same_bits([together[leaf] for leaf in of], gradients)
            else:
                for leaf, gradient in zip(of, gradients, strict=True):
                    torch.testing.assert_close(together[leaf], gradient)


@pytest.mark.parametrize("backend, device", BACKENDS)
@pytest.mark.parametrize("of_levels", [PYRAMID[:3], IN_FLOAT32[:3]], ids=["mixed", "float32"])
def test_some_levels_used(backend, device, of_levels):
    levels, leaves = leaves_of(pyramid(device, of_levels))
    squares = adapted_masked_l2_squares(backend, AdaptedLevels(*map(list, zip(*levels, strict=True))))
    squares[1].backward()
    for index, level in enumerate(levels):
        for leaf in level[:3]:
            assert (leaf.grad.abs().sum() > 0) == (index == 1)


@NO_CPU
@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
def test_offsets_beyond_32_bits(layouts):
    level = draw_level((2, 3, 4, 5, 6), (torch.bfloat16,) * 2, layouts=layouts)
    near = run(level, "cpu")
    assert_same_bits(near, run([far_apart(level[0], layouts[0]), *level[1:]], "cpu"))
    assert_same_bits(near, run([*level[:3], far_apart(level[3], layouts[1]), *level[4:]], "cpu"))


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device, enabled, dtypes):
    level = draw_level((2, 6, 4, 5, 6), dtypes, device=device)
    expected = run(level, backend)
    leaves = [x.detach().requires_grad_() for x in level[:3]]
    with torch.autocast(device, dtype=torch.bfloat16, enabled=enabled), fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*leaves, *level[3:])
        assert_same_bits(expected, [loss, *torch.autograd.grad(loss, leaves)])


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.bfloat16, torch.float32)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_again(backend, device, dtypes):
    """The second pass leaves the first one's results alone, and is not touched by what was done to them."""
    level = draw_level((2, 6, 4, 5, 6), dtypes, device=device)
    leaves = [x.detach().requires_grad_() for x in level[:3]]
    with fbkd_ops.use_backend(backend):
        loss = adapted_masked_l2_loss(*leaves, *level[3:])
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    kept = [x.clone() for x in first]
    second = torch.autograd.grad(3 * loss, leaves, retain_graph=True)
    assert_same_bits(first, kept)
    for gradient in first:
        gradient.fill_(float("nan"))
    third = torch.autograd.grad(loss, leaves)
    for one, three, again in zip(kept, second, third, strict=True):
        torch.testing.assert_close(3 * one, three)
        torch.testing.assert_close(one, again)


@pytest.mark.parametrize("index", range(4), ids=["student", "weight", "bias", "teacher"])
def test_a_tensor_changed_in_place_is_noticed(index):
    level = draw_level((2, 3, 4, 5, 6))
    leaves = [x.requires_grad_() for x in level[:3]]
    changed = level[index] * 1
    loss = adapted_masked_l2_loss(*level[:index], changed, *level[index + 1 :])
    changed.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, leaves)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    levels = pyramid(device)[1:3] if backend == "triton" else pyramid(device)
    arguments = list(map(list, zip(*levels, strict=True)))
    forward = op_of("adapted_masked_l2_forward", backend)
    backward = op_of("adapted_masked_l2_backward", backend)
    squares, *differences = forward(*arguments, backend != "cpu")
    means = [mean for level in levels for mean in pool_gradients(level)]
    for keep in (False, True)[: 1 + (backend != "cpu")]:
        torch.library.opcheck(forward, (*arguments, keep))
    added = means, [torch.ones_like(level[0].contiguous()) for level in levels]
    for pools, dense in (added, ([None] * 4 * len(levels), [None] * len(levels))):
        dense = [x if x is None else of_layout(x, level[0]) for x, level in zip(dense, levels, strict=True)]
        torch.library.opcheck(backward, (*arguments, differences, squares, pools, dense))


def pool_gradients(level):
    """Of the student's four means, in the level's accumulation dtype."""
    student = level[0]
    wide = accumulation_of(student.dtype, level[3].dtype)
    return [torch.randn(mean.shape, device=mean.device).to(wide) for mean in attention_pool(student)]


def of_layout(x, student):
    last = fbkd_ops._layout.matrix_layout(student)
    return x.contiguous(memory_format=last)


@NO_CPU
def test_opcheck_of_the_gradient_made_in_the_forward_pass():
    levels = pyramid("cpu", IN_FLOAT32)
    arguments = list(map(list, zip(*levels, strict=True)))
    op = torch.ops.fbkd_ops
    torch.library.opcheck(op.adapted_masked_l2_with_gradient.default, arguments)
    squares, *gradients = op.adapted_masked_l2_with_gradient(*arguments)
    students = arguments[0]
    means = [mean for level in levels for mean in pool_gradients(level)]
    finish = op.adapted_masked_l2_finish_.default
    utils = ("test_schema", "test_autograd_registration", "test_faketensor")
    for pools in (means, [None] * len(means)):
        torch.library.opcheck(
            finish, (gradients[: len(levels)], students, squares, pools, [None] * len(levels)), test_utils=utils
        )


@NO_CPU
def test_op_names_what_is_wrong():
    op, (x, weight, bias, teacher, spatial, channel) = torch.ops.fbkd_ops, draw_level((2, 3, 4, 5, 6))

    def forward(**changed):
        of = dict(student=[x], weight=[weight], bias=[bias], teacher=[teacher], spatial=[spatial], channel=[channel])
        return op.adapted_masked_l2_forward(*(of | changed).values(), False)

    with pytest.raises(RuntimeError, match="weight must have 1 entries, got 2"):
        forward(weight=[weight, weight])
    with pytest.raises(RuntimeError, match=r"weight must have shape \(4, 3\)"):
        forward(weight=[weight.mT.contiguous()])
    with pytest.raises(RuntimeError, match="weight must be contiguous with 12 elements"):
        forward(weight=[weight.mT.contiguous().mT])
    with pytest.raises(RuntimeError, match="bias must be contiguous with 4 elements, got 3"):
        forward(bias=[bias[:3].clone()])
    with pytest.raises(RuntimeError, match="weight and bias must be float16, bfloat16, float32 or float64"):
        forward(bias=[bias.int()])
    with pytest.raises(RuntimeError, match="student and teacher must agree in N, H and W"):
        forward(teacher=[teacher[:1]])
    with pytest.raises(RuntimeError, match="channel_mask must be contiguous with 8 elements, got 6"):
        forward(channel=[torch.zeros(2, 3)])
    arguments = [[x], [weight], [bias], [teacher], [None], [None]]
    with pytest.raises(RuntimeError, match="pool_grads must have 4 entries, got 0"):
        op.adapted_masked_l2_backward(*arguments, [], torch.ones(1), [], [None])
    with pytest.raises(RuntimeError, match="grad must be contiguous with 1 elements, got 2"):
        op.adapted_masked_l2_backward(*arguments, [], torch.ones(2), [None] * 4, [None])
    for wrong in (x.double(), x[:1], channels_last(x), x[..., :5]):
        with pytest.raises(
            RuntimeError, match="grad_student must have the shape and the type of the map, and its gradient's layout"
        ):
            op.adapted_masked_l2_backward(*arguments, [], torch.ones(1), [None] * 4, [wrong])
    for empty in (x[:, :0].contiguous(), x[:, :, :0].contiguous()):
        with pytest.raises(RuntimeError, match="student must have at least one channel and one pixel"):
            forward(student=[empty], weight=[weight[:, : empty.shape[1]].contiguous()])
    with pytest.raises(RuntimeError, match="teacher must have at least one channel and one pixel"):
        forward(teacher=[teacher[:, :0].contiguous()], weight=[weight[:0]], bias=[bias[:0]], channel=[None])


@NO_CPU
def test_the_cpu_keeps_no_difference():
    op, arguments = torch.ops.fbkd_ops, [[x] for x in draw_level((2, 3, 4, 5, 6))]
    with pytest.raises(RuntimeError, match="keep must be false on the CPU"):
        op.adapted_masked_l2_forward(*arguments, True)
    with pytest.raises(RuntimeError, match="residual must have 0 entries, got 1"):
        op.adapted_masked_l2_backward(*arguments, arguments[3], torch.ones(1), [None] * 4, [None])


@NO_CPU
def test_finish_names_what_is_wrong():
    """It writes in place: whatever it takes has to fit."""
    finish, x = torch.ops.fbkd_ops.adapted_masked_l2_finish_, torch.randn(2, 3, 5, 6)

    def run(gradient=x.clone(), grad=torch.ones(1)):
        finish([gradient], [x], grad, [None] * 4, [None])

    run()
    for wrong, message in (
        (torch.ones(0), "grad must be contiguous with 1 elements, got 0"),
        (torch.ones(2), "grad must be contiguous with 1 elements, got 2"),
        (torch.ones(1).half(), "grad must be float32 or float64"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(grad=wrong)
    for wrong in (channels_last(x), x.half(), x[:1].clone(), x[:, :, :, :5], x.flatten()):
        with pytest.raises(RuntimeError, match="gradient must have the shape and the type of the map, and"):
            run(gradient=wrong)


@pytest.mark.parametrize(
    "changed,error,message",
    [
        (dict(weight=torch.ones(4, 2)), ValueError, r"weight must have shape \(4, 3\), got \(4, 2\)"),
        (dict(weight=torch.ones(4, 3, 1, 1)), ValueError, r"weight must have shape \(4, 3\), got \(4, 3, 1, 1\)"),
        (dict(weight=torch.ones(4, 3).int()), TypeError, r"weight must be a floating-point tensor, got torch.int32"),
        (dict(weight=torch.ones(4, 3, device="meta")), ValueError, r"weight .* on one device, got meta and cpu"),
        (dict(bias=None), TypeError, r"bias must be a torch.Tensor, got NoneType"),
        (dict(bias=torch.ones(3)), ValueError, r"bias must have shape \(4,\), got \(3,\)"),
        (dict(teacher=torch.ones(2, 4, 5, 5)), ValueError, r"agree in N, H and W, got \(2, 3, 5, 6\) and"),
        (dict(teacher=torch.ones(2, 4, 5, 6, device="meta")), ValueError, r"one device, got cpu and meta"),
        (dict(spatial=torch.ones(2, 4)), ValueError, r"spatial_mask must have shape \(2, 5, 6\), got \(2, 4\)"),
        (dict(channel=torch.ones(2, 3)), ValueError, r"channel_mask must have shape \(2, 4\), got \(2, 3\)"),
        (dict(channel=torch.ones(2, 4, device="meta")), ValueError, r"channel_mask .* on one device, got meta"),
        (dict(student=torch.ones(3, 5, 6)), ValueError, r"student must have shape \(N, C, H, W\), got \(3, 5, 6\)"),
    ],
)
def test_bad_arguments_are_named(changed, error, message):
    names = ("student", "weight", "bias", "teacher", "spatial", "channel")
    with pytest.raises(error, match=message):
        adapted_masked_l2_loss(*(dict(zip(names, draw_level((2, 3, 4, 5, 6)), strict=True)) | changed).values())


def inputs_to_compile(device, all_layouts):
    for layouts, size in itertools.product(all_layouts, ((2, 3, 4, 4, 5), (3, 6, 5, 2, 8))):
        level = draw_level(size, device=device, layouts=layouts)
        yield [*(x.requires_grad_() for x in level[:3]), *level[3:]]


@pytest.mark.parametrize("backend, device", [*BACKENDS, ("reference", "cpu")])
def test_compiles_to_a_full_graph(backend, device):
    layouts = [(channels_last, contiguous), *[(contiguous, contiguous)] * TEST_ALL]
    assert_compiled_agrees(adapted_masked_l2_loss, inputs_to_compile(device, layouts), backend, "aot_eager")


@NO_CPU
def test_compiles_through_inductor():
    inputs = inputs_to_compile("cpu", [(contiguous, contiguous)])
    assert_compiled_agrees(adapted_masked_l2_loss, inputs, "cpu", "inductor")


MEMORY_SCRIPT = """
import re, torch, fbkd_ops
from fbkd_ops.functional import adapted_masked_l2_loss
def peak():
    # Not getrusage's figure: that starts at the size of the process this one was forked from.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read()).group(1)) * 1024
def level(height, width):
    student, teacher = (torch.ones(1, 256, height, width) for _ in range(2))
    weight, bias = torch.full((256, 256), 0.01, requires_grad=True), torch.zeros(256, requires_grad=True)
    masks = torch.ones(1, height, width), torch.ones(1, 256)
    return student.requires_grad_(), weight, bias, teacher, *masks
adapted_masked_l2_loss(*level(16, 16)).backward()
inputs = level(200, 336)
before = peak()
adapted_masked_l2_loss(*inputs).backward()
print(peak() - before - inputs[0].grad.numel() * 4)
"""


@NO_CPU
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux's /proc")
def test_a_large_level_takes_its_gradient_and_little_more():
    """256x200x336 in float32: 69 MB each for a map, its adapted map and their difference, of which none is made."""
    done = subprocess.run([sys.executable, "-c", MEMORY_SCRIPT], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 32e6
