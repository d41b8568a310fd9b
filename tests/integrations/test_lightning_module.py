"""Lightning with the example's module: what is logged, saved, resumed and moved."""

import copy

import pytest
import torch

lightning = pytest.importorskip("lightning")

from contract import Calls, check_predictions, check_step, check_terms  # noqa: E402
from detectors import TERMS, Detector  # noqa: E402
from helpers import randomise  # noqa: E402

from examples.frameworks import lightning_module as example  # noqa: E402
from fbkd_ops import FBKDLoss  # noqa: E402

IMAGES, TARGETS = torch.randn(4, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(1.0)


def make_module():
    torch.manual_seed(0)
    module = example.Distillation(Detector(4), Detector(6), randomise(FBKDLoss(4, 6, num_levels=2)), lr=0.1)
    module.distiller.student.dropout.p = 0.0
    return module


def fit(module, images, epochs=1, checkpoint=None, precision=None, callbacks=None):
    """One step with each of ``images`` an epoch."""
    quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
    settings = dict(max_epochs=epochs, precision=precision, callbacks=callbacks, accelerator="cpu", devices=1)
    trainer = lightning.Trainer(**settings, **quiet)
    batches = [(image, TARGETS) for image in images]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    return trainer


def test_lightning_logs_the_terms():
    module = make_module()
    backbone = Calls(module.distiller.student.backbone)
    trainer = check_terms(
        module.distiller,
        lambda: fit(module, IMAGES[:1]),
        lambda teacher: (backbone[-1][1], teacher.backbone(IMAGES[0])),
    )
    assert set(trainer.callback_metrics) == TERMS
    torch.testing.assert_close(dict(trainer.callback_metrics), module.distiller.terms())


def test_lightning_predictions_and_step():
    module = make_module()
    distiller = module.distiller
    check_predictions(distiller, lambda model: model(IMAGES[0]))
    module.train()
    check_step(
        distiller, lambda: fit(module, IMAGES[:1]), [distiller.teacher.head], lambda: distiller.teacher(IMAGES[0])
    )
    torch.testing.assert_close(module.eval()(IMAGES[0]), distiller.student(IMAGES[0]))


def test_lightning_trains_a_student_that_came_in_eval_mode():
    module = example.Distillation(Detector(4).eval(), Detector(6), FBKDLoss(4, 6, num_levels=2))
    fit(module, IMAGES[:1])
    assert set(module.distiller.terms()) == TERMS
    assert all(each.training for each in module.distiller.student.modules())


def test_lightning_resumes_without_the_teacher_in_its_checkpoint(tmp_path):
    whole, first, second = make_module(), make_module(), make_module()
    fit(whole, IMAGES[:2], epochs=2)
    fit(first, IMAGES[:2]).save_checkpoint(tmp_path / "first.ckpt")
    saved = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert {".".join(key.split(".")[:2]) for key in saved} == {
        "distiller.student",
        "distiller.loss",
        "distiller._extra_state",
    }
    randomise(second.distiller.student, seed=1)
    fit(second, IMAGES[:2], epochs=2, checkpoint=tmp_path / "first.ckpt")
    assert second.distiller.step == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_lightning_moves_the_teacher_along():
    module = make_module()
    fit(module, IMAGES[:1], precision="64-true")
    assert next(module.distiller.teacher.parameters()).dtype == torch.float64
    assert module.distiller.terms()["loss_fbkd_feature"].dtype == torch.float64


class Callback(lightning.Callback):
    """Looks for a name of the student on the module that it is given."""

    def on_train_start(self, trainer, module):
        assert module.backbone is module.distiller.student.backbone
        module.note = 2


def test_lightning_callbacks_find_the_students_names():
    module = make_module()
    student = module.distiller.student
    student.note = 1
    fit(module, IMAGES[:1], callbacks=Callback())
    assert student.note == 2
    assert not {"note", "backbone"} & set(vars(module))
    assert not hasattr(module, "nothing")
    copied = copy.deepcopy(module)
    assert copied.backbone is copied.distiller.student.backbone is not student.backbone


class Noted(lightning.Callback):
    """What the module was as each epoch ended."""

    def __init__(self):
        self.states = []

    def on_train_epoch_end(self, trainer, module):
        self.states.append(copy.deepcopy(module.distiller.student.state_dict()))


def test_lightning_averages_the_student():
    plain, averaged, noted = make_module(), make_module(), Noted()
    fit(plain, IMAGES[:1], epochs=3, callbacks=noted)
    fit(averaged, IMAGES[:1], epochs=3, callbacks=lightning.pytorch.callbacks.EMAWeightAveraging(decay=0.5))
    first, second, third = (state["head.weight"] for state in noted.states)
    expected = 0.5 * (0.5 * first + 0.5 * second) + 0.5 * third
    torch.testing.assert_close(averaged.distiller.student.head.weight, expected)


def test_lightning_thaws_the_students_backbone():
    module, noted = make_module(), Noted()
    start = copy.deepcopy(module.distiller.student.state_dict())
    fit(module, IMAGES[:1], 2, callbacks=[lightning.pytorch.callbacks.BackboneFinetuning(1), noted])
    frozen, thawed = ({n for n in start if not torch.equal(start[n], state[n])} for state in noted.states)
    assert any(name.startswith("head") for name in frozen)
    assert not any(name.startswith("backbone") and "running" not in name for name in frozen)
    assert any(name.startswith("backbone") for name in thawed)


def test_lightning_keeps_the_checkpoint_with_the_smallest_term(tmp_path):
    kept = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, monitor="loss_fbkd_feature", save_weights_only=True)
    settings = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu", devices=1)
    trainer = lightning.Trainer(max_epochs=3, callbacks=kept, **settings)
    trainer.fit(make_module(), torch.utils.data.DataLoader([(IMAGES[0], TARGETS)], batch_size=None))
    assert float(kept.best_model_score) == min(float(score) for score in kept.best_k_models.values())
    make_module().load_state_dict(torch.load(kept.best_model_path, weights_only=True)["state_dict"])


def test_lightning_keeps_the_names_of_the_module():
    student = Detector(4)
    student.lr = 0.2
    module = example.Distillation(student, Detector(6), FBKDLoss(4, 6, num_levels=2), lr=0.1)
    assert (module.lr, student.lr) == (0.1, 0.2)
    module.lr = 0.3
    assert (module.lr, student.lr) == (0.3, 0.2)


@pytest.mark.parametrize("strict", [False, True])
def test_lightning_takes_a_plain_students_checkpoint(strict):
    module, plain = make_module(), randomise(Detector(4), seed=5).state_dict()
    if strict:
        with pytest.raises(RuntimeError, match="Missing key"):  # the loss's
            module.load_state_dict(plain)
    else:
        module.load_state_dict(plain, strict=False)
        assert all(torch.equal(value, plain[key]) for key, value in module.distiller.student.state_dict().items())
    with pytest.raises(RuntimeError, match="neither a Distillation's, .* nor its student's"):
        module.load_state_dict({"encoder.weight": torch.zeros(1)}, strict=False)
    module.load_state_dict(module.state_dict())
