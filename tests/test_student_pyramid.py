"""What flows back to a student's level in one write: distances, means and other losses, and FBKDLoss that uses it."""

import copy

import pytest
import torch
from helpers import randomise
from op_cases import (
    INTERPRETED,
    NO_CPU,
    ON_CPU,
    ON_TRITON,
    PAIRS_OF_LAYOUTS,
    accumulation_of,
    assert_as_good,
    assert_same_bits,
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    name_of,
    permuted,
    spatial_slice,
    truncation,
    with_values,
)

import fbkd_ops
from benchmarks.passes import writes
from fbkd_ops import AttentionPool, FBKDLoss, reference
from fbkd_ops.dispatch import attention_pools
from fbkd_ops.non_local import relation
from fbkd_ops.ops.adapted_masked_l2 import AdaptedLevels, student_pyramid
from fbkd_ops.presets import PRESETS, TERMS

pytestmark = pytest.mark.usefixtures("poison")

BACKENDS = [ON_CPU, INTERPRETED, ON_TRITON]
FIELDS = AttentionPool._fields
# Where gradients come from: the sums of squares, any of the four means, the returned student.
SOURCES = ("squares", *FIELDS, "student")


class Pyramid:
    """Random levels, and random weights of everything that a gradient can come from."""

    def __init__(self, of_levels, device="cpu"):
        self.levels = [self.level(*each, device) for each in of_levels]

    def level(self, dtypes, layouts, size, device):
        n, from_channels, to_channels, height, width = size
        wide = accumulation_of(*dtypes)
        level = dict(
            student=layouts[0](draw((n, from_channels, height, width), dtypes[0], device)),
            weight=draw((to_channels, from_channels), wide, device),
            bias=draw((to_channels,), wide, device),
            teacher=layouts[1](draw((n, to_channels, height, width), dtypes[1], device)),
            spatial=torch.rand(n, height, width, device=device).to(wide),
            channel=torch.rand(n, to_channels, device=device).to(wide),
        )
        spatial, channel = (n, height, width), (n, from_channels)
        shapes = dict(zip(SOURCES, ((), spatial, channel, spatial, channel, level["student"].shape), strict=True))
        # Powers of two reach every dtype as they are.
        return level, {name: 2.0 ** torch.randint(-3, 3, size, device=device) for name, size in shapes.items()}

    def run(self, backend, sources=SOURCES, dtype=None):
        """Gradients of student, weight and bias of every level; backend "reference" is plain autograd."""
        levels = [{k: v if dtype is None else v.to(dtype) for k, v in level.items()} for level, _ in self.levels]
        leaves = [[level[k].detach().requires_grad_() for k in ("student", "weight", "bias")] for level in levels]
        groups = [
            list(group)
            for group in zip(
                *([*x, *list(level.values())[3:]] for x, level in zip(leaves, levels, strict=True)), strict=True
            )
        ]
        squares, pools, students = (plain if backend == "reference" else fused)(backend, AdaptedLevels(*groups))
        total = 0.0
        for index, (_, weights) in enumerate(self.levels):
            values = (squares[index], *pools[index], students[index])
            for name, value in zip(SOURCES, values, strict=True):
                if name in sources:
                    total = total + (weights[name].to(value.dtype) * value).sum().double()
        return torch.autograd.grad(total, [leaf for level in leaves for leaf in level], allow_unused=True)


def fused(backend, levels):
    with torch.no_grad(), fbkd_ops.use_backend(backend):
        pools = attention_pools(levels.students)
    return student_pyramid(backend, levels, pools)


def plain(_, levels):
    squares = [reference.adapted_masked_l2_loss(*level) ** 2 for level in zip(*levels, strict=True)]
    return squares, [reference.attention_pool(x) for x in levels.students], levels.students


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
SIZES = [(2, 5, 4, 9, 8), (1, 6, 7, 3, 4), (3, 1, 2, 1, 1), (0, 3, 2, 4, 4)]


def levels_of(dtypes, sizes=SIZES):
    return [(dtypes, PAIRS_OF_LAYOUTS[index % 4], size) for index, size in enumerate(sizes)]


@pytest.mark.parametrize(
    "sources",
    [
        SOURCES,
        *[(source,) for source in SOURCES],
        FIELDS,
        ("squares", "spatial_mean"),
        ("channel_attention", "student"),
    ],
    ids="+".join,
)
@pytest.mark.parametrize("dtypes", [(F64, F64), (F64, F32)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS[::2])
def test_equals_plain_autograd_in_float64(backend, device, dtypes, sources):
    pyramid = Pyramid(levels_of(dtypes), device)
    for ours, expected in zip(pyramid.run(backend, sources), pyramid.run("reference", sources, F64), strict=True):
        assert (ours is None) == (expected is None)
        if ours is None:
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("sources", [SOURCES, FIELDS], ids="+".join)
@pytest.mark.parametrize("backend, device", [INTERPRETED])
def test_equals_plain_autograd_in_the_interpreter(backend, device, sources):
    pyramid = Pyramid([((F64, F64), PAIRS_OF_LAYOUTS[2], (1, 6, 7, 3, 4)), *levels_of((F64, F64), SIZES[2:])], device)
    for ours, expected in zip(pyramid.run(backend, sources), pyramid.run("reference", sources, F64), strict=True):
        assert (ours is None) == (expected is None)
        if ours is None:
            continue
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


MIXTURES = [(F32, F32), (BF16, F32), (F16, BF16), (F32, F64), (BF16, F64)]


@pytest.mark.parametrize("backend, device, dtypes", with_values(BACKENDS, MIXTURES, [(F32, F32), (BF16, F64)]))
def test_is_as_exact_as_plain_autograd(backend, device, dtypes):
    """Every part of a student's gradient is rounded to its dtype once, with the rest of the gradient."""
    pyramid = Pyramid(levels_of(dtypes, SIZES[1:3] if backend == "triton" else [*SIZES, (1, 40, 30, 33, 40)]), device)
    accumulation = accumulation_of(*dtypes)
    exact = pyramid.run("reference", dtype=F64)
    for ours, eager, truth in zip(pyramid.run(backend), pyramid.run("reference"), exact, strict=True):
        extra = 4 * torch.finfo(accumulation).eps + truncation(backend, device, ours.dtype)
        units = 400 if accumulation == F64 else 40  # in float64 the exact result is eager's
        assert_as_good(ours, eager, truth, extra, accumulation, units)


@pytest.mark.parametrize(
    "layout", [channel_slice, channels_last_slice, batch_slice, spatial_slice, permuted], ids=name_of
)
@pytest.mark.parametrize("dtypes", [(F64, F64), (F64, F32)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS[::2])
def test_layouts(backend, device, layout, dtypes):
    pyramid = Pyramid([(dtypes, (layout, contiguous), (3, 5, 4, 6, 7))], device)
    for ours, expected in zip(pyramid.run(backend), pyramid.run("reference", dtype=F64), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-10)


@NO_CPU
def test_levels_of_different_precision():
    """A float64 level makes the list's squares float64, not the other levels' gradients."""
    pyramid = Pyramid([((F32, F32), PAIRS_OF_LAYOUTS[0], SIZES[0]), ((F64, BF16), PAIRS_OF_LAYOUTS[2], SIZES[1])])
    exact = pyramid.run("reference", dtype=F64)
    ours = pyramid.run("cpu")
    assert [x.dtype for x in ours] == [F32] * 3 + [F64] * 3
    for mine, truth in zip(ours, exact, strict=True):
        eps = torch.finfo(mine.dtype).eps
        torch.testing.assert_close(mine.double(), truth, rtol=100 * eps, atol=100 * eps * truth.abs().max().item())


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_outputs_are_what_went_in(backend, device, dtypes):
    pyramid = Pyramid(levels_of(dtypes, SIZES[:2]), device)
    groups = [list(group) for group in zip(*(level.values() for level, _ in pyramid.levels), strict=True)]
    groups[0] = [x.requires_grad_() for x in groups[0]]
    with torch.no_grad(), fbkd_ops.use_backend(backend):
        means = attention_pools(groups[0])
    squares, pools, students = student_pyramid(backend, AdaptedLevels(*groups), means)
    assert squares.shape == (2,) and squares.dtype == F32
    for given, returned in ((groups[0], students), *zip(means, pools, strict=True)):
        assert_same_bits(given, returned)
        assert all(x.requires_grad and x.data_ptr() == y.data_ptr() for x, y in zip(returned, given, strict=True))


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32)], ids=name_of)
@pytest.mark.parametrize("backend, device", BACKENDS)
def test_backward_again(backend, device, dtypes):
    """Gradients that differ from pass to pass each meet the distance's whole gradient once."""
    pyramid = Pyramid(levels_of(dtypes, SIZES[:1]), device)
    level, weights = pyramid.levels[0]
    leaf = level["student"].detach().requires_grad_()
    groups = [[leaf], *([value] for value in list(level.values())[1:])]
    with torch.no_grad(), fbkd_ops.use_backend(backend):
        means = attention_pools([leaf])
    squares, (pool,), (student,) = student_pyramid(backend, AdaptedLevels(*groups), means)
    dense = (weights["student"].to(student.dtype) * student).sum()
    from_means = pool.spatial_attention.sum() + pool.channel_mean.sin().sum()
    totals = [squares[0], squares[0] + from_means, dense, squares[0] + from_means + dense]
    once = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in totals]
    kept = [x.clone() for x in once]
    for x in once[::2]:
        x.fill_(float("nan"))
    again = [torch.autograd.grad(total, leaf, retain_graph=True)[0] for total in totals]
    assert_same_bits(once[1::2], kept[1::2])
    tolerance = dict(rtol=1e-5, atol=1e-5) if dtypes[0] == F32 else dict(rtol=5e-2, atol=5e-2)
    for first, second in zip(kept, again, strict=True):
        torch.testing.assert_close(first, second, **tolerance)
    torch.testing.assert_close(kept[3], kept[1] + kept[2], **tolerance)
    assert not torch.equal(kept[0], kept[1]) and not torch.equal(kept[1], kept[3])


@NO_CPU
def test_a_distance_that_is_not_used_adds_nothing():
    """Not even where it overflowed: 0 times infinity would be NaN."""
    level, _ = Pyramid(levels_of((F32, F32), SIZES[:1])).levels[0]
    level["teacher"] = torch.full_like(level["teacher"], 1e30)
    level["weight"] = torch.full_like(level["weight"], 1e30)
    leaf = level["student"].requires_grad_()
    groups = [[value] for value in level.values()]
    with torch.no_grad():
        means = attention_pools([leaf])
    _, (pool,), (student,) = student_pyramid("cpu", AdaptedLevels(*groups), means)
    of_mean, of_student, share = pool.spatial_mean.sum(), 3 * student.sum(), 1 / leaf.shape[1]
    for total, expected in ((of_mean, share), (of_student, 3.0), (of_mean + of_student, 3.0 + share)):
        (gradient,) = torch.autograd.grad(total, leaf, retain_graph=True)
        torch.testing.assert_close(gradient, torch.full_like(gradient, expected))


# FBKDLoss, of which the other terms start from the op's outputs. test_loss.py compares every preset and override with
# the reference in float64.

WIDTHS, MAPS = ([6, 8, 5, 4], [7, 8, 9, 4]), [(17, 20), (9, 10), (3, 3), (1, 1)]
OURS = dict(relation_weight=0)  # the relation term has its own tests


def features(widths, dtype, layout=contiguous):
    return [layout(torch.randn(2, width, *size).to(dtype)) for width, size in zip(widths, MAPS, strict=True)]


def loss_of(preset, **overrides):
    weights = {f"{term}_weight": 1.0 for term in TERMS} | overrides
    return randomise(FBKDLoss(*WIDTHS, preset=preset, num_levels=4, norm="none", **weights))


def run_loss(loss, students, teachers, backend="auto"):
    """Terms, gradients of the students and of the parameters."""
    leaves = [x.detach().requires_grad_() for x in students]
    with fbkd_ops.use_backend(backend):
        terms = loss(leaves, teachers)
    grads = torch.autograd.grad(sum(terms.values()), [*leaves, *loss.parameters()])
    return [x.detach() for x in terms.values()], grads[: len(leaves)], grads[len(leaves) :]


@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F32, BF16), (F16, F16)], ids=name_of)
@pytest.mark.parametrize("preset", PRESETS)
def test_a_loss_is_as_exact_as_plain_autograd(preset, dtypes, layout):
    loss = loss_of(preset, **OURS)
    students, teachers = (features(width, dtype, layout) for width, dtype in zip(WIDTHS, dtypes, strict=True))
    wide = [[x.double() for x in side] for side in (students, teachers)]
    exact = run_loss(copy.deepcopy(loss).double(), *wide, "reference")
    results = (run_loss(loss, students, teachers, backend) for backend in ("auto", "reference"))
    for group in zip(*results, exact, strict=True):
        for ours, eager, truth in zip(*group, strict=True):
            # The masks' e^(x / tau), with tau down to 0.1, have the relative errors of x / tau.
            assert_as_good(ours, eager, truth.double(), 32 * torch.finfo(F32).eps, F32, units=40)


@pytest.mark.parametrize("preset", PRESETS)
def test_levels_with_and_without_a_feature_term(preset):
    """In float64; the levels without take their means on their own."""
    students, teachers = (features(width, F64) for width in WIDTHS)
    for weights in ([0.0, 1.0, 0.0, 2.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]):
        loss = loss_of(preset, feature_weight=weights).double()
        ours, literal = (run_loss(loss, students, teachers, backend) for backend in ("auto", "reference"))
        torch.testing.assert_close(ours, literal, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=name_of)
@pytest.mark.parametrize("preset", PRESETS)
def test_levels_together_equal_losses_of_one_level(preset, dtype):
    """Bit for bit."""
    loss = loss_of(preset, **OURS)
    students, teachers = (features(width, F32 if width is WIDTHS[1] else dtype) for width in WIDTHS)
    terms, grads, _ = run_loss(loss, students, teachers)
    totals = [torch.zeros(()) for _ in terms]
    for index, level in enumerate(loss.levels):
        single = FBKDLoss(WIDTHS[0][index], WIDTHS[1][index], num_levels=1, preset=preset)
        single.levels[0] = level
        alone = run_loss(single, students[index : index + 1], teachers[index : index + 1])
        totals = [total + value for total, value in zip(totals, alone[0], strict=True)]
        assert_same_bits([grads[index]], alone[1])
    assert_same_bits(terms, totals)


@pytest.mark.parametrize("preset", ["two_stage", "paper"])
def test_a_loss_backward_again(preset):
    loss = loss_of(preset)
    students, teachers = (features(width, F32) for width in WIDTHS)
    leaves = [x.requires_grad_() for x in students]
    wanted = [*leaves, *loss.parameters()]
    total = sum(loss(leaves, teachers).values())
    first = torch.autograd.grad(total, wanted, retain_graph=True)
    kept = [x.clone() for x in first]
    for gradient in first:
        gradient.zero_()
    second = torch.autograd.grad(total, wanted)
    for one, two in zip(kept, second, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5 * one.abs().max().item())


def test_terms_one_by_one_add_up():
    """Each term's own backward pass, one graph: what the feature term kept is used up by the first."""
    loss = loss_of("paper").double()
    students, teachers = (features(width, F64) for width in WIDTHS)
    leaves = [x.requires_grad_() for x in students]
    terms = loss(leaves, teachers)
    expected = torch.autograd.grad(sum(terms.values()), leaves, retain_graph=True)
    for order in (1, -1):
        parts = [torch.autograd.grad(term, leaves, retain_graph=True) for term in list(terms.values())[::order]]
        for gradient, of_terms in zip(expected, zip(*parts, strict=True), strict=True):
            torch.testing.assert_close(sum(of_terms), gradient, rtol=1e-10, atol=1e-10)


def test_two_losses_and_another_use_of_the_students():
    """The same students in two losses and in a term of the user's own, with hooks, in any order."""
    losses = [loss_of("paper").double(), loss_of("one_stage").double()]
    students, teachers = (features(width, F64) for width in WIDTHS)

    def total(backend, order):
        leaves = [x.detach().requires_grad_() for x in students]
        seen = []
        inner = [leaf * 1.5 for leaf in leaves]
        for x in inner:
            x.register_hook(lambda grad: seen.append(grad.clone()))
        with fbkd_ops.use_backend(backend):
            parts = [lambda: sum(loss(inner, teachers).values()) for loss in losses[:1]]
            parts += [lambda: sum(losses[1](inner, teachers).values()), lambda: sum(x.sin().sum() for x in inner)]
            sum(part() for part in parts[::order]).backward()
        assert len(seen) == len(leaves)
        return [leaf.grad for leaf in leaves]

    expected = total("reference", 1)
    for order in (1, -1):
        for ours, theirs in zip(total("auto", order), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_gradients_accumulate_over_steps():
    loss = loss_of("paper").double()
    students, teachers = (features(width, F64) for width in WIDTHS)
    leaves = [x.requires_grad_() for x in students]
    sum(loss(leaves, teachers).values()).backward()
    once = [x.grad.clone() for x in (*leaves, *loss.parameters())]
    sum(loss(leaves, teachers).values()).backward()
    for leaf, gradient in zip((*leaves, *loss.parameters()), once, strict=True):
        torch.testing.assert_close(leaf.grad, 2 * gradient, rtol=1e-12, atol=1e-12)


def test_students_without_gradient():
    """A frozen student: the parameters' gradients are the same, and the student gets none."""
    loss = loss_of("paper").double()
    students, teachers = (features(width, F64) for width in WIDTHS)
    expected = run_loss(loss, students, teachers)[2]
    frozen = torch.autograd.grad(sum(loss(students, teachers).values()), list(loss.parameters()))
    torch.testing.assert_close(frozen, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert not any(term.requires_grad for term in loss(students, teachers).values())


def test_a_student_of_which_one_level_is_frozen():
    loss = loss_of("paper").double()
    students, teachers = (features(width, F64) for width in WIDTHS)
    expected = run_loss(loss, students, teachers)[1]
    leaves = [x.detach().requires_grad_(index != 1) for index, x in enumerate(students)]
    sum(loss(leaves, teachers).values()).backward()
    assert leaves[1].grad is None
    for index in (0, 2, 3):
        torch.testing.assert_close(leaves[index].grad, expected[index], rtol=1e-10, atol=1e-10)


@NO_CPU
@pytest.mark.parametrize(
    "terms, form, forward, backward",
    [
        (TERMS, "cells", 2, 2),
        (TERMS, "collapsed", 2, 3),
        (("feature", "channel", "spatial"), "none", 1, 1),
    ],
    ids=["cells", "collapsed", "no relation"],
)
def test_how_often_a_gradient_of_the_students_size_is_written(monkeypatch, terms, form, forward, backward):
    """By the forward pass once for the relation and once for the other terms together; then in place.

    The relation's is scaled, in the collapsed form the statistics' gradients join it, and with it the other terms' is
    finished.
    """
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: form)
    ours, literal = writes("auto", terms), writes("reference", terms)
    assert (len(ours["forward"]), len(ours["backward"])) == (forward, backward), ours
    assert len(literal["backward"]) > forward + backward
