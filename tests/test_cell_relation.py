"""The cell form of the relation term on the CPU: values, gradients, winners, moments, memory, compilation, errors."""

import copy
import itertools

import pytest
import torch
from helpers import randomise, rms
from op_cases import (
    DTYPES,
    NO_CPU,
    PAIRS_OF_LAYOUTS,
    accumulation_of,
    assert_compiled_agrees,
    assert_same_bits,
    batch_slice,
    channel_slice,
    channels_last,
    channels_last_slice,
    contiguous,
    draw,
    name_of,
    op_of,
    permuted,
    threads,
)

import fbkd_ops
from fbkd_ops import NonLocalBlock2d, functional, reference
from fbkd_ops._layout import empty_gradient, in_place_layout
from fbkd_ops.non_local import relation
from fbkd_ops.non_local.pooling import pool_cells
from fbkd_ops.non_local.relation import RelationTerm, relation_form
from fbkd_ops.ops.cell_relation import CellBlock, cell_relation, level_parameters
from fbkd_ops.presets import CHOICES

pytestmark = [NO_CPU, pytest.mark.usefixtures("poison")]

# (N, Cs, Ct, c, H, W), stride and order of the pools.
SIZES = [
    ((2, 1, 1, 1, 1, 1), 1, "single"),  # one pixel, one channel: nothing is pooled
    ((3, 5, 4, 3, 1, 1), 4, "single"),  # a stride beyond the map
    ((2, 4, 7, 2, 2, 9), 2, "single"),  # cells of four pixels: winners pass their gradients densely
    ((1, 8, 6, 3, 13, 11), 4, "single"),  # one image; ragged cells, winners one by one
    ((3, 6, 9, 4, 9, 16), 8, "nested"),
    ((2, 33, 17, 5, 20, 20), 8, "single"),
    ((5, 20, 40, 12, 7, 6), 3, "nested"),
    ((2, 7, 30, 3, 40, 41), 20, "single"),  # more pixels than a piece of a row
]
LEVEL = SIZES[3]


class Level:
    """A level with randomised blocks and an adaptation."""

    def __init__(
        self,
        size,
        stride,
        order,
        dtypes=(torch.float64,) * 2,
        layouts=(contiguous,) * 2,
        norm="batch",
        train=True,
        bias=True,
    ):
        n, from_channels, to_channels, inner, height, width = size
        self.settings = dict(stride=stride, pool_order=order)
        blocks = [
            NonLocalBlock2d(channels, min(inner, channels), norm=norm, conv_out_bias=bias, **self.settings)
            for channels in (from_channels, to_channels)
        ]
        adaptation = torch.nn.Conv2d(from_channels, to_channels, 1)
        self.parts = randomise(torch.nn.ModuleList([*blocks, adaptation])).to(accumulation_of(*dtypes)).train(train)
        self.student = layouts[0](draw((n, from_channels, height, width), dtypes[0])).detach().requires_grad_()
        self.teacher = layouts[1](draw((n, to_channels, height, width), dtypes[1])).detach()

    def widened(self):
        """The same level in float64."""
        wide = copy.deepcopy(self)
        wide.student = self.student.detach().double().requires_grad_()
        wide.teacher, wide.parts = self.teacher.double(), wide.parts.double()
        return wide

    @property
    def leaves(self):
        return [self.student, *self.parts.parameters()]

    def cells(self):
        """The level as the op takes it."""
        term = RelationTerm(
            self.student,
            self.teacher,
            self.parts[0].block(),
            self.parts[1].block(),
            self.parts[2].weight.flatten(1),
            self.parts[2].bias,
        )
        return relation._cell_level(term)

    def squares(self, memory_efficient=False):
        (squares,), self.moments = cell_relation([self.cells()], memory_efficient)
        return squares

    def literal(self, dtype):
        """The squares in ``dtype`` by the literal formula."""
        (student, teacher, adaptation), cast = self.parts, lambda x: None if x is None else x.to(dtype)
        weights = [type(block.weights())(*map(cast, block.weights())) for block in (student, teacher)]
        norms = [None if block.norm is None else block.norm.to(dtype) for block in (student, teacher)]
        loss = reference.relation_loss(
            self.student.to(dtype),
            self.teacher.to(dtype),
            *weights,
            cast(adaptation.weight.flatten(1)),
            cast(adaptation.bias),
            student_norm=norms[0],
            teacher_norm=norms[1],
            **self.settings,
        )
        return loss.square()


def results_of(level, squares):
    return [squares.detach(), *torch.autograd.grad(squares, level.leaves)]


def assert_equal_to_the_literal_formula(*arguments, memory_efficient=False, **options):
    """In float64. The last bias before a BatchNorm of the batch's statistics has no gradient but rounding."""
    level, literal = Level(*arguments, **options), Level(*arguments, **options)
    literal.student, literal.teacher = level.student.detach().clone().requires_grad_(), level.teacher
    ours, truth = (
        results_of(level, level.squares(memory_efficient)),
        results_of(literal, literal.literal(torch.float64)),
    )
    for our, true in zip(ours, truth, strict=True):
        torch.testing.assert_close(our, true, rtol=1e-9, atol=1e-11 * max(1.0, float(truth[0])))
    assert ours[1].stride() == empty_gradient(in_place_layout(level.student)).stride()


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS, ids=name_of)
@pytest.mark.parametrize("size, stride, order", SIZES, ids=name_of)
def test_equals_the_literal_formula(size, stride, order, layouts):
    norm = "none" if size[0] * size[4] * size[5] == 2 else "batch"  # two values have a variance of rounding
    assert_equal_to_the_literal_formula(size, stride, order, layouts=layouts, norm=norm)


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("train, bias", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("norm", CHOICES["norm"])
def test_every_norm(norm, train, bias, memory_efficient):
    assert_equal_to_the_literal_formula(*LEVEL, norm=norm, train=train, bias=bias, memory_efficient=memory_efficient)


@pytest.mark.parametrize(
    "layout", [channel_slice, channels_last_slice, batch_slice, permuted], ids=lambda layout: layout.__name__
)
def test_views_are_read_as_they_lie(layout):
    assert_equal_to_the_literal_formula(*LEVEL, layouts=(layout, layout))


@pytest.mark.parametrize("dtypes", list(itertools.product(DTYPES, DTYPES)), ids=name_of)
def test_any_dtypes_are_as_exact_as_the_literal_formula(dtypes):
    for size, stride, order in (SIZES[4], SIZES[5]):
        level = Level(size, stride, order, dtypes, (contiguous, channels_last), norm="none")
        wide, accumulation = level.widened(), accumulation_of(*dtypes)
        ours = results_of(level, 1e-3 * level.squares())  # a float16 student's gradient stays in its range
        eager = results_of(level, 1e-3 * level.literal(accumulation))
        truth = results_of(wide, 1e-3 * wide.literal(torch.float64))
        for our, theirs, true in zip(ours, eager, truth, strict=True):
            assert our.dtype == theirs.dtype
            bound = 2 * rms(theirs.double() - true) + 16 * torch.finfo(accumulation).eps * rms(true)
            assert rms(our.double() - true) <= bound


def test_a_student_in_16_bits_has_its_gradient_rounded_once():
    """Up to the factor that backward brings it would overflow float16: 1e6 here, times 1e-4."""
    level = Level((1, 8, 8, 2, 8, 8), 4, "single", (torch.float16,) * 2, norm="none")
    with torch.no_grad():
        level.teacher = level.teacher * 1e4
        level.parts[2].weight.mul_(100)
    (gradient,) = torch.autograd.grad(1e-4 * level.squares(), [level.student])
    (truth,) = torch.autograd.grad(1e-4 * level.literal(torch.float64), [level.student])
    assert truth.abs().max() * 1e4 > torch.finfo(torch.float16).max
    torch.testing.assert_close(gradient, truth, rtol=2e-3, atol=1e-3 * float(truth.abs().max()))


@pytest.mark.parametrize("order", ["single", "nested"])
@pytest.mark.parametrize("layout", [contiguous, channels_last], ids=name_of)
def test_ties_have_the_winner_of_max_pool2d(order, layout):
    """Values of few different sizes; cells that are not square."""
    level = Level((2, 3, 3, 2, 6, 13), 6, order, layouts=(layout, layout), norm="none")
    with torch.no_grad():
        level.student.copy_(level.student.round())
        for block in level.parts[:2]:
            for layer in (block.phi, block.g):
                layer.weight.copy_((4 * layer.weight).round())
    assert pool_cells(level.student, level.parts[0].block().settings)[:2] == (6, 6)
    for our, true in zip(
        results_of(level, level.squares()), results_of(level, level.literal(torch.float64)), strict=True
    ):
        torch.testing.assert_close(our, true, rtol=1e-9, atol=1e-8)


def test_cells_that_are_not_square_are_ranked_by_their_own_extents():
    """A map of height 3 under a nested stride of 6: cells of 3x6, whose first pool is 1x2."""
    level = Level((2, 3, 3, 2, 3, 13), 6, "nested", norm="none")
    with torch.no_grad():
        level.student.fill_(1)
        level.teacher.fill_(1)
    for our, true in zip(
        results_of(level, level.squares()), results_of(level, level.literal(torch.float64)), strict=True
    ):
        torch.testing.assert_close(our, true, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows(value):
    level = Level(*LEVEL)
    with torch.no_grad():
        level.student[0, 0, 0, 0] = value
    assert not level.squares().isfinite()


def test_moments_are_those_of_what_the_norm_is_given():
    level = Level(*SIZES[4], bias=True)
    squares = level.squares()
    for block, x, moments in zip(level.parts[:2], (level.student, level.teacher), level.moments, strict=True):
        seen, weights = [], block.weights()
        handle = block.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        reference.non_local(x, weights, norm=block.norm, **level.settings)
        handle.remove()
        if not seen:  # called by its function
            seen.append(reference.non_local(x, weights, **level.settings) - x)
        torch.testing.assert_close(moments.mean, seen[0].mean((0, 2, 3)))
        torch.testing.assert_close(moments.variance, seen[0].var((0, 2, 3), correction=0))
        assert not moments.mean.requires_grad
    assert squares.requires_grad


@pytest.mark.parametrize("norm", ["none", "frozen"])
def test_there_are_no_moments_without_a_norm_of_the_batch(norm):
    level = Level(*LEVEL, norm=norm)
    level.squares()
    assert all(len(moment) == 0 for moments in level.moments for moment in moments)


@pytest.mark.parametrize("memory_efficient", [False, True])
def test_levels_together_equal_levels_alone(memory_efficient):
    dtypes = [(torch.float32,) * 2, (torch.bfloat16, torch.float32), (torch.float64, torch.float32)]
    levels = [Level(*SIZES[3 + index], pair) for index, pair in enumerate(dtypes)]
    together, moments = cell_relation([level.cells() for level in levels], memory_efficient)
    factors = torch.arange(1, len(levels) + 1, dtype=together.dtype) / 4
    gradients = iter(torch.autograd.grad(together, [leaf for level in levels for leaf in level.leaves], factors))
    for index, level in enumerate(levels):
        alone = level.squares(memory_efficient)
        assert_same_bits([together[index].to(alone.dtype)], [alone])
        assert_same_bits(moments[2 * index], level.moments[0])
        expected = torch.autograd.grad(alone, level.leaves, factors[index].to(alone.dtype))
        assert_same_bits([next(gradients) for _ in level.leaves], expected)


def test_repeats_are_bit_equal():
    level = Level(*SIZES[5], (torch.float32,) * 2)
    first = results_of(level, level.squares())
    for _ in range(2):
        assert_same_bits(first, results_of(level, level.squares()))


def test_a_second_backward_pass_computes_what_the_first_used_up():
    level = Level(*LEVEL, (torch.float32,) * 2)
    squares = level.squares()
    passes = [torch.autograd.grad(3 * squares, level.leaves, retain_graph=True) for _ in range(3)]
    for other in passes[1:]:
        for ours, first in zip(other, passes[0], strict=True):
            torch.testing.assert_close(ours, first, rtol=1e-4, atol=1e-4 * float(first.abs().max()))
    assert_same_bits(passes[1], passes[2])


@pytest.mark.parametrize("wanted", range(12))
def test_gradients_that_are_not_wanted_are_left_out(wanted):
    level = Level(*LEVEL)
    expected = results_of(level, level.squares())[1:]
    for index, leaf in enumerate(level.leaves):
        leaf.requires_grad_(index == wanted)
    (gradient,) = torch.autograd.grad(level.squares(), [level.leaves[wanted]])
    torch.testing.assert_close(gradient, expected[wanted])


@pytest.mark.parametrize("layouts", PAIRS_OF_LAYOUTS[1:3], ids=name_of)
@pytest.mark.parametrize("stride, order", [(2, "single"), (4, "nested")])
def test_gradcheck(stride, order, layouts):
    level = Level((2, 3, 4, 2, 4, 5), stride, order, layouts=layouts)
    assert torch.autograd.gradcheck(lambda *_: level.squares(), level.leaves, nondet_tol=1e-12)


def test_second_derivative_raises():
    level = Level(*LEVEL)
    (gradient,) = torch.autograd.grad(level.squares().sqrt(), [level.student], create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


def test_nothing_is_kept_under_memory_efficient():
    level = Level((2, 6, 9, 2, 24, 20), 8, "single")
    known = {x.untyped_storage().data_ptr() for x in (*level.leaves, level.teacher)}
    kept = []

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept.append(x.untyped_storage().nbytes())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        squares, _ = cell_relation([level.cells()], memory_efficient=True)
    assert max(kept, default=0) < 24 * 20 * 8 and squares.grad_fn.ready is None


def test_compiles_into_one_graph_for_any_size():
    levels = [Level((2, 3, 4, 2, *size), 2, "single", (torch.float32,) * 2) for size in ((5, 6), (7, 4), (9, 9))]
    first = levels[0]

    def squares(student, teacher, *parameters):
        block = CellBlock(*first.cells().student_block)
        level = first.cells()._replace(
            student=student, teacher=teacher, adaptation_weight=parameters[0], student_block=block
        )
        return cell_relation([level._replace(pool=(2, 2, 1, 1))])[0]

    inputs = [[level.student, level.teacher, first.parts[2].weight.flatten(1)] for level in levels]
    assert_compiled_agrees(squares, inputs, "cpu", "inductor")


@pytest.mark.parametrize("student_gradient", [True, False])
@pytest.mark.parametrize("norm", ["batch", "none", "frozen"])
def test_opcheck(norm, student_gradient):
    torch.use_deterministic_algorithms(False)
    tests = ("test_schema", "test_faketensor")
    for layouts in PAIRS_OF_LAYOUTS[1:3]:
        level = Level(*LEVEL, (torch.bfloat16, torch.float32), layouts, norm=norm).cells()
        parameters = [None if x is None else x.detach() for x in level_parameters(level)]
        eps = [-1.0 if value is None else value for value in level.eps]
        arguments = [level.student.detach()], [level.teacher], parameters, list(level.pool), eps
        torch.library.opcheck(op_of("cell_relation_forward", "cpu"), arguments, test_utils=tests)
        for name, last in (("with_gradient", (student_gradient,)), ("backward", (torch.rand(1), student_gradient))):
            torch.library.opcheck(op_of(f"cell_relation_{name}", "cpu"), (*arguments, *last), test_utils=tests)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda level: level._replace(teacher=level.teacher[:, :, 1:]), "student and teacher must agree in N, H and W"),
        (lambda level: level._replace(student=level.student[:0], teacher=level.teacher[:0]), "at least one image"),
        (lambda level: level._replace(pool=(14, 4, 1, 1)), "pools must fit the map"),
        (lambda level: level._replace(pool=(4, 4, 3, 1)), "pools must fit the map"),
        (
            lambda level: level._replace(student_block=level.student_block._replace(phi_bias=None)),
            "phi_bias must be given",
        ),
        (
            lambda level: level._replace(teacher_block=level.teacher_block._replace(out_weight=torch.ones(2, 2))),
            "out_weight must be float64 where the features are",
        ),
        (
            lambda level: level._replace(adaptation_bias=level.adaptation_bias[:2]),
            "adaptation_bias must be contiguous with 6 elements, got 2",
        ),
    ],
)
def test_bad_arguments_of_the_op(change, message):
    with pytest.raises(RuntimeError, match=message):
        cell_relation([change(Level(*LEVEL).cells())])


def term_of(level):
    return RelationTerm(
        level.student,
        level.teacher,
        level.parts[0].block(),
        level.parts[1].block(),
        level.parts[2].weight,
        level.parts[2].bias,
    )


def test_the_form_is_chosen_by_size():
    small, large = Level((2, 64, 128, 16, 5, 5), 2, "single"), Level((1, 8, 8, 2, 200, 100), 2, "single")
    assert relation_form("cpu", term_of(small)) == "cells"
    assert relation_form("cpu", term_of(large)) == "collapsed"
    assert relation_form("triton", term_of(small)) == "collapsed"
    assert relation_form("torch", term_of(small)) == "responses"


def test_a_map_without_images_and_other_modes_take_the_other_forms():
    level = Level((0, 4, 4, 2, 5, 5), 2, "single")
    assert relation_form("cpu", term_of(level)) == "collapsed"
    term = term_of(Level(*LEVEL))
    settings = term.student_block.settings.__class__("gaussian", 4)
    other = term._replace(student_block=term.student_block._replace(settings=settings))
    assert relation_form("cpu", other) == "responses"


@pytest.mark.parametrize("momentum", [0.3, None])
def test_both_forms_leave_the_same_running_statistics(monkeypatch, momentum):
    states = []
    for form in ("cells", "collapsed"):
        monkeypatch.setattr(relation, "cheaper_form", lambda sizes, form=form: form)
        torch.manual_seed(0)
        level = Level(*LEVEL)
        for block in level.parts[:2]:
            block.norm.momentum = momentum
        for _ in range(3):
            functional.relation_loss(
                level.student,
                level.teacher,
                level.parts[0].weights(),
                level.parts[1].weights(),
                level.parts[2].weight.flatten(1),
                level.parts[2].bias,
                student_norm=level.parts[0].norm,
                teacher_norm=level.parts[1].norm,
                **level.settings,
            )
        states.append(level.parts.state_dict())
    torch.testing.assert_close(*states, rtol=1e-10, atol=1e-12)
    assert states[0]["0.norm.num_batches_tracked"] == 3


def test_one_value_a_channel_is_refused_as_batch_norm_does(monkeypatch):
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: "cells")
    level = Level((1, 3, 4, 2, 1, 1), 1, "single")
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        relation.relation_squares("cpu", [term_of(level)])
    assert level.parts[0].norm.num_batches_tracked == 0


def test_the_loss_in_the_cell_form_equals_the_literal_formula(monkeypatch):
    """All presets over three levels of other widths, among them one of a single pixel."""
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: "cells")
    for preset in ("two_stage", "one_stage", "mmrazor", "paper"):
        losses = [
            randomise(fbkd_ops.FBKDLoss([6, 8, 8], [10, 12, 16], preset=preset)).double().requires_grad_()
            for _ in range(2)
        ]
        students = [
            torch.randn(3, c, *size).double() for c, size in zip((6, 8, 8), ((9, 7), (5, 4), (1, 1)), strict=True)
        ]
        teachers = [torch.randn(3, c, *x.shape[2:]).double() for c, x in zip((10, 12, 16), students, strict=True)]
        ours = losses[0](students, teachers)
        with fbkd_ops.use_backend("reference"):
            truth = losses[1](students, teachers)
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(dict(losses[0].named_buffers()), dict(losses[1].named_buffers()))


def test_bit_equal_wherever_the_operands_lie():
    """The vendor's product rounds by the alignment of its operands, which the allocator changes from call to call."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 47, 1, 1, requires_grad=True), torch.randn(1, 127, 1, 1)]
    blocks = [NonLocalBlock2d(channels, 1).eval() for channels in (47, 127)]
    for block in blocks:
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter)
    weight, bias = torch.randn(127, 47), torch.randn(127)
    arguments = [*leaves, *(block.weights() for block in blocks), weight, bias]
    norms = dict(student_norm=blocks[0].norm, teacher_norm=blocks[1].norm)
    seen, fillers = set(), []
    with threads(2):
        for size in range(100):
            fillers.append(bytearray(7 * size % 97 + 1))
            loss = functional.relation_loss(*arguments, **norms)
            (gradient,) = torch.autograd.grad(loss, leaves[0])
            seen.add(gradient.numpy().tobytes())
    assert len(seen) == 1
