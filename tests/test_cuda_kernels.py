"""The CUDA kernels and what their launchers decide, run on the CPU by tests/simt: no GPU needed."""

import itertools
import math

import numpy as np
import pytest
import torch
from helpers import TEST_ALL, pairs_of, within_eager_error
from op_cases import (
    DTYPES,
    LARGE,
    accumulation_of,
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    name_of,
    threads,
)
from simt.build import build

from fbkd_ops import reference
from fbkd_ops._layout import matrix_layout

# As tests/simt/queue.h numbers them.
NUMBER = {dtype: number for number, dtype in enumerate((torch.float32, torch.float64, torch.float16, torch.bfloat16))}
MANY_BLOCKS = 1 << 20
ONE_ORDER = {"orders": (3,)}

# (C, H, W), each read with channels as rows and with pixels as rows. A tile has 8, 16 or 32 lanes side by side with 16
# bytes each; below one another its threads have steps of 128, 64 or 32 rows (pool), and of half as many (distance).
SIZES = [
    (1, 1, 1),  # a single element
    (3, 1, 1),  # one pixel: both layouts at once
    (1, 5, 3),  # one channel: both layouts at once
    (5, 3, 7),  # odd sizes: one element at a time
    (4, 4, 4),  # a thread's rows
    (16, 3, 11),  # 33 columns: 16 lanes of float32, 8 of the 16-bit types
    (33, 1, 17),  # 17 columns: 16 lanes of float64
    (129, 4, 8),  # 32 columns: 8 lanes of float32; one row more than a step of theirs
    (65, 3, 11),  # one row more than a step of 16 lanes
    (33, 8, 16),  # 128 columns: a tile of float32; one row more than a step of 32 lanes
    (17, 3, 43),  # 129 columns: one more; one row more than the distance's step
    (3, 16, 16),  # 256 columns: a tile of the 16-bit types
    (2, 1, 258),  # two more: still moved by 4 bytes
    (9, 19, 27),  # 513 columns
    (2100, 2, 4),  # 17 tiles one below another: their sums go to 8 groups of threads
]


def shifted(x):
    """Begins one element behind a multiple of 16 bytes: nothing moves in packs."""
    memory = torch.empty(x.numel() + 1, dtype=x.dtype)
    return memory[1:].view(x.shape).copy_(x)


def apart(x):
    """Aligned rows of images that begin anywhere."""
    return torch.stack([torch.nn.functional.pad(image.flatten(), (0, 1)) for image in x])[:, :-1].unflatten(
        1, x.shape[1:]
    )


def odd_slice(x):
    """Rows aligned to an even number of elements only, in channels_last."""
    wide = torch.cat([x, x[:, : 2 - x.shape[1] % 2]], dim=1)
    return channels_last(wide)[:, : x.shape[1]]


def exact_means(x):
    """The four means in 80-bit arithmetic, rounded to float64."""
    wide = x.double().numpy().astype(np.longdouble)
    means = abs(wide).mean(1), abs(wide).mean((2, 3)), wide.mean(1), wide.mean((2, 3))
    return [torch.from_numpy(mean.astype(np.float64)) for mean in means]


def numbers(tensors, what):
    return [number for tensor in tensors for number in getattr(tensor, what)()]


def empty_gradients(xs):
    return [torch.empty_like(x, memory_format=matrix_layout(x)) for x in xs]


def same_bits(ours, theirs):
    ours, theirs = [[x.contiguous().view(torch.uint8) for x in tensors] for tensors in (ours, theirs)]
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def assert_as_good(ours, eager, truth, dtype):
    assert within_eager_error(ours, eager, truth, dtype), (ours.shape, (ours.double() - truth).abs().max())


def pool_means(xs, blocks=MANY_BLOCKS, **options):
    means = []
    for n, c, h, w in [x.shape for x in xs]:
        dtype = accumulation_of(xs[0].dtype)
        means += [torch.empty(shape, dtype=dtype) for shape in ((n, h, w), (n, c), (n, h, w), (n, c))]
    arguments = [NUMBER[xs[0].dtype], xs, numbers(xs, "size"), numbers(xs, "stride"), means, blocks]
    build("attention_pool").run("forward", len(xs), *arguments, outputs=means, **options)
    return means


def pool_gradients(xs, grads, blocks=MANY_BLOCKS, **options):
    dx = empty_gradients(xs)
    arguments = [NUMBER[xs[0].dtype], xs, numbers(xs, "size"), numbers(xs, "stride"), grads, dx, blocks]
    build("attention_pool").run("backward", len(xs), *arguments, outputs=dx, **options)
    return dx


def reference_gradient(x, grads):
    leaf = x.detach().requires_grad_()
    used = [(mean, grad) for mean, grad in zip(reference.attention_pool(leaf), grads, strict=True) if grad is not None]
    return torch.autograd.grad([mean for mean, _ in used], leaf, [grad.to(mean.dtype) for mean, grad in used])[0]


def check_pool(xs, **options):
    """Means and gradients of a pyramid against the reference. Returns them with the gradients of the means."""
    means = pool_means(xs, **options)
    grads = [torch.randn(mean.shape).to(mean.dtype) for mean in means]
    dx = pool_gradients(xs, grads, **options)
    for index, x in enumerate(xs):
        mine = slice(4 * index, 4 * index + 4)
        for ours, eager, truth in zip(means[mine], reference.attention_pool(x), exact_means(x), strict=True):
            assert_as_good(ours, eager, truth, accumulation_of(x.dtype))
        eager, truth = reference_gradient(x, grads[mine]), reference_gradient(x.double(), grads[mine])
        assert_as_good(dx[index], eager, truth, accumulation_of(x.dtype))
    return means, grads, dx


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pool_of_a_pyramid(dtype, layout):
    """More levels than one launch takes, each with the bits that it gets alone and from few blocks."""
    xs = [layout(draw((2, *size), dtype)) for size in SIZES]
    assert len(xs) > 8
    means, grads, dx = check_pool(xs)
    assert same_bits(pool_means(xs, blocks=1, orders=(1,)), means)
    for index, x in enumerate(xs):
        mine = slice(4 * index, 4 * index + 4)
        assert same_bits(pool_means([x], blocks=2, orders=(1,)), means[mine])
        assert same_bits(pool_gradients([x], grads[mine], blocks=2, orders=(1,)), dx[index : index + 1])


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pool_of_large_maps(dtype, layout):
    check_pool([layout(draw((1, *size), dtype)) for size in LARGE], **ONE_ORDER)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_pool_of_many_images(layout):
    """Enough tiles for taller ones: several steps down a tile, the last of them short."""
    size = (133, 1, 3) if layout is contiguous else (3, 67, 2)
    check_pool([layout(draw((1024, *size), torch.float16))], **ONE_ORDER)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_pool_of_many_tiles(layout):
    """More than 128 tiles one below another: 32 groups of threads."""
    check_pool([layout(draw((1, 16900, 1, 2), torch.float32))], **ONE_ORDER)


LAYOUTS = [channel_slice, channels_last_slice, batch_slice, shifted, apart, odd_slice]


@pytest.mark.parametrize("layout", LAYOUTS, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pool_of_slices(dtype, layout):
    """Rows and images further apart than they are long, aligned to less than 16 bytes; the sums stay the same."""
    dense = [draw((3, *size), dtype) for size in ((6, 5, 8), (7, 5, 7), (40, 4, 6), (64, 2, 3), (3, 8, 32))]
    xs = [layout(x) for x in dense]
    means, _, _ = check_pool(xs)
    last = layout in (channels_last_slice, odd_slice)
    assert same_bits(means, pool_means([(channels_last if last else contiguous)(x) for x in dense], **ONE_ORDER))


@pytest.mark.parametrize("layout", [contiguous, channels_last, shifted], ids=name_of)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_pool_gradients_that_are_absent(dtype, layout):
    xs, grads, expected = [], [], []
    for present in itertools.product([False, True], repeat=4):
        x = layout(draw((2, 17, 6, 8), dtype))
        some = [torch.randn(shape) for shape in ((2, 6, 8), (2, 17), (2, 6, 8), (2, 17))]
        some = [grad if wanted else None for grad, wanted in zip(some, present, strict=True)]
        expected.append(reference_gradient(x, some) if any(present) else torch.zeros_like(x))
        if not (present[0] or present[1]):
            x = torch.full_like(x, math.nan)  # not read
        xs, grads = [*xs, x], [*grads, *some]
    for ours, theirs in zip(pool_gradients(xs, grads), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pool_of_nan_and_infinity():
    x = draw((2, 6, 5, 8), torch.float32)
    x[0, 1, 2, 3], x[0, 4, 0, 0], x[1, 2, 3, 4] = math.nan, math.inf, -math.inf
    means = pool_means([x])
    grads = [torch.ones_like(mean) for mean in means]
    for ours, theirs in zip(means, reference.attention_pool(x), strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)
    torch.testing.assert_close(pool_gradients([x], grads)[0], reference_gradient(x, grads))


def l2_arguments(students, teachers, spatial, channel):
    strides = [numbers(maps, "stride") for maps in (students, teachers)]
    types = [NUMBER[students[0].dtype], NUMBER[teachers[0].dtype]]
    return [len(students), *types, students, teachers, numbers(students, "size"), *strides, spatial, channel]


def l2_squares(students, teachers, spatial, channel, in_double, blocks=MANY_BLOCKS, **options):
    squares = torch.empty(len(students), dtype=torch.float64 if in_double else torch.float32)
    arguments = [*l2_arguments(students, teachers, spatial, channel), squares, in_double, blocks]
    build("masked_l2").run("forward", *arguments, outputs=[squares], **options)
    return squares


def l2_gradients(students, teachers, spatial, channel, grad, blocks=MANY_BLOCKS, **options):
    ds = empty_gradients(students)
    in_double = grad.dtype == torch.float64
    arguments = [*l2_arguments(students, teachers, spatial, channel), grad, in_double, ds, blocks]
    build("masked_l2").run("backward", *arguments, outputs=ds, **options)
    return ds


def l2_reference(s, t, spatial, channel, grad):
    """Sum and gradient of one level, in the accumulation dtype and in float64."""
    results = []
    for dtype in (accumulation_of(s.dtype, t.dtype), torch.float64):
        difference = s.to(dtype) - t.to(dtype)
        mask = 1 if spatial is None else spatial.to(dtype)[:, None]
        mask = mask if channel is None else mask * channel.to(dtype)[:, :, None, None]
        gradient = 2 * grad.to(dtype) * mask * difference
        results.append(((mask * difference**2).sum(), gradient.to(s.dtype) if dtype != torch.float64 else gradient))
    (eager, eager_ds), (truth, truth_ds) = results
    if accumulation_of(s.dtype, t.dtype) == torch.float64:
        eager_ds = truth_ds.to(s.dtype)
    return eager, eager_ds, truth, truth_ds


def masks_for(s, t, present):
    dtype, (n, c, h, w) = accumulation_of(s.dtype, t.dtype), s.shape
    masks = torch.rand(n, h, w).to(dtype) * 2, torch.rand(n, c).to(dtype) * 2
    return [mask if wanted else None for mask, wanted in zip(masks, present, strict=True)]


def check_l2(students, teachers, present=((True, True), (True, False), (False, True), (False, False)), **options):
    """Sums and gradients of a pyramid against the reference; masks present in turn."""
    masks = [
        masks_for(s, t, present[i % len(present)]) for i, (s, t) in enumerate(zip(students, teachers, strict=True))
    ]
    spatial, channel = [list(column) for column in zip(*masks, strict=True)]
    dtype = accumulation_of(students[0].dtype, teachers[0].dtype)
    grad = torch.randn(len(students)).to(dtype)
    squares = l2_squares(students, teachers, spatial, channel, dtype == torch.float64, **options)
    ds = l2_gradients(students, teachers, spatial, channel, grad, **options)
    for index, (s, t) in enumerate(zip(students, teachers, strict=True)):
        eager, eager_ds, truth, truth_ds = l2_reference(s, t, spatial[index], channel[index], grad[index])
        assert_as_good(squares[index], eager, truth, dtype)
        assert_as_good(ds[index], eager_ds, truth_ds, dtype)
    return spatial, channel, grad, squares, ds


BOTH = contiguous, channels_last
PAIRS = list(itertools.product(BOTH, repeat=2))


@pytest.mark.parametrize("dtype, of_student, of_teacher", pairs_of(DTYPES, BOTH, BOTH), ids=name_of)
def test_l2_of_a_pyramid(dtype, of_student, of_teacher):
    """More levels than one launch takes, each with the bits that it gets alone and from few blocks."""
    students = [of_student(draw((2, *size), dtype)) for size in SIZES]
    teachers = [of_teacher(draw((2, *size), dtype)) for size in SIZES]
    spatial, channel, grad, squares, ds = check_l2(students, teachers)
    for i in range(len(SIZES)):
        level = slice(i, i + 1)
        one = [students[level], teachers[level], spatial[level], channel[level]]
        assert same_bits([l2_squares(*one, dtype == torch.float64, blocks=2, orders=(1,))], [squares[level]])
        assert same_bits(l2_gradients(*one, grad[level], blocks=2, orders=(1,)), ds[level])


@pytest.mark.parametrize("teacher", DTYPES, ids=name_of)
@pytest.mark.parametrize("student", DTYPES, ids=name_of)
def test_l2_of_mixed_dtypes(student, teacher):
    sizes = [(6, 5, 8), (7, 5, 7), (33, 8, 16), (17, 3, 43), (3, 2, 129)]
    for layouts in PAIRS:
        students = [layouts[0](draw((2, *size), student)) for size in sizes]
        check_l2(students, [layouts[1](draw((2, *size), teacher)) for size in sizes], orders=(0, 2))


@pytest.mark.parametrize("layouts", PAIRS, ids=name_of)
def test_l2_of_large_maps(layouts):
    for dtype in (torch.float32, torch.bfloat16):
        students = [layouts[0](draw((1, *size), dtype)) for size in LARGE]
        check_l2(students, [layouts[1](draw((1, *size), dtype)) for size in LARGE], **ONE_ORDER)


# Each layout of the student, and maps of one layout beside maps of two.
@pytest.mark.parametrize("layouts", PAIRS if TEST_ALL else [PAIRS[0], PAIRS[2]], ids=name_of)
def test_l2_of_many_images(layouts):
    """Enough tiles for taller ones: several steps down a tile, the last of them short."""
    size = (133, 1, 3) if layouts[0] is contiguous else (3, 67, 2)
    student, teacher = [layout(draw((1024, *size), torch.float16)) for layout in layouts]
    check_l2([student], [teacher], **ONE_ORDER)


# Beside a slice: dense maps, and a slice of the same kind.
SLICES = list(itertools.product([contiguous, *LAYOUTS], [contiguous, channels_last, *LAYOUTS]))
if not TEST_ALL:
    SLICES = [(s, t) for s, t in SLICES if s is t or s is contiguous or t in (contiguous, channels_last)]


@pytest.mark.parametrize("of_student, of_teacher", SLICES, ids=name_of)
def test_l2_of_slices(of_student, of_teacher):
    sizes = [(6, 5, 8), (7, 5, 7), (40, 4, 6)]
    for dtypes in ((torch.float32, torch.float32), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)):
        students = [of_student(draw((3, *size), dtypes[0])) for size in sizes]
        check_l2(students, [of_teacher(draw((3, *size), dtypes[1])) for size in sizes], orders=(0, 2))


def test_l2_of_float32_beside_float64():
    """The op's numbers are then float64 for every level."""
    s, t = [draw((2, 5, 4, 6), torch.float32)], [draw((2, 5, 4, 6), torch.float32)]
    squares = l2_squares(s, t, [None], [None], True)
    torch.testing.assert_close(squares[0], (s[0] - t[0]).double().square().sum())
    (ds,) = l2_gradients(s, t, [None], [None], torch.tensor([0.75], dtype=torch.float64))
    torch.testing.assert_close(ds, 1.5 * (s[0] - t[0]))


def test_l2_of_nan():
    s, t = draw((2, 5, 4, 6), torch.float32), draw((2, 5, 4, 6), torch.float32)
    s[1, 2, 3, 4] = math.nan
    zero = torch.zeros(2, 4, 6)
    assert l2_squares([s, t], [t, s], [None, zero], [None, None], False).isnan().all()
    (ds,) = l2_gradients([s], [t], [zero], [None], torch.ones(1))
    assert ds.isnan().sum() == 1 and ds[1, 2, 3, 4].isnan()


def run_masks(students, teachers, temperature, joint, blocks=MANY_BLOCKS, **options):
    dtype = accumulation_of(*[x.dtype for x in [*students, *teachers] if x is not None])
    masks = [torch.empty(t.shape, dtype=dtype) for t in teachers]
    types = [
        [NUMBER[(t if x is None else x).dtype] for x, t in zip(maps, teachers, strict=True)]
        for maps in (students, teachers)
    ]
    lengths = [t[0].numel() for t in teachers]
    arguments = [*types, [len(t) for t in teachers], lengths, temperature, joint, masks, blocks]
    arguments = [len(masks), dtype == torch.float64, students, teachers, *arguments]
    build("attention_masks").run("masks", *arguments, outputs=masks, **options)
    return masks


def expected_mask(student, teacher, temperature, joint):
    rule = "joint" if joint else "average"
    return reference.attention_mask(student, teacher, temperature=temperature, mask_rule=rule)


def wide(x):
    return None if x is None else x.double()


# Each dtype beside itself, and on each side beside one other.
MIXTURES = list(itertools.product(DTYPES, repeat=2))
if not TEST_ALL:
    MIXTURES = [*zip(DTYPES, DTYPES, strict=True), *zip(DTYPES, DTYPES[1:] + DTYPES[:1], strict=True)]


@pytest.mark.parametrize("dtypes", MIXTURES, ids=name_of)
def test_masks_of_a_pyramid(dtypes):
    """Around a tile's 2048 elements, for the average, the joint and the teacher's own mask; alike alone."""
    sizes = [(2, 1), (3, 7), (2, 255), (1, 257), (2, 2047), (1, 2048), (2, 2049), (3, 67, 71)]
    for kind in ("average", "joint", "teacher"):
        students = [None if kind == "teacher" else torch.rand(size).to(dtypes[0]) for size in sizes]
        teachers = [torch.rand(size).to(dtypes[1]) for size in sizes]
        # Without a student the masks are in the teacher's accumulation dtype.
        dtype = dtypes[1] if kind == "teacher" else accumulation_of(*dtypes)
        temperature = [0.1 + 0.2 * i for i in range(len(sizes))]
        joint = [kind == "joint"] * len(sizes)
        masks = run_masks(students, teachers, temperature, joint, orders=(0, 2))
        for i, mask in enumerate(masks):
            eager = expected_mask(students[i], teachers[i], temperature[i], joint[i])
            truth = expected_mask(wide(students[i]), wide(teachers[i]), temperature[i], joint[i])
            assert mask.dtype == eager.dtype
            assert_as_good(mask, eager, truth, accumulation_of(dtype))
            alone = run_masks([students[i]], [teachers[i]], [temperature[i]], [joint[i]], blocks=1, orders=(1,))
            assert same_bits(alone, [mask])


def test_masks_of_many_levels_and_tiles():
    """Two launches, and more tiles of a row than a block has threads."""
    sizes = [(1, 257 * 2048 + 5)] + [(1, 3)] * 9
    students, teachers = [torch.rand(size) for size in sizes], [torch.rand(size) for size in sizes]
    masks = run_masks(students, teachers, [0.5] * 10, [i % 2 == 0 for i in range(10)], **ONE_ORDER)
    for i, mask in enumerate(masks):
        torch.testing.assert_close(mask, expected_mask(students[i], teachers[i], 0.5, i % 2 == 0))


@pytest.mark.parametrize("joint", [False, True])
def test_masks_of_large_activations(joint):
    s, t = 1e4 + 5 * torch.randn(2, 5000), -1e6 + torch.randn(2, 5000)
    (mask,) = run_masks([s], [t], [0.1], [joint])
    truth = expected_mask(s.double(), t.double(), 0.1, joint)
    torch.testing.assert_close(mask.double(), truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_masks_of_nan_and_infinity(dtype):
    s, t = torch.rand(8, 5000).to(dtype), torch.rand(8, 5000).to(dtype)
    t[0, 4999], s[1, 3], t[2, 2500], s[3, 17] = math.nan, math.nan, math.inf, -math.inf
    t[4, :2048] = -math.inf  # a whole tile
    s[5] = -math.inf
    t[6, :2048], t[6, 9] = -math.inf, math.nan
    for kind in ("average", "joint", "teacher"):
        student = None if kind == "teacher" else s
        (mask,) = run_masks([student], [t], [0.5], [kind == "joint"], orders=(0,))
        expected = expected_mask(student, t, 0.5, kind == "joint")
        torch.testing.assert_close(mask, expected, equal_nan=True)
        assert not mask[7].isnan().any() and mask[6].isnan().all() and mask[2].isnan().all()


def test_random_cases():
    """Of `make fuzz`, which calls these kernels through this file."""
    from random_cases import assert_random_cases_are_right

    with threads(1):  # the literal formula of small maps is fastest so
        assert_random_cases_are_right("cuda-source")
