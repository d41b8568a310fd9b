"""Collapsed blocks of every kind and width in one pyramid: gradients, equality with the literal formula, buffers."""

from dataclasses import dataclass

import pytest
import torch
from helpers import randomise
from op_cases import INTERPRETED, ON_CPU, channels_last
from torch import nn

import fbkd_ops
from fbkd_ops import FBKDLoss, NonLocalBlock2d, functional, reference
from fbkd_ops.non_local import batch_norm, relation
from fbkd_ops.non_local.parameters import as_matrices
from fbkd_ops.non_local.relation import RelationTerm, collapsed_levels, relation_squares

pytestmark = pytest.mark.usefixtures("poison")

RELATION_ONLY = dict(feature_weight=0, channel_weight=0, spatial_weight=0, relation_weight=1.0)


@dataclass(frozen=True)
class Case:
    """Levels of a pyramid; each entry a level's, or one of all."""

    name: str
    students: tuple[int, ...] = (5, 5)
    teachers: tuple[int, ...] = (5, 5)
    inner: int = 2
    strides: tuple[int, ...] = (2, 2)
    norms: tuple[str, str] = ("batch", "batch")  # of the students' and of the teachers' blocks
    affine: bool = True
    out_bias: bool = True
    eval_mode: bool = False
    images: tuple[int, ...] = (2, 2)

    def block(self, level: int, side: int) -> NonLocalBlock2d:
        channels = (self.students, self.teachers)[side][level]
        settings = dict(stride=self.strides[level], norm=self.norms[side], conv_out_bias=self.out_bias)
        block = NonLocalBlock2d(channels, self.inner, **settings)
        if not self.affine:
            block.norm = nn.BatchNorm2d(channels, affine=False)
        return randomise(block.double(), seed=10 * level + side).train(not self.eval_mode)

    def maps(self, level: int) -> tuple[torch.Tensor, torch.Tensor]:
        size = (6 - 2 * level, 5)  # a number of cells a level, whose last ones are ragged
        widths = self.students[level], self.teachers[level]
        return tuple(torch.randn(self.images[level], width, *size, dtype=torch.float64) + 1 for width in widths)


CASES = [
    Case("all of one width"),
    Case("wide projections", inner=3),
    Case("no two of one width", students=(5, 4), teachers=(6, 7)),
    Case("teachers of one width", students=(5, 4), teachers=(6, 6)),
    Case(
        "students as wide as other teachers", students=(5, 6, 5), teachers=(6, 5, 6), strides=(2,) * 3, images=(2,) * 3
    ),
    Case("nothing pooled", strides=(1, 1)),
    Case("nothing pooled, narrow", strides=(1, 1), inner=1, students=(7, 7), teachers=(7, 8)),
    Case("one level pooled", strides=(1, 2)),
    Case("no norm", norms=("none", "none")),
    Case("no norm, nothing pooled", norms=("none", "none"), strides=(1, 1)),
    Case("fixed statistics", eval_mode=True),
    Case("fixed statistics, nothing pooled", eval_mode=True, strides=(1, 2)),
    Case("a norm on one side", norms=("batch", "none")),
    Case("frozen on one side", norms=("frozen", "batch")),
    Case("not affine, no bias", affine=False, out_bias=False),
    Case("other numbers of images", images=(3, 1)),
]


def of_cases(interpreted: list[Case]):
    """Every case on the CPU, some in the interpreter."""
    return pytest.mark.parametrize(
        "backend, case",
        [
            pytest.param(param.values[0], case, marks=param.marks, id=f"{param.id}-{case.name}")
            for param, cases in ((ON_CPU, CASES), (INTERPRETED, interpreted))
            for case in cases
        ],
    )


@pytest.fixture(autouse=True)
def collapsed(monkeypatch):
    """Maps as small as these would take the other form."""
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: "collapsed")


class Pyramid:
    """The tensors of a case, as leaves."""

    def __init__(self, case: Case):
        torch.manual_seed(1)
        levels = range(len(case.students))
        self.maps = [case.maps(level) for level in levels]
        self.blocks = [(case.block(level, 0), case.block(level, 1)) for level in levels]
        self.adaptations = [
            randomise(nn.Conv2d(student, teacher, 1).double(), seed=level)
            for level, (student, teacher) in enumerate(zip(case.students, case.teachers, strict=True))
        ]

    def leaves(self) -> dict[str, list[torch.Tensor]]:
        groups = {
            "students": [student for student, _ in self.maps],
            "student blocks": [p for block, _ in self.blocks for p in block.parameters()],
            "teacher blocks": [p for _, block in self.blocks for p in block.parameters()],
            "adaptations": [p for layer in self.adaptations for p in layer.parameters()],
        }
        return {name: [x.requires_grad_() for x in tensors] for name, tensors in groups.items()}

    def terms(self) -> list[RelationTerm]:
        return [
            RelationTerm(*maps, *(block.block() for block in blocks), layer.weight.flatten(1), layer.bias)
            for maps, blocks, layer in zip(self.maps, self.blocks, self.adaptations, strict=True)
        ]


def weighted_outputs(backend: str, pyramid: Pyramid) -> torch.Tensor:
    """A scalar of which every element of every output has another gradient."""
    levels = collapsed_levels(backend, pyramid.terms())._replace(teachers=[])
    outputs = [x for column in levels for x in column if x is not None]
    generator = torch.Generator().manual_seed(2)
    return sum((torch.randn(x.shape, generator=generator, dtype=x.dtype) * x).sum() for x in outputs)


# Not in the interpreter, where it takes minutes: the next test compares every gradient there.
@of_cases([])
def test_gradcheck(backend, case):
    pyramid = Pyramid(case)
    leaves = [x for group in pyramid.leaves().values() for x in group]
    # The residual, which alone reads the outputs, gives a gradient to all of them.
    options = dict(fast_mode=True, check_undefined_grad=False, check_batched_grad=False)
    assert torch.autograd.gradcheck(lambda *_: weighted_outputs(backend, pyramid), leaves, **options)


def literal_squares(pyramid: Pyramid, case: Case) -> list[torch.Tensor]:
    return [
        reference.relation_loss(
            *term[:2],
            as_matrices(term.student_block.weights),
            as_matrices(term.teacher_block.weights),
            term.adaptation_weight,
            term.adaptation_bias,
            stride=stride,
            student_norm=term.student_block.norm,
            teacher_norm=term.teacher_block.norm,
        ).square()
        for term, stride in zip(pyramid.terms(), case.strides, strict=True)
    ]


@of_cases([CASES[0], CASES[2], CASES[5]])
def test_squares_and_gradients_are_those_of_the_literal_formula(backend, case):
    seen = []
    for run in (
        lambda pyramid: relation_squares(backend, pyramid.terms()),
        lambda pyramid: literal_squares(pyramid, case),
    ):
        pyramid = Pyramid(case)
        leaves = [x for group in pyramid.leaves().values() for x in group]
        squares = run(pyramid)
        buffers = [dict(block.named_buffers()) for blocks in pyramid.blocks for block in blocks]
        seen.append((list(squares), torch.autograd.grad(sum(squares), leaves), buffers))
    torch.testing.assert_close(*seen, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("backend", [pytest.param(*ON_CPU.values[:1], marks=ON_CPU.marks)])
@pytest.mark.parametrize("name", ["students", "student blocks", "teacher blocks", "adaptations"])
def test_gradients_of_some_leaves_alone(backend, name):
    pyramid = Pyramid(CASES[3])
    leaves = pyramid.leaves()
    expected = torch.autograd.grad(sum(relation_squares(backend, pyramid.terms())), leaves[name])
    for tensor in (x for group, tensors in leaves.items() if group != name for x in tensors):
        tensor.requires_grad_(False)
    ours = torch.autograd.grad(sum(relation_squares(backend, pyramid.terms())), leaves[name])
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [pytest.param(*ON_CPU.values[:1], marks=ON_CPU.marks)])
def test_one_student_without_a_gradient(backend):
    pyramid = Pyramid(CASES[0])
    first, second = pyramid.leaves()["students"]
    expected = torch.autograd.grad(sum(relation_squares(backend, pyramid.terms())), second)
    first.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(sum(relation_squares(backend, pyramid.terms())), second), expected)


def test_levels_of_other_dtypes_and_layouts_are_those_alone():
    torch.manual_seed(0)
    loss = randomise(FBKDLoss(6, 6, num_levels=3, stride=2, **RELATION_ONLY))
    students, teachers = ([torch.randn(2, 6, 8 - i, 6, dtype=torch.float64) for i in range(3)] for _ in range(2))
    students = [students[0], channels_last(students[1].float()), students[2].bfloat16()]
    teachers = [teachers[0].float(), channels_last(teachers[1].float()), teachers[2].float()]
    leaves = [x.requires_grad_() for x in students]
    terms = lambda: [  # noqa: E731
        RelationTerm(
            s, t, level.student_non_local.block(), level.teacher_non_local.block(), layer.weight.flatten(1), layer.bias
        )
        for s, t, level in zip(leaves, teachers, loss.levels, strict=True)
        for layer in [level.relation_adaptation]
    ]
    together = relation_squares("cpu", terms())
    grads = torch.autograd.grad(sum(square.double() for square in together), leaves)
    for level, (term, leaf) in enumerate(zip(terms(), leaves, strict=True)):
        (alone,) = relation_squares("cpu", [term])
        torch.testing.assert_close(together[level].to(alone.dtype), alone, rtol=1e-6, atol=0)
        torch.testing.assert_close(grads[level], torch.autograd.grad(alone, leaf)[0])
        assert grads[level].dtype == leaf.dtype


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_level_without_images_beside_one_with(backend):
    loss = randomise(FBKDLoss(4, 4, num_levels=2, stride=2, **RELATION_ONLY).double())
    students = [torch.randn(n, 4, 6, 6, dtype=torch.float64, requires_grad=True) for n in (0, 2)]
    with fbkd_ops.use_backend(backend):
        loss(students, [torch.ones_like(x) for x in students])["loss_fbkd_relation"].backward()
    tracked = [int(level.student_non_local.norm.num_batches_tracked) for level in loss.levels]
    assert tracked == [1, 1] and students[0].grad.shape == (0, 4, 6, 6)
    for name, parameter in loss.levels[0].named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("form", ["cells", "collapsed"])
def test_a_norm_of_both_sides_is_updated_twice(monkeypatch, form):
    """One update after the other, the student's first: a GPU may run those of one call in any order."""
    monkeypatch.setattr(relation, "cheaper_form", lambda sizes: form)
    torch.manual_seed(0)
    seen, own = [], batch_norm._update_distinct
    blocks = [randomise(NonLocalBlock2d(4, 2, norm="none").double(), seed=seed) for seed in (1, 2)]
    layer = randomise(nn.Conv2d(4, 4, 1).double())
    maps = [torch.randn(2, 4, 5, 6, dtype=torch.float64) + seed for seed in (1, 2)]
    buffers = []
    for backend in ("cpu", "reference"):
        norm = nn.BatchNorm2d(4).double()
        monkeypatch.setattr(batch_norm, "_update_distinct", lambda updates: seen.append(len(updates)) or own(updates))
        with fbkd_ops.use_backend(backend):
            weights = (block.weights() for block in blocks)
            functional.relation_loss(
                *maps, *weights, layer.weight.flatten(1), layer.bias, student_norm=norm, teacher_norm=norm
            )
        buffers.append(dict(norm.named_buffers()))
    assert buffers[0]["num_batches_tracked"] == 2 and seen == [1, 1]
    torch.testing.assert_close(*buffers, rtol=1e-10, atol=1e-10)
