"""The terms' weight over a training: parts of its length, and a decay."""

import copy
import math

import pytest
import torch
from detectors import images, make_distiller
from helpers import TEST_ALL

from fbkd_ops.training.schedule import Schedule

TARGETS = torch.tensor(1.0)


@pytest.mark.parametrize(
    "stop,total,end",
    [(0.9, 10, 9), (0.29, 100, 29), (0.5, 5, 2), (0.9, 7, 6), (1e-9, 10, 0), (7, 10, 7), (None, 10, None)],
)
def test_a_part_of_the_length_is_a_step(stop, total, end):
    schedule = Schedule(stop_step=stop, total_steps=total).checked()
    assert schedule.end() == end and (end is None or isinstance(end, int))
    for step in range(total + 1):
        assert schedule.factor(step) == float(end is None or step < end)


@pytest.mark.parametrize(
    "settings,begin,end",
    [
        (dict(total_steps=10), 0, 10),
        (dict(total_steps=10, stop_step=6), 0, 6),
        (dict(stop_step=6), 0, 6),
        (dict(total_steps=10, stop_step=0.8, start_step=1, warmup_steps=3), 4, 8),
        (dict(total_steps=2, warmup_steps=1), 1, 2),
    ],
)
def test_a_cosine_from_the_warm_up_to_the_end(settings, begin, end):
    schedule = Schedule(decay="cosine", **settings).checked()
    plain = schedule._replace(decay=None)
    factors = [schedule.factor(step) for step in range(14)]
    assert factors[:begin] == [plain.factor(step) for step in range(begin)]
    assert factors[begin] == 1.0 and factors[end:] == [0.0] * (14 - end)
    for step in range(begin, end):
        part = (step - begin) / (end - begin)
        assert factors[step] == pytest.approx(math.cos(math.pi * part / 2) ** 2, rel=1e-12) and factors[step] > 0


def test_the_distiller_multiplies_its_weight():
    distiller = make_distiller(weight=0.5, decay="cosine", total_steps=4)
    distiller.student.dropout.p = 0.0
    x = images()
    full = copy.deepcopy(make_distiller().loss)(distiller.student.backbone(x), distiller.teacher.backbone(x))
    expected = [0.5, 0.25 * (1 + math.cos(math.pi / 4)), 0.25, 0.25 * (1 - math.cos(math.pi / 4)), 0.0, 0.0]
    for weight in expected:
        assert distiller.step_weight() == pytest.approx(weight, abs=1e-15)
        losses = distiller(x, TARGETS)
        for name, term in full.items():
            torch.testing.assert_close(losses[name], weight * term.detach(), rtol=1e-5, atol=1e-7, check_dtype=False)


def test_resumed_bit_for_bit():
    schedule = dict(warmup_steps=2, decay="cosine", stop_step=0.9, total_steps=8, gradient_share=0.2, share_every=1)

    def train(distiller, steps):
        optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
        totals = []
        for step in steps:
            total = sum(distiller(torch.full((2, 3, 8, 8), 0.1 * step), TARGETS).values())
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        return totals

    straight = make_distiller(**schedule)
    straight.student.dropout.p = 0.0
    resumed = copy.deepcopy(make_distiller(**schedule))
    resumed.student.dropout.p = 0.0
    train(straight, range(4))
    resumed.load_state_dict(straight.state_dict())
    resumed.teacher.load_state_dict(straight.teacher.state_dict())
    assert resumed.step_weight() == straight.step_weight() < 1
    assert train(resumed, range(4, 9)) == train(straight, range(4, 9))


def test_the_length_may_come_until_the_first_step():
    for settings, message in (
        (dict(stop_step=0.5), "stop_step=0.5 needs the length of the training: give total_steps"),
        (dict(decay="cosine"), "decay without a stop_step needs the length of the training: give total_steps"),
    ):
        distiller = make_distiller(**settings)
        with pytest.raises(ValueError, match=message):
            distiller(images(), TARGETS)
        distiller.total_steps = 4
        distiller(images(), TARGETS)
        with pytest.raises(ValueError, match="total_steps must be None or an int >= 1, got 0"):
            distiller.total_steps = 0
        assert distiller.total_steps == 4
    assert make_distiller(decay="cosine", stop_step=3).step_weight() == 1


@pytest.mark.parametrize(
    "settings,message",
    [
        (dict(stop_step=1.0), r"stop_step must be None, an int >= start_step \(0\), or a float .* got 1.0"),
        (dict(stop_step=0.0), "stop_step must be None, .* got 0.0"),
        (dict(stop_step=True), "stop_step must be None, .* got True"),
        (dict(stop_step=float("nan")), "stop_step must be None, .* got nan"),
        (dict(stop_step=0.5, total_steps=8, start_step=5), r"end at step 4 \(stop_step=0.5, total_steps=8\).* least 5"),
        (dict(total_steps=2.5), "total_steps must be None or an int >= 1, got 2.5"),
        (dict(decay="linear"), "decay must be one of 'cosine', got 'linear'"),
        (dict(decay="cosine", stop_step=3, warmup_steps=3), "expected at least 4: start_step . warmup_steps . 1"),
    ],
)
def test_schedules_that_cannot_be_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        make_distiller(**settings)


@pytest.mark.skipif(not TEST_ALL, reason="seconds: make test-all")
def test_a_compiled_student_has_the_same_schedule():
    torch._dynamo.reset()
    eager = make_distiller(warmup_steps=2, decay="cosine", stop_step=5)
    eager.student.dropout.p = 0.0
    compiled, x = copy.deepcopy(eager), images()
    compiled.student.compile(backend="aot_eager", fullgraph=True)
    for _ in range(6):
        expected, losses = eager(x, TARGETS), compiled(x, TARGETS)
        assert all(torch.allclose(losses[name], expected[name], rtol=1e-4) for name in expected)


@pytest.mark.skipif(not TEST_ALL, reason="ten seconds: make test-all")
def test_a_compiled_distiller_has_the_same_schedule():
    torch._dynamo.reset()
    distiller = make_distiller(decay="cosine", stop_step=4)
    distiller.student.dropout.p = 0.0
    eager, x = copy.deepcopy(distiller), images()
    compiled = torch.compile(distiller, backend="eager")
    for _ in range(5):
        expected, losses = eager(x, TARGETS), compiled(x, TARGETS)
        assert all(torch.allclose(losses[name], expected[name], rtol=1e-4) for name in expected)
