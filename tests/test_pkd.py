"""PKD's loss: against MMRazor's class, widths, sizes, weights, and inside a distiller."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fbkd_ops
from fbkd_ops import Distiller, PKDLoss
from fbkd_ops.functional import channel_correlation_loss

SIZES = [(16, 20), (8, 10), (4, 5), (2, 3)]


def maps(channels=8, sizes=SIZES, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, channels, *size, generator=generator).to(dtype) for size in sizes]


@pytest.mark.parametrize("preset, weight", [("two_stage", 6.0), ("one_stage", 10.0)])
def test_the_loss_is_the_weighted_sum_over_levels(preset, weight):
    student, teacher = maps(seed=1), maps(seed=2)
    terms = PKDLoss(8, preset=preset)(student, teacher)
    expected = weight * sum(channel_correlation_loss(s, t) for s, t in zip(student, teacher, strict=True))
    assert list(terms) == list(PKDLoss.term_names) == ["loss_pkd"]
    torch.testing.assert_close(terms["loss_pkd"], expected)


def test_a_weight_for_each_level():
    student, teacher = maps(seed=1), maps(seed=2)
    alone = [PKDLoss(8, num_levels=1, weight=1)([s], [t])["loss_pkd"] for s, t in zip(student, teacher, strict=True)]
    together = PKDLoss(8, weight=[1, 0, 2.5, 4])(student, teacher)["loss_pkd"]
    torch.testing.assert_close(together, alone[0] + 2.5 * alone[2] + 4 * alone[3])


def test_a_level_of_weight_0_is_left_out():
    student, teacher = maps(seed=1), maps(12, seed=2)
    student[0][0, 0, 0, 0] = float("nan")
    torch.manual_seed(0)
    loss = PKDLoss(8, 12, weight=[0, 1, 1, 0])
    assert {name.split(".")[1] for name, _ in loss.named_parameters()} == {"1", "2"}
    with pytest.warns(UserWarning, match="carry no gradient"):
        assert loss(student, teacher)["loss_pkd"].isfinite()
    assert PKDLoss(8, weight=0)(maps(), maps())["loss_pkd"] == 0


def test_equal_widths_need_no_parameter():
    assert not list(PKDLoss(8).parameters())
    assert {name for name, _ in PKDLoss([8, 8], [8, 12]).named_parameters()} == {
        "adaptations.1.weight",
        "adaptations.1.bias",
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_another_width_is_adapted(dtype, autocast):
    torch.manual_seed(0)
    loss = PKDLoss(8, 12, num_levels=1, weight=1)
    student, teacher = maps(8, SIZES[:1], dtype=dtype)[0].requires_grad_(), maps(12, SIZES[:1], 1)[0]
    layer = loss.adaptations[0]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        term = loss([student], [teacher])["loss_pkd"]
    term.backward()
    width = torch.bfloat16 if autocast and dtype != torch.float64 else dtype
    adapted = F.conv2d(student.detach().to(width), layer.weight.to(width), layer.bias.to(width))
    torch.testing.assert_close(term, channel_correlation_loss(adapted, teacher), rtol=1e-3, atol=0)
    for gradient in (student.grad, layer.weight.grad):
        assert gradient.isfinite().all() and gradient.abs().sum() > 0
    assert student.grad.dtype == dtype and layer.weight.grad.dtype == torch.float32


@pytest.mark.parametrize("resize", ["student", "teacher"])
def test_other_sizes_are_resized_where_asked(resize):
    student, teacher = maps(sizes=[(16, 20), (8, 10)]), maps(sizes=[(8, 10), (8, 10)], seed=1)
    sides = {"student": student[0], "teacher": teacher[0]}
    size = {"student": (8, 10), "teacher": (16, 20)}[resize]
    sides[resize] = F.interpolate(sides[resize], size, mode="bilinear")
    expected = channel_correlation_loss(*sides.values()) + channel_correlation_loss(student[1], teacher[1])
    term = PKDLoss(8, num_levels=2, weight=1, resize=resize)(student, teacher)["loss_pkd"]
    torch.testing.assert_close(term, expected)


def test_other_sizes_are_an_error_else():
    with pytest.raises(ValueError, match=r"must agree in N, H and W, got \(2, 8, 16, 20\) and \(2, 8, 8, 10\)"):
        PKDLoss(8, num_levels=1)(maps()[:1], maps()[1:2])
    other = [torch.zeros(3, 8, 16, 20)]
    with pytest.raises(ValueError, match="must agree in N, got"):
        PKDLoss(8, num_levels=1, resize="student")(maps()[:1], other)


@pytest.mark.parametrize("kind", [PKDLoss, fbkd_ops.FBKDLoss])
def test_no_loss_is_made_for_features_of_other_sizes(kind):
    with pytest.raises(ValueError, match="must agree in N, H and W"):
        kind.from_features(maps()[:1], maps()[1:2])


def test_it_is_made_for_features():
    student, teacher = maps(8), maps(12, sizes=SIZES[1:] + SIZES[-1:])
    loss = PKDLoss.from_features(student, teacher, resize="student", preset="one_stage")
    assert loss.widths == [(8, 12)] * 4 and loss.weights == [10.0] * 4
    assert loss(student, teacher)["loss_pkd"].isfinite()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"preset": "paper"}, ValueError, "preset must be one of 'two_stage', 'one_stage', got 'paper'"),
        ({"preset": "two-stage"}, ValueError, "did you mean 'two_stage'"),
        ({"weight": -1}, ValueError, "weight must be a number >= 0, got -1"),
        ({"weight": [1, 2]}, ValueError, "weight"),
        ({"weight": "6"}, (TypeError, ValueError), "weight"),
        ({"eps": 0}, ValueError, "eps must be a number > 0, got 0"),
        ({"resize": "both"}, ValueError, "resize must be one of 'student', 'teacher', got 'both'"),
        ({"num_levels": 0}, ValueError, "num_levels must be an int >= 1, got 0"),
        ({"student_channels": 0}, ValueError, "student_channels must be >= 1, got 0"),
        ({"student_channels": 8.0}, TypeError, "student_channels must be an int or a list of ints, got 8.0"),
        ({"teacher_channels": [8, 8]}, ValueError, "levels|entries"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    if "teacher_channels" in arguments:
        arguments["num_levels"] = 4
    with pytest.raises(error, match=message):
        PKDLoss(**{"student_channels": 8, **arguments})


@pytest.mark.parametrize(
    "student, teacher, message",
    [
        (maps()[:3], maps()[:3], "must have 4 levels, as the loss was made with, got 3"),
        (maps(7), maps(), r"student_features\[0\] must have 8 channels, got 7"),
        (maps(), maps(7), r"teacher_features\[0\] must have 8 channels, got 7"),
        (maps(), maps()[:3], "the same number of levels"),
    ],
)
def test_bad_features_are_named(student, teacher, message):
    with pytest.raises(ValueError, match=message):
        PKDLoss(8)(student, teacher)


def test_a_hook_that_would_never_run_is_refused():
    loss = PKDLoss(8, 12, num_levels=1)
    loss.adaptations[0].register_forward_hook(lambda *_: None)
    with pytest.raises(RuntimeError, match="adaptations.0"):
        loss(maps(8)[:1], maps(12)[:1])


def test_it_warns_as_the_fbkd_loss_does():
    student, teacher = [x.requires_grad_() for x in maps()], maps(seed=1)
    loss = PKDLoss(8)
    with pytest.warns(UserWarning, match="student_features carry no gradient"):
        loss(maps(), teacher)
    teacher[2][0, 0, 0, 0] = float("nan")
    with pytest.warns(UserWarning, match=r"terms of the loss are not finite: level 2: loss_pkd \(the teacher features"):
        loss(student, teacher)


def test_a_compiled_loss_is_one_graph():
    torch._dynamo.reset()
    loss = PKDLoss(8, [8, 8, 12, 8])
    student, teacher = [x.requires_grad_() for x in maps()], [*maps()[:2], *maps(12)[2:3], *maps()[3:]]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected, result = loss(student, teacher)["loss_pkd"], compiled(student, teacher)["loss_pkd"]
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


def distiller(**options):
    torch.manual_seed(0)
    student, teacher = Detector(8), Detector(12)
    return Distiller(student, teacher, PKDLoss(8, 12, num_levels=2), student_layers=["stem", "deep"], **options)


def test_in_a_distiller():
    module = distiller()
    losses = module(torch.randn(2, 3, 32, 32))
    assert set(losses) == {"loss_own", "loss_pkd"} and list(module.loss.term_names) == ["loss_pkd"]
    fbkd_ops.sum_losses(losses).backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_its_weight_can_set_itself():
    module = distiller(gradient_share=0.5, share_every=1)
    optimizer = torch.optim.SGD(module.parameters(), 0.0)
    for _ in range(4):
        optimizer.zero_grad()
        fbkd_ops.sum_losses(module(torch.randn(2, 3, 32, 32))).backward()
        optimizer.step()
    module(torch.randn(2, 3, 32, 32))
    assert 0.4 < module.weights()["fbkd_gradient_share"] < 0.6
