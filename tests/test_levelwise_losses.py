"""The losses of one term, PKD's, CWD's and MGD's: widths, sizes, weights, and inside a distiller."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fbkd_ops
from fbkd_ops import CWDLoss, Distiller, MGDLoss, PKDLoss
from fbkd_ops.functional import channel_correlation_loss, channel_divergence_loss


class Kind(NamedTuple):
    loss: type[nn.Module]
    op: Callable  # the unweighted loss of one level
    term: str
    levels: int  # by default


KINDS = [Kind(PKDLoss, channel_correlation_loss, "loss_pkd", 4), Kind(CWDLoss, channel_divergence_loss, "loss_cwd", 5)]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.term)
MGD = Kind(MGDLoss, None, "loss_mgd", 5)  # tests/test_mgd.py has the loss of its levels
each_loss = pytest.mark.parametrize("kind", [*KINDS, MGD], ids=lambda kind: kind.term)
SIZES = [(16, 20), (8, 10), (4, 5), (2, 3)]


def maps(channels=8, sizes=SIZES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize(
    "kind, preset, weight",
    [
        (KINDS[0], "two_stage", 6.0),
        (KINDS[0], "one_stage", 10.0),
        (KINDS[1], "two_stage", 10.0),
        (KINDS[1], "one_stage", 10.0),
    ],
)
def test_the_loss_is_the_weighted_sum_over_levels(kind, preset, weight):
    sizes = [*SIZES, (1, 2)][: kind.levels]
    student, teacher = maps(sizes=sizes, seed=1), maps(sizes=sizes, seed=2)
    terms = kind.loss(8, preset=preset)(student, teacher)
    expected = weight * sum(kind.op(s, t) for s, t in zip(student, teacher, strict=True))
    assert list(terms) == list(kind.loss.term_names) == [kind.term]
    torch.testing.assert_close(terms[kind.term], expected)


def test_the_constants_reach_the_ops():
    student, teacher = maps(seed=1)[:1], maps(seed=2)[:1]
    for loss, expected in (
        (PKDLoss(8, num_levels=1, weight=1, eps=0.5), channel_correlation_loss(student[0], teacher[0], eps=0.5)),
        (
            CWDLoss(8, num_levels=1, weight=1, temperature=4),
            channel_divergence_loss(student[0], teacher[0], temperature=4),
        ),
    ):
        (term,) = loss(student, teacher).values()
        torch.testing.assert_close(term, expected)


@each_kind
def test_a_weight_for_each_level(kind):
    student, teacher = maps(seed=1), maps(seed=2)
    alone = [kind.op(s, t) for s, t in zip(student, teacher, strict=True)]
    together = kind.loss(8, num_levels=4, weight=[1, 0, 2.5, 4])(student, teacher)[kind.term]
    torch.testing.assert_close(together, alone[0] + 2.5 * alone[2] + 4 * alone[3])


@each_kind
def test_a_level_of_weight_0_is_left_out(kind):
    student, teacher = maps(seed=1), maps(12, seed=2)
    student[0][0, 0, 0, 0] = float("nan")
    torch.manual_seed(0)
    loss = kind.loss(8, 12, num_levels=4, weight=[0, 1, 1, 0])
    assert {name.split(".")[1] for name, _ in loss.named_parameters()} == {"1", "2"}
    with pytest.warns(UserWarning, match="carry no gradient"):
        assert loss(student, teacher)[kind.term].isfinite()
    assert kind.loss(8, weight=0, num_levels=4)(maps(), maps())[kind.term] == 0


@each_kind
def test_equal_widths_need_no_parameter(kind):
    assert not list(kind.loss(8).parameters())
    assert {name for name, _ in kind.loss([8, 8], [8, 12]).named_parameters()} == {
        "adaptations.1.weight",
        "adaptations.1.bias",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
@each_kind
def test_another_width_is_adapted(kind, dtype, autocast):
    torch.manual_seed(0)
    loss = kind.loss(8, 12, num_levels=1, weight=1)
    student, teacher = maps(8, SIZES[:1], dtype=dtype)[0].requires_grad_(), maps(12, SIZES[:1], 1)[0]
    layer = loss.adaptations[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        term = loss([student], [teacher])[kind.term]
    term.backward()
    width = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
    adapted = F.conv2d(student.detach().to(width), layer.weight.to(width), layer.bias.to(width))
    torch.testing.assert_close(term, kind.op(adapted, teacher), rtol=1e-3, atol=0)
    for gradient in (student.grad, layer.weight.grad):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert student.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("resize", ["student", "teacher"])
@each_kind
def test_other_sizes_are_resized_where_asked(kind, resize):
    student, teacher = maps(sizes=[(16, 20), (8, 10)]), maps(sizes=[(8, 10), (8, 10)], seed=1)
    sides = {"student": student[0], "teacher": teacher[0]}
    size = {"student": (8, 10), "teacher": (16, 20)}[resize]
    sides[resize] = F.interpolate(sides[resize], size, mode="bilinear")
    expected = kind.op(*sides.values()) + kind.op(student[1], teacher[1])
    term = kind.loss(8, num_levels=2, weight=1, resize=resize)(student, teacher)[kind.term]
    torch.testing.assert_close(term, expected)


@each_loss
def test_other_sizes_are_an_error_else(kind):
    with pytest.raises(ValueError, match=r"must agree in N, H and W, got \(2, 8, 16, 20\) and \(2, 8, 8, 10\)"):
        kind.loss(8, num_levels=1)(maps()[:1], maps()[1:2])
    other = [torch.zeros(3, 8, 16, 20)]
    with pytest.raises(ValueError, match="must agree in N, got"):
        kind.loss(8, num_levels=1, resize="student")(maps()[:1], other)


@pytest.mark.parametrize("loss", [PKDLoss, CWDLoss, MGDLoss, fbkd_ops.FBKDLoss])
def test_no_loss_is_made_for_features_of_other_sizes(loss):
    with pytest.raises(ValueError, match="must agree in N, H and W"):
        loss.from_features(maps()[:1], maps()[1:2])


@each_loss
def test_it_is_made_for_features(kind):
    student, teacher = maps(8), maps(12, sizes=SIZES[1:] + SIZES[-1:])
    loss = kind.loss.from_features(student, teacher, resize="student", weight=3)
    assert loss.widths == [(8, 12)] * 4 and loss.weights == [3.0] * 4
    assert loss(student, teacher)[kind.term].isfinite()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"preset": "paper"}, ValueError, "preset must be one of 'two_stage'.*, got 'paper'"),
        ({"preset": "two-stage"}, ValueError, "did you mean 'two_stage'"),
        ({"weight": -1}, ValueError, "weight must be a number >= 0, got -1"),
        ({"weight": [1, 2]}, ValueError, "weight"),
        ({"weight": "6"}, (TypeError, ValueError), "weight"),
        ({"resize": "both"}, ValueError, "resize must be one of 'student', 'teacher', got 'both'"),
        ({"num_levels": 0}, ValueError, "num_levels must be an int >= 1, got 0"),
        ({"student_channels": 0}, ValueError, "student_channels must be >= 1, got 0"),
        ({"student_channels": 8.0}, TypeError, "student_channels must be an int or a list of ints, got 8.0"),
        ({"teacher_channels": [8, 8]}, ValueError, "levels|entries"),
    ],
)
@each_loss
def test_bad_arguments_are_named(kind, arguments, error, message):
    with pytest.raises(error, match=message):
        kind.loss(**{"student_channels": 8, "num_levels": 4, **arguments})


def test_bad_constants_are_named():
    with pytest.raises(ValueError, match="eps must be a number > 0, got 0"):
        PKDLoss(8, eps=0)
    with pytest.raises(ValueError, match="temperature must be a number > 0, got -1"):
        CWDLoss(8, temperature=-1)


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (maps()[:3], maps()[:3], "must have 4 levels, as the loss was made with, got 3"),
        (maps(7), maps(), r"student_features\[0\] must have 8 channels, got 7"),
        (maps(), maps(7), r"teacher_features\[0\] must have 8 channels, got 7"),
        (maps(), maps()[:3], "the same number of levels"),
    ],
)
@each_loss
def test_bad_features_are_named(kind, student, teacher, message):
    with pytest.raises(ValueError, match=message):
        kind.loss(8, num_levels=4)(student, teacher)


@each_loss
def test_a_hook_that_would_never_run_is_refused(kind):
    loss = kind.loss(8, 12, num_levels=1)
    loss.adaptations[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="adaptations.0"):
        loss(maps(8)[:1], maps(12)[:1])


@each_loss
def test_it_warns_as_the_fbkd_loss_does(kind):
    student, teacher = [x.requires_grad_() for x in maps()], maps(seed=1)
    loss = kind.loss(8, num_levels=4)
    with pytest.warns(UserWarning, match="student_features carry no gradient"):
        loss(maps(), teacher)
    teacher[2][0, 0, 0, 0] = float("nan")
    with pytest.warns(
        UserWarning, match=rf"terms of the loss are not finite: level 2: {kind.term} \(the teacher features"
    ):
        loss(student, teacher)


@each_kind
def test_a_compiled_loss_is_one_graph(kind):
    torch._dynamo.reset()
    loss = kind.loss(8, [8, 8, 12, 8])
    student, teacher = [x.requires_grad_() for x in maps()], [*maps()[:2], *maps(12)[2:3], *maps()[3:]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(student, teacher)[kind.term], compiled(student, teacher)[kind.term]
    torch.testing.assert_close(result, expected)
    gradients = [torch.autograd.grad(each, student) for each in (result, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


class Detector(nn.Module):
    """Two maps and a loss of its own."""

    def __init__(self, channels):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 2, 1)
        self.deep = nn.Conv2d(channels, channels, 3, 2, 1)

    def forward(self, images):
        deep = self.deep(self.stem(images).relu())
        return {"loss_own": deep.square().mean()}


def distiller(kind, **options):
    torch.manual_seed(0)
    student, teacher = Detector(8), Detector(12)
    return Distiller(student, teacher, kind.loss(8, 12, num_levels=2), student_layers=["stem", "deep"], **options)


@each_loss
def test_in_a_distiller(kind):
    module = distiller(kind)
    losses = module(torch.randn(2, 3, 32, 32))
    assert set(losses) == {"loss_own", kind.term} and list(module.loss.term_names) == [kind.term]
    fbkd_ops.sum_losses(losses).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


@each_loss
def test_its_weight_can_set_itself(kind):
    module = distiller(kind, gradient_share=0.5, share_every=1)
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    for _ in range(4):
        optimizer.zero_grad()
        fbkd_ops.sum_losses(module(torch.randn(2, 3, 32, 32))).backward()
        optimizer.step()
    module(torch.randn(2, 3, 32, 32))
    assert 0.4 < module.weights()["fbkd_gradient_share"] < 0.6
