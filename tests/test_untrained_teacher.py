"""A teacher that was never trained is said so in the first training step; no other one is."""

import copy
import warnings

import pytest
import torch
from detectors import images, make_distiller
from helpers import TEST_ALL
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fbkd_ops import FrozenBatchNorm2d, UntrainedTeacherWarning
from fbkd_ops._warnings import TeacherWatch

TARGETS = torch.tensor(1.0)


def with_norms(*norms: nn.Module):
    """A distiller whose teacher has these norms behind its stem and its second convolution."""
    distiller = make_distiller()
    for name, norm in zip(("stem", "down"), norms, strict=False):
        convolution = getattr(distiller.teacher.backbone, name)
        setattr(distiller.teacher.backbone, name, nn.Sequential(convolution, norm).eval())
    return distiller


def found(action) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught if each.category is UntrainedTeacherWarning]


def trained(norm: nn.Module) -> nn.Module:
    norm.train()(torch.randn(2, 6, 4, 4))
    return norm


def loaded(norm: nn.Module) -> nn.Module:
    """From a checkpoint that has no counter."""
    trained(norm).num_batches_tracked.zero_()
    return norm


def only_counted(norm: nn.Module) -> nn.Module:
    norm.num_batches_tracked.fill_(1)
    return norm


def new() -> nn.Module:
    return nn.BatchNorm2d(6)


def test_it_is_said_once_in_the_first_training_step():
    distiller = with_norms(new(), new())
    assert found(lambda: distiller.eval()(images())) == []
    distiller.train()
    (message,) = found(lambda: [distiller(images(), TARGETS) for _ in range(3)])
    assert message.startswith("the teacher was never trained: its 2 BatchNorms have seen no image")
    assert "ones and zeros" in message and "load_state_dict" in message


def test_it_is_said_before_the_terms_begin():
    distiller = with_norms(new())
    distiller.start_step = 5
    assert len(found(lambda: distiller(images(), TARGETS))) == 1


def test_other_weights_are_no_support():
    norm = new()
    nn.init.uniform_(norm.weight)
    zeros = nn.BatchNorm2d(6)
    nn.init.zeros_(zeros.weight)
    (message,) = found(lambda: with_norms(norm)(images(), TARGETS))
    assert "ones and zeros" not in message
    (message,) = found(lambda: with_norms(zeros)(images(), TARGETS))
    assert "ones and zeros" in message


@pytest.mark.parametrize(
    "norms",
    [
        (),
        (trained(new()), new()),
        (new(), loaded(new())),
        (only_counted(new()),),
        (FrozenBatchNorm2d(6),),
        (nn.BatchNorm2d(6, track_running_stats=False),),
        (nn.GroupNorm(2, 6),),
        (nn.LazyBatchNorm2d(),),
    ],
    ids=["none", "one trained", "loaded", "counted", "frozen", "without statistics", "groups", "lazy"],
)
def test_no_other_teacher_is_accused(norms):
    assert found(lambda: with_norms(*norms)(images(), TARGETS)) == []


def test_later_steps_do_not_look(monkeypatch):
    distiller = with_norms(trained(new()))
    distiller(images(), TARGETS)
    monkeypatch.setattr(TeacherWatch, "see", None)
    distiller(images(), TARGETS)


def test_values_that_are_not_there_are_not_looked_at():
    watch = TeacherWatch()
    watch.see(nn.BatchNorm2d(6, device="meta"), lambda: None)
    with FakeTensorMode():
        watch.see(nn.BatchNorm2d(6), lambda: None)
    assert not watch.looked


def test_a_compiled_graph_has_nothing_of_it():
    torch._dynamo.reset()
    watch, teacher = TeacherWatch(), new()

    def step(x):
        if not watch.looked:
            watch.see(teacher, lambda: None)
        return 2 * x

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    assert found(lambda: compiled(torch.ones(1))) == [] and not watch.looked


@pytest.mark.skipif(not TEST_ALL, reason="ten seconds: make test-all")
def test_a_compiled_distiller_trains():
    torch._dynamo.reset()
    distiller = with_norms(trained(new()))
    distiller.student.dropout.p = 0.0
    x, eager = images(), copy.deepcopy(distiller)
    compiled = torch.compile(distiller, backend="eager")
    expected, losses = eager(x, TARGETS), compiled(x, TARGETS)
    for name in expected:
        torch.testing.assert_close(losses[name], expected[name])


def test_a_warning_that_is_meant_can_be_silenced():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=UntrainedTeacherWarning)
        with_norms(new())(10 * images(), TARGETS)
