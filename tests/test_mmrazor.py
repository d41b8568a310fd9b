"""Loading MMRazor's connectors: what is refused, and that nothing is copied then. Values: test_oracle.py."""

import pytest
import torch
from torch import nn

from fbkd_ops import FBKDLoss
from fbkd_ops.integrations.mmrazor import load_connectors


class ConvModule(nn.Module):
    """mmcv's wrapper of a convolution and its norm, as far as names go."""

    def __init__(self, inputs, outputs, norm=False):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 1, bias=not norm)
        if norm:
            self.bn = nn.BatchNorm2d(outputs)


class Block(nn.Module):
    """The module structure of MMRazor's NonLocal2dMaxpoolNstride."""

    def __init__(self, channels, inner, maxpool_stride, mode="dot_product"):
        super().__init__()
        self.mode, self.use_scale = mode, True
        pool = nn.MaxPool2d((maxpool_stride, maxpool_stride))

        def pooled():
            return nn.Sequential(nn.Sequential(ConvModule(channels, inner), nn.MaxPool2d((2, 2))), pool)

        self.g, self.phi, self.theta = pooled(), pooled(), ConvModule(channels, inner)
        self.conv_out = ConvModule(inner, channels, norm=True)


class TeacherConnector(nn.Module):
    side = "teacher"

    def __init__(self, channels=4, inner=1, maxpool_stride=8, temperature=0.5, mode="dot_product"):
        super().__init__()
        self.spatial_T = self.channel_T = temperature
        setattr(self, f"{self.side}_non_local", Block(channels, inner, maxpool_stride, mode))


class StudentConnector(TeacherConnector):
    side = "student"

    def __init__(self, channels=4, **arguments):
        super().__init__(channels, **arguments)
        self.channel_wise_adaptation = nn.Linear(channels, channels)
        self.spatial_wise_adaptation = nn.Conv2d(1, 1, 3, padding=1)
        self.adaptation_layers = nn.Conv2d(channels, channels, 1)
        self.non_local_adaptation = nn.Conv2d(channels, channels, 1)


def one_level(**overrides):
    return FBKDLoss(4, num_levels=1, preset="mmrazor", **overrides)


@pytest.mark.parametrize("as_state", [False, True])
def test_every_entry_is_copied(as_state):
    loss, student, teacher = one_level(), StudentConnector(), TeacherConnector()
    connectors = [m.state_dict() if as_state else m for m in (student, teacher)]
    load_connectors(loss, connectors[:1], connectors[1:])
    level = loss.levels[0]
    pairs = [
        (level.feature_adaptation.weight, student.adaptation_layers.weight),
        (level.channel_adaptation.bias, student.channel_wise_adaptation.bias),
        (level.spatial_adaptation.weight, student.spatial_wise_adaptation.weight),
        (level.relation_adaptation.weight, student.non_local_adaptation.weight),
        (level.student_non_local.g.weight, student.student_non_local.g[0][0].conv.weight),
        (level.student_non_local.phi.bias, student.student_non_local.phi[0][0].conv.bias),
        (level.teacher_non_local.theta.weight, teacher.teacher_non_local.theta.conv.weight),
        (level.teacher_non_local.out.weight, teacher.teacher_non_local.conv_out.conv.weight),
        (level.teacher_non_local.norm.running_var, teacher.teacher_non_local.conv_out.bn.running_var),
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    theirs = [*student.parameters(), *teacher.parameters()]
    assert sum(p.numel() for p in loss.parameters()) == sum(p.numel() for p in theirs)
    assert len(list(loss.parameters())) == len(theirs)


@pytest.mark.parametrize(
    "student,teacher,message",
    [
        (
            StudentConnector(maxpool_stride=4),
            TeacherConnector(),
            "level 0, student connector: stride is 8, the loss has 16",
        ),
        (
            StudentConnector(),
            TeacherConnector(mode="gaussian"),
            "level 0, teacher connector: mode is 'gaussian', the loss has 'dot_product'",
        ),
        (
            StudentConnector(temperature=0.1),
            TeacherConnector(),
            "spatial_temperature is 0.1, the loss has 0.5; channel_temperature is 0.1",
        ),
        (StudentConnector(inner=2), TeacherConnector(), r"student_non_local.g.bias must have shape \(1,\), got \(2,\)"),
        (
            StudentConnector(channels=3),
            TeacherConnector(),
            r"feature_adaptation.weight must have shape \(4, 4, 1, 1\), got \(3, 3, 1, 1\)",
        ),
    ],
)
def test_connectors_that_do_not_fit_are_refused(student, teacher, message):
    loss = one_level()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_connectors(loss, [student], [teacher])
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (("loss", [StudentConnector()], [TeacherConnector()]), TypeError, "loss must be an FBKDLoss, got str"),
        (
            (None, {"a": StudentConnector()}, [TeacherConnector()]),
            TypeError,
            "student_connectors must be a list with one entry a level, got dict",
        ),
        (
            (None, [StudentConnector()], [None]),
            TypeError,
            "level 0, teacher connector must be a module or a state dict, got NoneType",
        ),
        (
            (None, [TeacherConnector()], [StudentConnector()]),
            ValueError,
            "TeacherConnector has no student_non_local, is it the other side's?",
        ),
    ],
)
def test_other_things_than_connectors_are_refused(arguments, error, message):
    loss, student, teacher = arguments
    with pytest.raises(error, match=message):
        load_connectors(loss or one_level(), student, teacher)


def test_another_pool_order_is_refused():
    with pytest.raises(ValueError, match="pool_order is 'nested', the loss has 'single'"):
        load_connectors(one_level(pool_order="single"), [StudentConnector()], [TeacherConnector()])


def test_missing_and_surplus_keys_are_listed():
    student, teacher = StudentConnector().state_dict(), TeacherConnector().state_dict()
    del student["adaptation_layers.bias"], teacher["teacher_non_local.theta.conv.weight"]
    student["head.weight"] = torch.zeros(1)
    teacher["adaptation_layers.bias"] = torch.zeros(4)
    with pytest.raises(ValueError) as caught:
        load_connectors(one_level(), [student], [teacher])
    message = str(caught.value)
    assert "missing feature_adaptation.bias, teacher_non_local.theta.weight" in message
    assert "surplus adaptation_layers.bias, head.weight" in message


def test_the_number_of_connectors_is_checked():
    with pytest.raises(ValueError, match="teacher_connectors must have one entry a level, expected 1, got 2"):
        load_connectors(one_level(), [StudentConnector()], [TeacherConnector()] * 2)
