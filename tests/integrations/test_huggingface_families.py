"""Hugging Face's detectors and segmenters with layers found by themselves, in its Trainer and with accelerate."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("scipy")  # the matcher of the detectors' losses

from accelerate import Accelerator  # noqa: E402
from accelerate.state import AcceleratorState  # noqa: E402
from hf_models import FAMILIES, collate, samples  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from fbkd_ops import Distiller  # noqa: E402

families = pytest.mark.parametrize("family", FAMILIES)


def distil(family, seed=0, **settings):
    torch.manual_seed(seed)
    make = FAMILIES[family]
    return Distiller.for_model(make(32), make(64), **settings).train()


@families
def test_a_student_learns(family):
    distiller = distil(family, share_every=1)
    for _ in range(2):
        distiller(**collate(samples(family, 2))).loss.backward()
    assert float(distiller.terms()["loss_fbkd_feature"]) > 0 and float(distiller.share.share) > 0
    assert all(parameter.grad is not None for parameter in distiller.loss.parameters())


def settings_of(folder, family, **more):
    labels = ["mask_labels", "class_labels"] if family == "mask2former" else ["labels"]
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False, label_names=labels)
    saving = dict(save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=2, prediction_loss_only=True)
    settings = dict(max_steps=4, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=1e-3)
    return TrainingArguments(str(folder), **quiet, **saving, **settings, **more)


@families
def test_a_trainer_accumulates_and_resumes(family, tmp_path):
    data, distillers = samples(family, 16), [distil(family) for _ in range(2)]
    for distiller, checkpoint in zip(distillers, (None, str(tmp_path / "checkpoint-2")), strict=True):
        settings = settings_of(tmp_path, family)
        trainer = Trainer(distiller, settings, train_dataset=data, eval_dataset=data[:2], data_collator=collate)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert trainer.state.global_step == 4 and distiller.step == 8
    whole, resumed = (distiller.state_dict() for distiller in distillers)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


class EarlierIsBetter(TrainerCallback):
    """Ranks checkpoints by their age, whatever the student's loss."""

    def __init__(self):
        self.losses = []

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses.append(metrics["eval_loss"])
        metrics["eval_loss"] = state.global_step


@families
def test_a_trainer_ends_with_the_best_student(family, tmp_path):
    distiller, data, rank = distil(family), samples(family, 16), EarlierIsBetter()
    settings = settings_of(tmp_path, family, load_best_model_at_end=True)
    sets = dict(train_dataset=data, eval_dataset=data[:2])
    trainer = Trainer(distiller, settings, data_collator=collate, callbacks=[rank], **sets)
    trainer.train()
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2") and distiller.step == 4
    assert len(rank.losses) == 2 and all(0 < loss < float("inf") for loss in rank.losses)
    resumed = distil(family, seed=1)
    Trainer(resumed, settings, data_collator=collate, **sets)._load_from_checkpoint(str(tmp_path / "checkpoint-2"))
    for name, value in resumed.state_dict().items():
        assert torch.equal(distiller.state_dict()[name], value), name


def accelerated(family, folder, resume=False):
    """Two accumulated steps in bfloat16, of which the second alone is made where a run is resumed."""
    distiller, data = distil(family), samples(family, 8)
    AcceleratorState._reset_state(reset_partial_state=True)  # else that of the test before
    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(distiller.parameters(), 0.01, momentum=0.9)
    loader = torch.utils.data.DataLoader(data, batch_size=2, collate_fn=collate)
    distiller, optimizer, loader = accelerator.prepare(distiller, optimizer, loader)
    for index, batch in enumerate(loader):
        if resume and index < 2:
            continue
        if resume and index == 2:  # here, as the loader draws a random number when it begins
            accelerator.load_state(str(folder))
        with accelerator.accumulate(distiller):
            accelerator.backward(distiller(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
        if index == 1 and not resume:
            accelerator.save_state(str(folder), safe_serialization=False)
    return accelerator.unwrap_model(distiller)


@families
def test_accelerate_accumulates_and_resumes(family, tmp_path):
    whole, resumed = accelerated(family, tmp_path), accelerated(family, tmp_path, resume=True)
    assert whole.step == resumed.step == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
