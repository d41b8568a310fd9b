"""Pooled projections and covariances on every backend with kernels of them: values, winners, gradients, errors."""

import pytest
import torch
import torch.nn.functional as F
from helpers import rms
from op_cases import (
    DTYPES,
    INTERPRETED,
    NO_CPU,
    ON_CPU,
    ON_TRITON,
    accumulation_of,
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
    permuted,
    threads,
    truncation,
    with_pairs,
    with_values,
)

from fbkd_ops._layout import empty_gradient, in_place_layout
from fbkd_ops.non_local.parameters import BlockSettings
from fbkd_ops.non_local.pooling import pool_cells
from fbkd_ops.ops.non_local_statistics import StatisticsRequest, non_local_statistics
from fbkd_ops.reference import max_pool

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = [ON_CPU, INTERPRETED, ON_TRITON]
COMPILED = [ON_CPU, ON_TRITON]
ORDERS = ["single", "nested"]

# (N, C, r, p, H, W, stride); r of None: the covariance of x itself.
SMALL = [
    (1, 3, 2, 4, 1, 1, 4),  # one pixel, a stride larger than the map
    (2, 5, None, 3, 9, 7, 2),  # ragged edges
    (2, 1, 1, 2, 6, 13, 6),  # one channel; cells as high as the map
    (1, 17, 3, 5, 8, 8, 8),  # one cell
    (2, 6, 3, 33, 12, 10, 3),
    (2, 4, 2, 3, 5, 40, 16),  # wide cells that are no power of two high: (5, 16)
]
LARGE = [
    (2, 16, None, 8, 130, 90, 8),  # strips of several blocks
    (1, 70, None, 20, 31, 40, 5),  # a covariance in two halves
    (1, 300, 40, 20, 20, 31, 4),
    (3, 8, 3, 6, 65, 67, 16),  # winners one by one
    (40, 3, 2, 2, 4, 4, 2),  # more images than groups
    (1, 1500, None, 3, 6, 6, 2),  # so large that the product's own threads run it
    (1, 4, 2, 3, 3, 5000, 1000),  # rows longer than a block
]
# The interpreter takes 40 ms a row of cells and image.
FEW = [SMALL[0], (2, 5, None, 3, 5, 7, 2), SMALL[2]]
# What the interpreter needs more than one of: tiles of channels, of a row and of pixels, chunks of a cell, splits.
TILES = [
    (1, 66, None, 67, 1, 2, 1),  # a tile of the covariance below the diagonal; every pixel is a cell
    (1, 2, 1, 2, 2, 67, 3),  # 21 cells of three columns in a tile of 64, and one
    (1, 2, None, 2, 3, 134, 66),  # cells wider than a tile
    (1, 2, 1, 1, 35, 31, 40),  # 1085 pixels: two splits; a cell as large as the map
]
# Of 16-bit maps: rows of a cell that are 16, 8 and 4 bytes and none of these; more than a tile of each kind.
TILES_OF_16_BITS = [
    (1, 264, None, 136, 2, 48, 2),  # more channels than weights that stay, two tiles of pooled ones
    (2, 8, None, 130, 5, 52, 4),
    (1, 136, 3, 6, 6, 22, 2),
    (1, 16, None, 5, 7, 33, 3),
]


def draw_request(size, dtype=torch.float32, device="cpu", layout=contiguous, order="single"):
    """Leaves x, projection, weight and bias, and the cells."""
    n, channels, rank, pooled, height, width, stride = size
    wide = accumulation_of(dtype)
    x = layout(draw((n, channels, height, width), dtype, device))
    projection = None if rank is None else draw((rank, channels), wide, device)
    # In the map's dtype: the tensor cores' operands are rounded to it, and other values could win.
    weight, bias = draw((pooled, channels), dtype, device).to(wide), draw((pooled,), wide, device)
    return [x, projection, weight, bias], pool_cells(x, BlockSettings(stride=stride, pool_order=order))


def request_of(tensors, pool):
    x, projection, weight, bias = tensors
    mean = x.detach().to(accumulation_of(x.dtype)).mean((2, 3))
    return StatisticsRequest(x, mean, projection, weight, bias, pool)


def literal(tensors, stride, order, dtype):
    """Mean, covariance and pooled values in plain PyTorch in ``dtype``."""
    x, projection, weight, bias = (t if t is None else t.to(dtype) for t in tensors)
    vectors = x.flatten(2) if projection is None else projection @ x.flatten(2)
    centred = vectors - vectors.mean(2, keepdim=True)
    pooled = max_pool(F.conv2d(x, weight[:, :, None, None], bias), stride, order)
    return x.mean((2, 3)), centred @ centred.mT / vectors.shape[2], pooled.flatten(2)


def literal_run(tensors, stride, order, dtype, directions, incoming):
    """Those and their gradients, in the dtypes of the tensors."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    outputs = (*literal(leaves, stride, order, dtype), leaves[0].to(dtype))
    grads = [d.to(dtype) for d in (*directions, incoming)]
    wanted = [leaf for leaf in leaves if leaf is not None]
    return [*(x.detach() for x in outputs[:3]), *torch.autograd.grad(outputs, wanted, grads)]


def run(tensors, pool, backend, directions=None, incoming=None):
    """Outputs and gradients; ``incoming`` is what flows back into the returned map, None for nothing."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    (found,) = non_local_statistics(backend, [request_of(leaves, pool)])
    outputs = found.mean, found.covariance, found.pooled
    if directions is None:
        return [x.detach() for x in outputs]
    through = [] if incoming is None else [found.x]
    wanted = [leaf for leaf in leaves if leaf is not None]
    incoming = [] if incoming is None else [incoming.clone()]  # it is added to in place
    return [
        *(x.detach() for x in outputs),
        *torch.autograd.grad((*outputs, *through), wanted, [*directions, *incoming]),
    ]


def rounding_of(name, backend, device, dtype):
    """What outputs and gradients may be off besides, where Triton's tensor cores multiply what is rounded to 16 bits:
    the centred map for its covariance, which the projection's gradient is made of; matrices and pooled gradients beside
    a bfloat16 map."""
    rounded = {torch.bfloat16: ("covariance", "projection", "x", "weight"), torch.float16: ("covariance", "projection")}
    if backend != "triton" or name not in rounded.get(dtype, ()):
        return 0.0
    return torch.finfo(dtype).eps / 2 + truncation(backend, device, dtype)


def check(size, backend, dtype=torch.float32, device="cpu", layout=contiguous, order="single"):
    """No further from the truth than twice plain PyTorch in the accumulation dtype, on the RMS, plus a few eps."""
    tensors, pool = draw_request(size, dtype, device, layout, order)
    accumulation, stride = accumulation_of(dtype), size[-1]
    shapes = [x.shape for x in literal(tensors, stride, order, torch.float64)]
    directions = [torch.randn(shape, dtype=accumulation, device=device) for shape in shapes]
    incoming = draw(tensors[0].shape, dtype, device)
    ours = run(tensors, pool, backend, directions, incoming)
    eager = literal_run(tensors, stride, order, accumulation, directions, incoming)
    wide = [None if t is None else t.double() for t in tensors]
    exact = literal_run(wide, stride, order, torch.float64, directions, incoming)
    names = [name for name, t in zip(("x", "projection", "weight", "bias"), tensors, strict=True) if t is not None]
    for name, mine, theirs, truth in zip(("mean", "covariance", "pooled", *names), ours, eager, exact, strict=True):
        assert mine.shape == theirs.shape and mine.dtype == theirs.dtype
        eps = 16 * torch.finfo(accumulation).eps + rounding_of(name, backend, device, dtype)
        if mine.numel():
            assert rms(mine.double() - truth) <= 2 * rms(theirs.double() - truth) + eps * rms(truth), name
    assert ours[3].stride() == empty_gradient(in_place_layout(tensors[0])).stride()


@pytest.mark.parametrize(
    "backend, device, size, layout, order",
    [
        *with_pairs(COMPILED, SMALL, [contiguous, channels_last], ORDERS),
        *with_pairs([INTERPRETED], FEW, [contiguous, channels_last], ORDERS),
    ],
)
def test_small_sizes(backend, device, size, layout, order):
    check(size, backend, device=device, layout=layout, order=order)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_large_sizes(backend, device, layout):
    for size in LARGE:
        check(size, backend, device=device, layout=layout, order="nested")


@pytest.mark.parametrize("size, layout", list(zip(TILES, 2 * [contiguous, channels_last], strict=True)), ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_in_the_interpreter(backend, device, size, layout):
    check(size, backend, device=device, layout=layout, order="nested")


@pytest.mark.parametrize("gpu, dtype", [("default", torch.float16), ("90", torch.bfloat16)], ids=name_of)
@pytest.mark.parametrize("size", TILES_OF_16_BITS, ids=name_of)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_tiles_of_a_gpu_in_the_interpreter(backend, device, size, dtype, gpu, tiles_of):
    tiles_of(gpu)
    check(size, backend, dtype, device, order="nested")


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_every_dtype(backend, device, dtype):
    for size, layout in zip(FEW[:2] if backend == "triton" else SMALL[4:], (contiguous, channels_last), strict=True):
        check(size, backend, dtype, device, layout)


LAYOUTS = [channel_slice, channels_last_slice, batch_slice, permuted]


@pytest.mark.parametrize("backend, device, layout", with_values(BACKENDS, LAYOUTS, LAYOUTS[:2]))
def test_slices_and_copies(backend, device, layout):
    check((3, 5, None, 4, 6, 8, 2), backend, device=device, layout=layout)


@pytest.mark.parametrize(
    "backend, device, dtype, layout, order",
    with_pairs(BACKENDS, [torch.float32, torch.float64], [contiguous, channels_last], ORDERS),
)
def test_winners_are_those_of_max_pool(backend, device, dtype, layout, order):
    """Of equal values, of NaN among others and of cells full of NaN: integers, whose products are exact everywhere."""
    for (height, width), stride in (((8, 12), 4), ((7, 14), 6), ((5, 16), 8), ((4, 16), 8), ((16, 7), 8)):
        x = torch.randint(-1, 2, (3, 3, height, width), device=device).to(dtype)
        x[2] = 0.0
        x[2, :, 2, 0] = x[2, :, 0, 6] = 1.0  # where cells are 4 x 8, "nested" comes to the second one first
        x[0, :, 1, 2:4] = x[0, :, 3, 1] = x[1] = float("nan")
        x[1, 1:] = x[1, :1, :2] = 0.0
        x[0, 0, 0, 5] = -float("inf")
        weight = torch.tensor([[1, 0, 0], [1, -1, 0], [0, 0, 2], [0, 0, 0]], device=device).to(dtype)
        x, bias = layout(x), torch.zeros(4, dtype=dtype, device=device)
        full = F.conv2d(x, weight[:, :, None, None]).contiguous().requires_grad_()
        pooled = max_pool(full, stride, order)
        pooled.sum().backward()
        pool = pool_cells(x, BlockSettings(stride=stride, pool_order=order))
        outputs = op_of("non_local_statistics_forward", backend)([x], [None], [None], [weight], [bias], list(pool))
        assert torch.equal(outputs[0].nan_to_num(7), pooled.detach().flatten(2).nan_to_num(7))
        won = torch.zeros(3, 4, height * width, dtype=dtype, device=device).scatter_(2, outputs[1].long(), 1)
        assert torch.equal(won, full.grad.flatten(2))


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_winners_in_the_last_columns_of_wide_cells(backend, device, layout):
    """A tile takes the columns of a cell that is wider than itself one part after the other."""
    x = layout(torch.arange(300.0, device=device).expand(1, 2, 2, 300).contiguous())
    pool = pool_cells(x, BlockSettings(stride=150, pool_order="single"))
    weight, bias = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], device=device), torch.zeros(2, device=device)
    outputs = op_of("non_local_statistics_forward", backend)([x], [None], [None], [weight], [bias], list(pool))
    assert outputs[0].tolist() == [[[149.0, 299.0], [0.0, -150.0]]]
    assert outputs[1].tolist() == [[[149, 299], [0, 150]]]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_differences_that_float16_does_not_hold(backend, device):
    x = torch.full((1, 2, 8, 8), -65504.0, dtype=torch.float16, device=device)
    x[0, 0, 3, 4] = x[0, 1, 5, 6] = 65504.0
    mean = x.float().mean((2, 3))
    (_, _, covariance) = op_of("non_local_statistics_forward", backend)([x], [mean], [None], [None], [None], [0] * 4)
    centred = x.double().flatten(2) - x.double().mean((2, 3))[:, :, None]
    torch.testing.assert_close(covariance.double(), centred @ centred.mT / 64, rtol=2e-3, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_winner_is_rounding_away_from_the_best(backend, device, dtype):
    """And the pooled value is the winner's own, with a weight that 16 bits do not hold."""
    tensors, pool = draw_request((2, 7, None, 5, 9, 14, 3), dtype, device)
    x, _, weight, bias = tensors
    weight += 1e-3 * torch.randn_like(weight)
    (pooled, winners, _) = op_of("non_local_statistics_forward", backend)(
        [x], [None], [None], [weight], [bias], list(pool)
    )
    full = F.conv2d(x.double(), weight.double()[:, :, None, None], bias.double())
    best = max_pool(full, 3).flatten(2)
    eps = torch.finfo(dtype if backend == "triton" and dtype.itemsize == 2 else accumulation_of(dtype)).eps
    sizes = (x.abs().double().amax(), weight.abs().sum(1).double().amax())
    atol = 4 * eps * float(sizes[0] * sizes[1])
    torch.testing.assert_close(full.flatten(2).gather(2, winners.long()), best, rtol=0, atol=atol)
    torch.testing.assert_close(pooled.double(), best, rtol=0, atol=atol)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_cells_without_a_finite_value(backend, device):
    """Of nothing but minus infinity the first pixel wins, as in PyTorch; a NaN beside it wins."""
    x = torch.full((1, 1, 4, 6), -float("inf"), device=device)
    x[0, 0, 1, 4] = x[0, 0, 3, 5] = float("nan")
    one = torch.ones(1, 1, device=device)
    outputs = op_of("non_local_statistics_forward", backend)([x], [None], [None], [one], [0 * one[0]], [2, 2, 1, 2])
    assert outputs[1].flatten().tolist() == [0, 2, 10, 12, 14, 23]
    assert outputs[0].isnan().flatten().tolist() == [False, False, True, False, False, True]


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_each_part_alone(backend, device):
    """Without covariance, without pooling, without an incoming gradient, for a map or parameters that want none."""
    tensors, pool = draw_request((2, 5, 3, 4, 5, 8, 2), torch.float64, device)
    directions = [torch.randn_like(x) for x in run(tensors, pool, backend)]
    together = run(tensors, pool, backend, directions)
    x, projection, weight, bias = tensors
    leaves = [t.detach().requires_grad_() for t in tensors]
    (pooling,) = non_local_statistics(backend, [StatisticsRequest(leaves[0], None, None, *leaves[2:], pool)])
    assert pooling.mean is None and pooling.covariance is None
    (unused,) = non_local_statistics(backend, [StatisticsRequest(leaves[0], None, *leaves[1:], pool)])
    assert torch.equal(unused.pooled, pooling.pooled) and unused.covariance is None
    (moments,) = non_local_statistics(backend, [request_of([*leaves[:2], None, None], (0, 0, 0, 0))])
    assert moments.pooled is None
    apart = [
        torch.autograd.grad(pooling.pooled, [leaves[0], *leaves[2:]], directions[2]),
        torch.autograd.grad((moments.mean, moments.covariance), leaves[:2], directions[:2]),
    ]
    expected = dict(zip(("x", "projection", "weight", "bias"), together[3:], strict=True))
    torch.testing.assert_close(apart[0][0] + apart[1][0], expected["x"], rtol=1e-11, atol=1e-11)
    for name, gradient in (("weight", apart[0][1]), ("bias", apart[0][2]), ("projection", apart[1][1])):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11)

    (found,) = non_local_statistics(backend, [request_of([x, *leaves[1:]], pool)])
    assert found.x is x  # so that nobody makes a gradient for it
    frozen = torch.autograd.grad((found.covariance, found.pooled), leaves[1:], directions[1:])
    for name, gradient in zip(("projection", "weight", "bias"), frozen, strict=True):
        torch.testing.assert_close(gradient, expected[name], rtol=1e-11, atol=1e-11)
    (found,) = non_local_statistics(backend, [request_of([leaves[0], projection, weight, bias], pool)])
    (dx,) = torch.autograd.grad((found.mean, found.covariance, found.pooled), leaves[:1], directions)
    torch.testing.assert_close(dx, expected["x"], rtol=1e-11, atol=1e-11)
    (found,) = non_local_statistics(backend, [request_of(leaves, pool)])
    (dx,) = torch.autograd.grad(found.x, leaves[:1], torch.ones_like(x))
    assert torch.equal(dx, torch.ones_like(x))


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_a_large_mean_costs_no_digits(backend, device, rank, layout):
    x = layout(1000 + torch.randn(1, 4, 16, 17, device=device))
    projection = None if rank is None else torch.eye(4, device=device)[:rank]
    (found,) = non_local_statistics(backend, [StatisticsRequest(x, x.double().mean((2, 3)).float(), projection)])
    truth = torch.cov(x[0].double().flatten(1), correction=0)[:rank, :rank]
    # What remains is the mean's own rounding, eps * 1000, squared.
    torch.testing.assert_close(found.covariance[0].double(), truth, rtol=0, atol=2e-6 * 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_the_covariance_of_a_constant_map_gives_it_no_gradient(backend, device, rank, dtype):
    """What multiplies x and what multiplies its mean is rounded to one value, or to none."""
    (x, projection, _, _), _ = draw_request((2, 4, rank, 1, 3, 5, 1), dtype, device)
    x = x[:, :, :1, :1].expand_as(x).contiguous().requires_grad_()
    (found,) = non_local_statistics(backend, [request_of([x, projection, None, None], (0, 0, 0, 0))])
    (dx,) = torch.autograd.grad(found.covariance, x, torch.randn_like(found.covariance))
    assert dx.abs().max() <= 64 * torch.finfo(accumulation_of(dtype)).eps


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_empty_batch(backend, device):
    tensors, pool = draw_request((0, 3, 2, 4, 6, 6, 2), device=device)
    shapes = [(0, 3), (0, 2, 2), (0, 4, 9)]
    results = run(tensors, pool, backend, [torch.zeros(shape, device=device) for shape in shapes])
    assert [x.shape for x in results[:3]] == [torch.Size(shape) for shape in shapes]
    assert all(torch.equal(x, torch.zeros_like(x)) for x in results[3:])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_levels_together_equal_levels_alone(backend, device):
    sizes = [FEW[1], (0, 3, 2, 4, 6, 6, 2), (1, 70, 3, 5, 8, 17, 8)]
    # The last level has more pixels than a tile of the first one's dtype.
    kinds = [(torch.float64, contiguous), (torch.bfloat16, channels_last), (torch.float32, channels_last)]
    levels = [draw_request(size, dtype, device, layout) for size, (dtype, layout) in zip(sizes, kinds, strict=True)]
    leaves = [[t if t is None else t.detach().requires_grad_() for t in tensors] for tensors, _ in levels]
    requests = [request_of(tensors, pool) for tensors, (_, pool) in zip(leaves, levels, strict=True)]
    for request, together, own in zip(requests, non_local_statistics(backend, requests), leaves, strict=True):
        (alone,) = non_local_statistics(backend, [request])
        assert_same_bits(together[1:], alone[1:])
        wanted = [leaf for leaf in own if leaf is not None]
        directions = [torch.ones_like(x) for x in together[1:]]
        assert_same_bits(
            torch.autograd.grad(together[1:], wanted, directions, retain_graph=True),
            torch.autograd.grad(alone[1:], wanted, directions),
        )


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", COMPILED)
def test_repeats_are_bit_equal(backend, device, layout):
    for size in (LARGE[0], LARGE[3]):
        tensors, pool = draw_request(size, torch.float32, device, layout)
        directions = [torch.randn_like(x) for x in run(tensors, pool, backend)]
        first = run(tensors, pool, backend, directions)
        assert_same_bits(first, run(tensors, pool, backend, directions))


@NO_CPU
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_bit_equal_for_any_number_of_threads(layout):
    for size in (*LARGE[:4], (1, 256, 64, 128, 40, 41, 16)):
        tensors, pool = draw_request(size, torch.float32, layout=layout)
        directions = [torch.randn_like(x) for x in run(tensors, pool, "cpu")]
        results = []
        for count in (1, 2, 3):
            with threads(count):
                # Without the small product of the covariance itself, which runs on torch's threads.
                results.append(run(tensors, pool, "cpu", [directions[0], 0 * directions[1], directions[2]]))
        for other in results[1:]:
            assert_same_bits(results[0][2:], other[2:])


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_autocast_changes_nothing(backend, device):
    tensors, pool = draw_request((2, 5, 3, 4, 6, 8, 2), device=device)
    directions = [torch.randn_like(x) for x in run(tensors, pool, backend)]
    expected = run(tensors, pool, backend, directions)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same_bits(expected, run(tensors, pool, backend, directions))


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradients_of_any_layout(backend, device):
    tensors, pool = draw_request((2, 5, 3, 4, 6, 8, 2), device=device)
    directions = [torch.randn_like(x) for x in run(tensors, pool, backend)]
    incoming = torch.randn_like(tensors[0])
    turned = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in directions]
    expected = run(tensors, pool, backend, directions, incoming)
    assert_same_bits(expected, run(tensors, pool, backend, turned, permuted(incoming)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_gradients_beyond_half_precision(backend, device, dtype):
    """Those of the pooled values are no numbers of 16 bits, however small or large they are."""
    (x, _, weight, bias), pool = draw_request((1, 4, None, 3, 4, 6, 2), dtype, device)
    directions = [torch.randn_like(x) for x in run([x, None, weight, bias], pool, backend)]
    directions[:2] = [0 * direction for direction in directions[:2]]
    dx, dweight = run([x, None, weight, bias], pool, backend, directions)[3:5]
    for scale, by_weight in ((2.0**-40, 1), (2.0**40, 1), (2.0**20, 2.0**-10)):
        tensors = [x, None, by_weight * weight, by_weight * bias]
        scaled = run(tensors, pool, backend, [scale * direction for direction in directions])
        torch.testing.assert_close(scaled[4] / scale, dweight)
        if by_weight != 1:
            torch.testing.assert_close(scaled[3] / (scale * by_weight), dx, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("backend, device", [ON_CPU, INTERPRETED])
def test_offsets_beyond_32_bits(backend, device, layout):
    tensors, pool = draw_request((2, 3, 2, 4, 5, 6, 2), torch.bfloat16, layout=layout)
    directions = [torch.randn_like(x) for x in run(tensors, pool, backend)]
    near = run(tensors, pool, backend, directions)
    assert_same_bits(near, run([far_apart(tensors[0], layout), *tensors[1:]], pool, backend, directions))


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("backend, device, layout", with_values(BACKENDS, [contiguous, channels_last], [channels_last]))
def test_gradcheck(backend, device, layout, rank):
    tensors, pool = draw_request((2, 3, rank, 2, 2, 5, 2), torch.float64, device, layout)
    leaves = [t.requires_grad_() for t in tensors if t is not None]

    def outputs(*_):
        (found,) = non_local_statistics(backend, [request_of(tensors, pool)])
        return (found.x.square().sum(), *found[1:])

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=backend == "triton")


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_second_derivative_raises(backend, device):
    tensors, pool = draw_request(SMALL[1], device=device)
    x = tensors[0].requires_grad_()
    (found,) = non_local_statistics(backend, [request_of(tensors, pool)])
    (gradient,) = torch.autograd.grad(found.covariance.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend, device, compiler", with_values(BACKENDS, ["inductor"], ["aot_eager"]))
def test_compiles_into_one_graph_for_any_size(backend, device, compiler):
    sizes = [(2, 5, 2, 3, *size, 2) for size in ((6, 8), (5, 9), (7, 12))]
    inputs = [[t.requires_grad_() for t in draw_request(size, device=device)[0]] for size in sizes]

    def total(*tensors):
        (found,) = non_local_statistics(backend, [request_of(tensors, (2, 2, 2, 2))])
        return (3 * found.x).sum() + found.mean.sum() + found.covariance.square().sum() + found.pooled.square().sum()

    assert_compiled_agrees(total, inputs, backend, compiler)


@pytest.mark.parametrize("backend, device", BACKENDS)
def test_opcheck(backend, device):
    torch.use_deterministic_algorithms(False)
    tests = ("test_schema", "test_faketensor")
    for size, layout in ((FEW[1], contiguous), ((1, 6, 2, 33, 6, 10, 3), channels_last)):
        tensors, pool = draw_request(size, device=device, layout=layout)
        request = request_of(tensors, pool)
        columns = [[tensor] for tensor in request[:5]]
        forward = op_of("non_local_statistics_forward", backend)
        torch.library.opcheck(forward, (*columns, list(pool)), test_utils=tests)
        torch.library.opcheck(forward, ([request.x], [None], *columns[2:], list(pool)), test_utils=tests)
        pooled, winners, cross = forward(*columns, list(pool))
        arguments = (
            [torch.randn_like(request.x)],
            [torch.empty_like(request.weight)],
            [request.x],
            [request.mean],
            [request.projection],
            [torch.randn_like(cross)],
            [torch.randn_like(request.mean)],
            [request.weight],
            [winners],
            [torch.randn_like(pooled)],
            list(pool),
        )
        torch.library.opcheck(op_of("non_local_statistics_backward_", backend), arguments, test_utils=tests)


@NO_CPU
@pytest.mark.parametrize(
    "position, change, message",
    [
        (1, lambda mean: mean[:1], "mean must be contiguous with 10 elements, got 5"),
        (2, lambda projection: projection[0], "projection must have 2 dimensions"),
        (3, lambda weight: weight.double(), "weight must be float32 unless the features are float64"),
        (4, lambda bias: bias[1:], "bias must be contiguous with 3 elements, got 2"),
    ],
)
def test_bad_arguments_of_the_op(position, change, message):
    tensors, pool = draw_request((2, 5, 2, 3, 9, 7, 2))
    columns = [[tensor] for tensor in request_of(tensors, pool)[:5]]
    columns[position] = [change(columns[position][0])]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fbkd_ops.non_local_statistics_forward(*columns, list(pool))


@NO_CPU
@pytest.mark.parametrize("pool", [(0, 2, 1, 1), (2, 8, 1, 1), (4, 4, 3, 1)])
def test_bad_cells(pool):
    tensors, _ = draw_request((2, 5, 2, 3, 9, 7, 2))
    columns = [[tensor] for tensor in request_of(tensors, pool)[:5]]
    with pytest.raises(RuntimeError, match="pool must fit the map"):
        torch.ops.fbkd_ops.non_local_statistics_forward(*columns, list(pool))
