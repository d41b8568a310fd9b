"""timm's training tasks as their example distils them."""

import copy

import pytest
import torch
from torch import nn

pytest.importorskip("timm.task")

import timm  # noqa: E402
from contract import Calls, check_terms  # noqa: E402
from helpers import randomise  # noqa: E402
from timm.task import ClassificationTask, FeatureDistillationTask  # noqa: E402

from examples.frameworks import timm_task as example  # noqa: E402
from fbkd_ops import Distiller, PKDLoss  # noqa: E402

IMAGES, LABELS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 4])


@pytest.fixture
def models():
    torch.manual_seed(0)
    # Blocks that begin as nothing would learn in the second step only.
    return [timm.create_model(name, num_classes=5, zero_init_last=False) for name in ("resnet18", "resnet26")]


@pytest.fixture
def distiller(models):
    return example.make_distiller(example.make_task(*models), models[1])


def features(model):
    return model.forward_intermediates(IMAGES, indices=[-2, -1], intermediates_only=True)


def test_terms_beside_those_of_logits(distiller):
    stages = [Calls(getattr(distiller.student.trainable_module, name)) for name in ("layer3", "layer4")]
    losses = check_terms(
        distiller,
        lambda: distiller(IMAGES, LABELS),
        lambda teacher: ([calls[-1][1] for calls in stages], features(teacher)),
    )
    own = losses["task_loss"] + losses["kd_loss"]
    torch.testing.assert_close(losses["loss"], own + sum(distiller.terms().values()))


def test_a_step_moves_the_student_and_the_loss_alone(distiller):
    randomise(distiller.loss)
    before, heads = copy.deepcopy(distiller.state_dict()), Calls(distiller.teacher.fc)
    teacher = copy.deepcopy(distiller.teacher.state_dict())
    example.train(distiller, [(IMAGES, LABELS)], lr=0.1)
    moved = {name for name, parameter in distiller.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved >= {name for name in before if name.startswith("student.trainable") and name.endswith("weight")}
    assert "loss.levels.0.student_non_local.g.weight" in moved
    assert not any(name.startswith("student.teacher") for name in moved)
    assert not heads and all(
        torch.equal(value, teacher[name]) for name, value in distiller.teacher.state_dict().items()
    )


def test_what_timms_script_finds(distiller):
    task = distiller.student
    assert distiller.get_eval_model() is task.get_eval_model()
    assert distiller.get_checkpoint_state()["state_dict"].keys() == task.trainable_module.state_dict().keys()
    averaged = distiller.setup_ema(decay=0.5)
    example.train(distiller, [(IMAGES, LABELS)], lr=0.1)
    averaged.update(distiller.get_trainable_module())
    torch.testing.assert_close(distiller.eval()(IMAGES, LABELS), task(IMAGES, LABELS))


@pytest.mark.parametrize("kind", [ClassificationTask, FeatureDistillationTask])
def test_other_tasks(kind, models):
    student, teacher = models
    criterion = nn.CrossEntropyLoss()
    if kind is ClassificationTask:
        task, layer = kind(student, criterion), "trainable_module.layer4"
    else:
        task, layer = kind(student, copy.deepcopy(teacher), criterion), "trainable_module.student.layer4"
    loss = PKDLoss([student.num_features], [teacher.num_features])
    entry = ("trainable_module", "")
    distiller = Distiller(task, teacher, loss, student_layers=layer, teacher_layers="layer4", teacher_entry=entry)
    losses = distiller.train()(IMAGES, LABELS)
    losses["loss"].backward()
    own = [losses[name] for name in losses if name.endswith("_loss")] or [criterion(losses["output"], LABELS)]
    torch.testing.assert_close(losses["loss"], sum(own) + distiller.terms()["loss_pkd"])
