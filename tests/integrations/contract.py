"""What every framework's example has to show."""

import copy

import torch
from detectors import TERMS
from helpers import randomise


class Calls(list):
    """The inputs and the output of every call of a module."""

    def __init__(self, module):
        super().__init__()
        module.register_forward_hook(lambda module, inputs, output: self.append((inputs, output)))


def check_terms(distiller, call, by_hand):
    """`call` gives what the distiller returns, with the terms that the loss gives for the features of `by_hand`.

    `by_hand` takes a copy of the teacher from before the call, and gives the student's and that teacher's features of
    the batch of the last call.
    """
    distiller.train()
    assert not any(module.training for module in distiller.teacher.modules())
    randomise(distiller.loss)
    loss, teacher = copy.deepcopy(distiller.loss), copy.deepcopy(distiller.teacher).eval()
    output = call()
    with torch.no_grad():
        expected = loss(*by_hand(teacher))
    assert set(expected) == TERMS
    for name, term in expected.items():
        assert torch.isfinite(term) and term > 0, name
    torch.testing.assert_close(distiller.terms(), expected)
    return output


def check_step(distiller, train_step, heads, run_teacher):
    """A step moves the student and the loss, leaves the teacher, and runs none of its `heads`.

    `run_teacher` runs the teacher outside of the distiller, with all of its heads.
    """
    randomise(distiller.loss)
    sides = {"student": distiller.student, "loss": distiller.loss}
    before = {side: copy.deepcopy(module.state_dict()) for side, module in sides.items()}
    teacher = copy.deepcopy(distiller.teacher.state_dict())
    calls = [Calls(head) for head in heads]
    keys = list(distiller.student.state_dict())
    train_step()
    for name, parameter in distiller.named_parameters():
        has_gradient = parameter.grad is not None and bool(torch.isfinite(parameter.grad).all())
        assert has_gradient or not parameter.requires_grad, name
    for side, module in sides.items():
        parameters = dict(module.named_parameters())
        moved = [name for name in parameters if not torch.equal(parameters[name], before[side][name])]
        assert len(moved) > len(parameters) / 2, side
    assert all(torch.equal(value, teacher[name]) for name, value in distiller.teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in distiller.teacher.parameters())
    assert not any(map(len, calls))
    assert list(distiller.student.state_dict()) == keys
    with torch.no_grad():
        run_teacher()
    assert all(map(len, calls))
    assert not any(key.startswith("student.") or "teacher" in key for key in keys)


def check_predictions(distiller, predict):
    """In eval mode the distiller gives what a plain student does; `predict` gives tensors of a model's."""
    distiller.eval()
    plain = copy.deepcopy(distiller.student)
    with torch.no_grad():
        torch.testing.assert_close(predict(distiller), predict(plain))
    assert distiller.terms() == {}
