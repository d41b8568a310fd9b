"""Loading MMRazor's connectors and the authors' layers: what is refused, and that nothing is copied then.

Values: test_oracle.py.
"""

from collections import UserList

import numpy as np
import pytest
import torch
from helpers import randomise
from torch import nn

from fbkd_ops import FBKDLoss
from fbkd_ops.weights.mmrazor import load_authors, load_checkpoint, load_connectors


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
            "student_connectors must be a list with one entry per level, got dict",
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
    with pytest.raises(ValueError, match="teacher_connectors must have one entry per level, expected 1, got 2"):
        load_connectors(one_level(), [StudentConnector()], [TeacherConnector()] * 2)


def checkpoint(levels=2, student="loss_s{}_sfeat", teacher="loss_s{}_tfeat", prefix="distiller.connectors."):
    """The state dict of an algorithm with random connectors, and of other parts."""
    state = {"architecture.head.weight": torch.zeros(1), "distiller.distill_losses.loss_s0.weight": torch.zeros(1)}
    for level in range(levels):
        for name, connector in ((student, StudentConnector()), (teacher, TeacherConnector())):
            connector = randomise(connector, seed=level)
            state |= connector.state_dict(prefix=f"{prefix}{name.format(level)}.")
    return state


def two_levels():
    return randomise(FBKDLoss(4, num_levels=2, preset="mmrazor", stride=16, inter_channels=1), seed=9)


def test_a_single_levels_connectors_need_no_number():
    loss, expected = randomise(one_level()), one_level()
    state = checkpoint(1, "student", "teacher")
    load_connectors(expected, [student_connector(0)], [teacher_connector(0)])
    load_checkpoint(loss, state, student_names="student", teacher_names="teacher")
    assert all(torch.equal(value, loss.state_dict()[key]) for key, value in expected.state_dict().items())


def wrapped(module):
    """Compiled and averaged; nothing of both runs here."""
    return torch.compile(torch.optim.swa_utils.AveragedModel(module))


def test_wrapped_losses_and_connectors_are_looked_through():
    inner, expected = randomise(one_level()), one_level()
    student, teacher = student_connector(0), teacher_connector(0)
    load_connectors(expected, [student], [teacher])
    whole = torch.compile(inner)
    load_connectors(whole, [wrapped(student)], [wrapped(teacher)])
    assert all(torch.equal(value, inner.state_dict()[key]) for key, value in expected.state_dict().items())
    randomise(inner)
    load_checkpoint(whole, checkpoint(1))
    assert all(torch.equal(value, inner.state_dict()[key]) for key, value in expected.state_dict().items())
    layers = loss_of_authors()
    load_authors(torch.compile(layers), AuthorsDetector().state_dict())
    with pytest.raises(ValueError, match="TeacherConnector has no student_non_local"):
        load_connectors(whole, [wrapped(teacher)], [teacher])


@pytest.mark.parametrize("is_nested", [False, True])
def test_a_checkpoints_connectors_are_copied(is_nested):
    loss, state = two_levels(), checkpoint()
    load_checkpoint(loss, {"state_dict": state, "meta": {}} if is_nested else state)
    expected = two_levels()
    connectors = [[m(i) for i in range(2)] for m in (student_connector, teacher_connector)]
    load_connectors(expected, *connectors)
    assert all(torch.equal(value, loss.state_dict()[key]) for key, value in expected.state_dict().items())


def student_connector(seed):
    return randomise(StudentConnector(), seed=seed)


def teacher_connector(seed):
    return randomise(TeacherConnector(), seed=seed)


@pytest.mark.parametrize(
    "student,teacher",
    [("s_{}", "t_{}"), (["s_0", "s_1"], ["t_0", "t_1"]), (np.array(["s_0", "s_1"]), UserList(["t_0", "t_1"]))],
)
def test_names_and_prefix_of_a_checkpoints_connectors(student, teacher):
    loss, expected = two_levels(), two_levels()
    load_checkpoint(expected, checkpoint())
    state = checkpoint(student="s_{}", teacher="t_{}", prefix="module.connectors.")
    load_checkpoint(loss, state, student_names=student, teacher_names=teacher, prefix="module.connectors.")
    assert all(torch.equal(value, loss.state_dict()[key]) for key, value in expected.state_dict().items())


@pytest.mark.parametrize(
    "arguments,error,message",
    [
        (("loss", {}), TypeError, "loss must be an FBKDLoss, got str"),
        ((None, []), TypeError, "checkpoint must be a state dict, or a dict that has one, got list"),
        (
            (None, checkpoint(1)),
            ValueError,
            "checkpoint has no connectors loss_s1_sfeat, loss_s1_tfeat, under 'distiller.connectors.' are "
            "loss_s0_sfeat, loss_s0_tfeat",
        ),
        ((None, {}), ValueError, "has no connectors loss_s0_sfeat, .*, under 'distiller.connectors.' are none"),
        ((None, checkpoint(3)), ValueError, "checkpoint has a connector loss_s2_sfeat, the loss has 2 levels"),
        ((None, {}, ["a"]), ValueError, "student_names must have one entry per level, expected 2, got 1"),
        ((None, {}, 3), TypeError, "student_names must be a pattern or a list of names, got int"),
        ((None, {}, ["a", 1]), TypeError, "each entry of student_names must be a text, got int"),
        (
            (None, checkpoint(), "loss_s"),
            ValueError,
            "student_names must have {} for the level's number .* got 'loss_s'",
        ),
    ],
)
def test_other_checkpoints_are_refused(arguments, error, message):
    loss, state, *names = arguments
    options = {"student_names": names[0]} if names else {}
    with pytest.raises(error, match=message):
        load_checkpoint(loss or two_levels(), state, **options)


def test_a_checkpoint_with_a_key_too_few_changes_nothing():
    loss, state = two_levels(), checkpoint()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    del state["distiller.connectors.loss_s1_sfeat.adaptation_layers.bias"]
    with pytest.raises(ValueError, match="level 1: the connectors do not fit .* missing feature_adaptation.bias"):
        load_checkpoint(loss, state)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


class AuthorsBlock(nn.Module):
    """Names of the authors' block, whose first level pools."""

    def __init__(self, channels, inner, stride):
        super().__init__()

        def projection():
            layer = nn.Conv2d(channels, inner, 1)
            return nn.Sequential(layer, nn.MaxPool2d((stride, stride))) if stride > 1 else layer

        self.g, self.phi, self.theta = projection(), projection(), nn.Conv2d(channels, inner, 1)
        self.W = nn.Sequential(nn.Conv2d(inner, channels, 1), nn.BatchNorm2d(channels))


class AuthorsDetector(nn.Module):
    """Names of the authors' two-stage detector: a list a layer, with an entry a level."""

    def __init__(self, channels=4, inner=(1, 2), strides=(8, 1)):
        super().__init__()
        self.head = nn.Linear(2, 2)
        levels = range(len(strides))
        self.adaptation_layers = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in levels)
        self.channel_wise_adaptation = nn.ModuleList(nn.Linear(channels, channels) for _ in levels)
        self.spatial_wise_adaptation = nn.ModuleList(nn.Conv2d(1, 1, 3, padding=1) for _ in levels)
        self.non_local_adaptation = nn.ModuleList(nn.Conv2d(channels, channels, 1) for _ in levels)
        self.student_non_local = nn.ModuleList(
            AuthorsBlock(channels, *level) for level in zip(inner, strides, strict=True)
        )
        self.teacher_non_local = nn.ModuleList(
            AuthorsBlock(channels, *level) for level in zip(inner, strides, strict=True)
        )


def loss_of_authors():
    return FBKDLoss(4, num_levels=2, preset="two_stage", stride=[8, 1], inter_channels=[1, 2])


@pytest.mark.parametrize("prefix,is_nested", [("", False), ("module.", True)])
def test_the_authors_layers_are_copied(prefix, is_nested):
    loss, detector = randomise(loss_of_authors(), seed=9), randomise(AuthorsDetector())
    state = detector.state_dict(prefix=prefix)
    state["unrelated.adaptation_layers.0.weight"] = torch.zeros(1)
    load_authors(loss, {"state_dict": state} if is_nested else state, prefix=prefix)
    level, other = loss.levels[0], loss.levels[1]
    pairs = [
        (level.feature_adaptation.weight, detector.adaptation_layers[0].weight),
        (other.feature_adaptation.bias, detector.adaptation_layers[1].bias),
        (other.channel_adaptation.weight, detector.channel_wise_adaptation[1].weight),
        (level.spatial_adaptation.weight, detector.spatial_wise_adaptation[0].weight),
        (other.relation_adaptation.weight, detector.non_local_adaptation[1].weight),
        (level.student_non_local.g.weight, detector.student_non_local[0].g[0].weight),
        (other.student_non_local.g.weight, detector.student_non_local[1].g.weight),
        (other.teacher_non_local.phi.bias, detector.teacher_non_local[1].phi.bias),
        (level.teacher_non_local.theta.weight, detector.teacher_non_local[0].theta.weight),
        (level.teacher_non_local.out.bias, detector.teacher_non_local[0].W[0].bias),
        (other.student_non_local.norm.running_mean, detector.student_non_local[1].W[1].running_mean),
    ]
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    copied = sum(value.numel() for key, value in detector.state_dict().items() if not key.startswith("head."))
    assert sum(value.numel() for value in loss.state_dict().values()) == copied


def test_authors_layers_that_do_not_fit_are_listed():
    loss, state = randomise(loss_of_authors(), seed=9), AuthorsDetector().state_dict()
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    del state["adaptation_layers.1.bias"], state["student_non_local.0.g.0.weight"]
    state["teacher_non_local.2.theta.weight"] = torch.zeros(1)
    state["channel_wise_adaptation.0.weight"] = torch.zeros(3, 4)
    with pytest.raises(ValueError) as caught:
        load_authors(loss, state)
    message = str(caught.value)
    assert "missing levels.0.student_non_local.g.weight, levels.1.feature_adaptation.bias" in message
    assert "surplus levels.2.teacher_non_local.theta.weight" in message
    assert "levels.0.channel_adaptation.weight must have shape (4, 4), got (3, 4)" in message
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_a_state_dict_without_authors_layers_is_refused():
    with pytest.raises(ValueError, match="do not fit the loss: missing levels.0"):
        load_authors(loss_of_authors(), {"head.weight": torch.zeros(1)})
    with pytest.raises(TypeError, match="loss must be an FBKDLoss, got Linear"):
        load_authors(nn.Linear(1, 1), {})
