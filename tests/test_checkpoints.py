"""A distiller's checkpoint: shared tensors once, read under any of their names, and a plain student's."""

import copy
import pickle

import pytest
import torch
from detectors import Detector, images, make_distiller
from torch import nn

from fbkd_ops import Distiller, FBKDLoss

TARGETS = torch.tensor(1.0)


class Tied(Detector):
    """Parameters, a buffer and a whole module under two names; a buffer in no state dict is one of another's."""

    def __init__(self, width=4):
        super().__init__(width)
        self.box_head, self.mirror = self.head, nn.Conv2d(width, width, 3, stride=2, padding=1)
        self.mirror.weight = self.backbone.down.weight
        anchors = torch.rand(3)
        self.register_buffer("a_cache", anchors, persistent=False)
        self.register_buffer("anchors", anchors)
        self.register_buffer("anchors_again", anchors)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("empty_too", torch.zeros(0))


SHARED = {"box_head.weight", "box_head.bias", "mirror.weight", "anchors_again"}


def tied_distiller():
    torch.manual_seed(0)
    return Distiller(Tied(4), Detector(6), FBKDLoss(4, 6, num_levels=2), student_layers="backbone", warmup_steps=9)


def test_shared_tensors_are_in_the_state_once():
    distiller = tied_distiller()
    state, own = distiller.state_dict(), distiller.student.state_dict()
    names = {name.removeprefix("student.") for name in state if name.startswith("student.")}
    assert names == set(own) - SHARED and set(own) > SHARED
    memory = [value.data_ptr() for value in state.values() if value.numel()]
    assert len(memory) == len(set(memory))
    inside = nn.Sequential(distiller)
    assert list(inside.state_dict()) == [f"0.{name}" for name in state]


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies_do_so_too(make):
    distiller = tied_distiller()
    assert list(make(distiller).state_dict()) == list(distiller.state_dict())
    changed = {name: value + 1 for name, value in distiller.state_dict().items()}
    other = make(distiller)
    other.load_state_dict(changed)
    assert torch.equal(other.student.mirror.weight, changed["student.backbone.down.weight"])
    assert not torch.equal(distiller.student.mirror.weight, other.student.mirror.weight)


def all_names(distiller):
    return {
        **distiller.state_dict(),
        **{f"student.{name}": value for name, value in distiller.student.state_dict().items()},
    }


def last_names(distiller):
    """As a writer that keeps the other name of each shared tensor."""
    state = all_names(distiller)
    for name in ("head.weight", "head.bias", "backbone.down.weight", "anchors"):
        del state[f"student.{name}"]
    return state


@pytest.mark.parametrize("states", [lambda distiller: distiller.state_dict(), all_names, last_names])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_strict_load_takes_any_of_the_names(states, prefix):
    distiller, other = tied_distiller(), tied_distiller()
    with torch.no_grad():
        for tensor in distiller.state_dict().values():
            tensor.add_(1)
    state = {prefix + name: value for name, value in states(distiller).items()}
    (nn.Sequential(other) if prefix else other).load_state_dict(state)
    for name, value in distiller.student.state_dict().items():
        assert torch.equal(other.student.state_dict()[name], value), name
    assert other.student.mirror.weight is other.student.backbone.down.weight


def test_a_shared_tensor_that_is_missing_is_named():
    distiller = tied_distiller()
    state = distiller.state_dict()
    del state["student.head.bias"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"student.head.bias", "student.box_head.bias"'):
        distiller.load_state_dict(state)


def run(distiller, optimizer, steps):
    totals = []
    for seed in steps:
        torch.manual_seed(seed)
        total = sum(distiller(images(), TARGETS).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    return totals


def test_tied_students_resume_to_bit_equal_losses(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    distiller, other = tied_distiller(), tied_distiller()
    optimizers = [torch.optim.SGD(each.parameters(), lr=0.01, momentum=0.9) for each in (distiller, other)]
    run(distiller, optimizers[0], range(3))
    safetensors.save_file(distiller.state_dict(), tmp_path / "model.safetensors")
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    other.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    assert other.step == 3
    assert run(other, optimizers[1], range(3, 6)) == run(distiller, optimizers[0], range(3, 6))


def wrappings(student):
    return {"plain": student, "compiled": torch.compile(student, backend="eager")}


@pytest.mark.parametrize("wrapping", ["plain", "compiled"])
@pytest.mark.parametrize("prefix", ["", "0."])
def test_a_plain_students_checkpoint_lands_in_the_student(wrapping, prefix):
    distiller, source = tied_distiller(), Tied(4)
    student = wrappings(distiller.student)[wrapping]
    distiller = Distiller(student, distiller.teacher, distiller.loss, student_layers="backbone")
    loss = copy.deepcopy(distiller.loss.state_dict())
    state = {prefix + name: value for name, value in source.state_dict().items()}
    del state[f"{prefix}head.weight"]  # the other name is there
    result = (nn.Sequential(distiller) if prefix else distiller).load_state_dict(state, strict=False)
    inner = getattr(distiller.student, "_orig_mod", distiller.student)
    for name, value in source.state_dict().items():
        assert torch.equal(inner.state_dict()[name], value), name
    assert result.unexpected_keys == [] and all("loss" in name or "_extra" in name for name in result.missing_keys)
    assert all(torch.equal(value, loss[name]) for name, value in distiller.loss.state_dict().items())


@pytest.mark.parametrize("strict", [False, True])
def test_a_checkpoint_of_another_model_is_an_error(strict):
    distiller = make_distiller()
    state = {f"model.{name}": value for name, value in distiller.student.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"neither a Distiller's, with names like 'student.*like 'model.backbone"):
        distiller.load_state_dict(state, strict=strict)
    state |= distiller.loss.state_dict(prefix="loss.")
    with pytest.raises(RuntimeError, match="none of them would be loaded into the student"):
        distiller.load_state_dict(state, strict=strict)


def test_a_part_of_a_checkpoint_is_taken_as_ever():
    distiller = make_distiller()
    loss = distiller.loss.state_dict(prefix="loss.")
    assert distiller.load_state_dict(loss, strict=False).unexpected_keys == []
    assert distiller.load_state_dict({}, strict=False).unexpected_keys == []
    partial = {"student.head.weight": torch.ones(1, 4, 1, 1), "student.old_head.weight": torch.ones(1)}
    assert distiller.load_state_dict(partial, strict=False).unexpected_keys == ["student.old_head.weight"]
    assert torch.equal(distiller.student.head.weight, torch.ones(1, 4, 1, 1))


def test_the_step_in_the_state_is_on_the_cpu():
    with torch.device("meta"):
        state = make_distiller().get_extra_state()
    assert state.device.type == "cpu" and int(state) == 0
