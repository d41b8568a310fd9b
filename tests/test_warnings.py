"""What a loss warns of once: gradients on the wrong side, terms that are not finite, parameters nobody updates."""

import copy
import pickle
import warnings

import pytest
import torch
from helpers import randomise

from fbkd_ops import FBKDLoss, use_backend


def make_loss(**overrides):
    return randomise(FBKDLoss(4, num_levels=2, stride=1, **overrides))


def maps(requires_grad=False, device="cpu"):
    return [torch.randn(2, 4, size, size, device=device).requires_grad_(requires_grad) for size in (6, 3)]


def messages(action):
    """The warnings of ``action()``."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(each.message) for each in caught]


def test_nothing_to_warn_of():
    loss = make_loss()
    optimizer = torch.optim.SGD(loss.parameters(), lr=1e-3)

    def train():
        for _ in range(15):
            optimizer.zero_grad()
            sum(loss(maps(requires_grad=True), maps()).values()).backward()
            optimizer.step()

    assert messages(train) == []


def test_students_without_gradient():
    loss = make_loss()
    (message,) = messages(lambda: [loss(maps(), maps()) for _ in range(3)])
    assert "student_features carry no gradient" in message
    one_level_frozen = [maps(requires_grad=True)[0], maps()[1]]
    assert messages(lambda: make_loss()(one_level_frozen, maps())) == []


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_validation_needs_no_gradient(context):
    loss = make_loss()
    with context():
        assert messages(lambda: loss(maps(), maps())) == []
    assert messages(lambda: loss.eval()(maps(), maps())) == []


def test_teachers_with_gradient():
    loss = make_loss()
    found = messages(lambda: [loss(maps(requires_grad=True), maps(requires_grad=True)) for _ in range(3)])
    (message,) = found
    assert "teacher_features carry a gradient" in message and "torch.no_grad()" in message
    one_level = [maps()[0], maps(requires_grad=True)[1]]
    assert len(messages(lambda: make_loss()(maps(requires_grad=True), one_level))) == 1


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("side,level", [("student", 1), ("teacher", 0)])
def test_terms_that_are_not_finite_name_their_level_and_side(backend, value, side, level):
    student, teacher = maps(), maps()
    (student if side == "student" else teacher)[level][0, 1, 2, 2] = value
    student = [each.requires_grad_() for each in student]
    loss = make_loss()
    with use_backend(backend):
        (message,) = messages(lambda: [loss(student, teacher) for _ in range(2)])
    assert f"level {level}: " in message and f"level {1 - level}" not in message
    assert f"(the {side} features are not)" in message
    named = message.split(f"level {level}: ")[1].split(" (")[0].split(", ")
    assert set(named) == {"feature", "channel", "spatial", "relation"}


def test_a_broken_parameter_names_its_terms_only():
    loss = make_loss()
    with torch.no_grad():
        loss.levels[1].spatial_adaptation.weight.fill_(float("nan"))
    (message,) = messages(lambda: loss(maps(requires_grad=True), maps()))
    assert "level 1: spatial (said once)" in message


def test_a_mask_that_is_not_finite_shows_in_its_term():
    """The feature term's mask is a softmax of means of absolute values: they overflow where the maps do not."""
    loss = make_loss()
    student = [(1e38 * each.sign()).requires_grad_() for each in maps()]
    (message,) = messages(lambda: loss(student, maps()))
    assert "level 0: " in message and "feature" in message and "features are not" not in message


@pytest.mark.gpu
def test_on_a_gpu_terms_are_reported_with_a_later_call():
    loss = make_loss().cuda()
    broken = maps(device="cuda")
    broken[1][0, 0, 0, 0] = float("nan")
    broken = [each.requires_grad_() for each in broken]

    def train():
        loss(broken, maps(device="cuda"))
        torch.cuda.synchronize()
        loss(maps(requires_grad=True, device="cuda"), maps(device="cuda"))

    (message,) = messages(train)
    assert "level 1: " in message and "level 0" not in message


def backward_passes(loss, count, optimizer=None):
    for _ in range(count):
        sum(loss(maps(requires_grad=True), maps()).values()).backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()


def test_parameters_that_nobody_updates():
    loss = make_loss()
    assert messages(lambda: backward_passes(loss, 10)) == []
    (message,) = messages(lambda: backward_passes(loss, 1))
    count = len(list(loss.parameters()))
    assert message.startswith(f"{count} parameters of the loss, 'levels.0.feature_adaptation.weight' among them")
    assert messages(lambda: backward_passes(loss, 15)) == []


def test_one_parameter_that_nobody_updates():
    loss = make_loss()
    left_out = loss.levels[1].relation_adaptation.bias
    optimizer = torch.optim.Adam([each for each in loss.parameters() if each is not left_out])
    (message,) = messages(lambda: backward_passes(loss, 12, optimizer))
    assert "1 parameters of the loss, 'levels.1.relation_adaptation.bias'" in message


@pytest.mark.parametrize(
    "make",
    [
        lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        lambda parameters: torch.optim.AdamW(parameters, foreach=True),
        lambda parameters: torch.optim.AdamW(parameters, fused=True),
    ],
)
def test_any_optimizer_counts_even_if_nothing_changes(make):
    """Version counters move with every update in place, also by zero; those of fused optimizers do not."""
    loss = make_loss()
    optimizer = make(loss.parameters())
    assert messages(lambda: backward_passes(loss, 25, optimizer)) == []


@pytest.mark.parametrize("preset", ["two_stage", "one_stage", "mmrazor"])
def test_a_fused_optimizer_of_a_new_loss(preset):
    """Behind norms that are 0 at first many gradients are 0, and nothing tells which weights the optimizer has."""
    loss = FBKDLoss(4, num_levels=2, preset=preset, stride=2)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.01, momentum=0.9, fused=True)
    assert messages(lambda: backward_passes(loss, 25, optimizer)) == []


def test_accumulated_gradients_are_no_mistake():
    loss = make_loss()
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)

    def train():
        for _ in range(4):
            backward_passes(loss, 8)
            optimizer.step()

    assert messages(train) == []


def test_frozen_parameters_are_not_expected_to_change():
    loss = make_loss()
    for parameter in loss.parameters():
        parameter.requires_grad_(False)
    assert messages(lambda: backward_passes(loss, 12)) == []


def test_copies_watch_for_themselves():
    loss = make_loss()
    backward_passes(loss, 8)
    for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        assert messages(lambda: backward_passes(other, 8)) == []
        assert len(messages(lambda: backward_passes(other, 5))) == 1
