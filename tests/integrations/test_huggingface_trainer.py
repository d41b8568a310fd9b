"""What Hugging Face's Trainer finds on a distiller: gradients under accumulation, checkpointing, checkpoints."""

import copy

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import hf_models  # noqa: E402
from detectors import Backbone  # noqa: E402
from helpers import pairs_of, randomise  # noqa: E402
from torch import nn  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.utils import ModelOutput  # noqa: E402

from fbkd_ops import Distiller, FBKDLoss  # noqa: E402

MICRO_BATCHES = 4


class Dense(nn.Module):
    """Labels are a tensor per batch, or a list of dicts."""

    def __init__(self, width=4):
        super().__init__()
        self.backbone, self.head = Backbone(width), nn.Conv2d(width, 1, 1)

    def forward(self, pixel_values, labels=None):
        return self.make_output(*self.errors(pixel_values, labels))

    def errors(self, pixel_values, labels):
        logits = self.head(self.backbone(pixel_values)["coarse"])
        if isinstance(labels, list):
            labels = torch.stack([label["map"] for label in labels])
        return (logits - labels).square(), logits

    def make_output(self, errors, logits, count=None):
        return {"loss": errors.sum() / (errors.numel() if count is None else count), "logits": logits}


class Silent(Dense):
    def forward(self, pixel_values, labels=None, **kwargs):
        return super().forward(pixel_values, labels)


class Declining(Silent):
    accepts_loss_kwargs = False

    def make_output(self, errors, logits, count=None):
        return ModelOutput(super().make_output(errors, logits, count))


class Dividing(Dense):
    """Divides by the number of items in all accumulated batches, as Hugging Face's own losses do."""

    accepts_loss_kwargs = True

    def forward(self, pixel_values, labels=None, num_items_in_batch=None):
        errors, logits = self.errors(pixel_values, labels)
        return self.make_output(errors, logits, num_items_in_batch)


def distil(student, teacher=None, layers="backbone"):
    loss = randomise(FBKDLoss(4, 6, num_levels=2, stride=1))
    return Distiller(student, teacher or Dense(6), loss, student_layers=layers)


def samples(labels):
    maps = [torch.rand(1, 4, 4) for _ in range(2 * MICRO_BATCHES)]
    images = [torch.rand(3, 8, 8) for _ in maps]
    return [
        {"pixel_values": x, "labels": each if labels == "tensor" else {"map": each}}
        for x, each in zip(images, maps, strict=True)
    ]


def collate(items):
    labels = [item["labels"] for item in items]
    stacked = torch.stack(labels) if isinstance(labels[0], torch.Tensor) else labels
    return {"pixel_values": torch.stack([item["pixel_values"] for item in items]), "labels": stacked}


class Gradients(TrainerCallback):
    """The gradients with which the optimizer makes its step."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.seen = [parameter.grad.clone() for parameter in model.parameters()]


def arguments(folder, **settings):
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True, remove_unused_columns=False, label_names=["labels"])
    return TrainingArguments(folder, **quiet, **settings)


def accumulated_gradients(model, data, steps, folder):
    seen = Gradients()
    settings = dict(max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=steps, max_grad_norm=0)
    settings |= dict(save_strategy="no", train_sampling_strategy="sequential")
    Trainer(model, arguments(folder, **settings), train_dataset=data, data_collator=collate, callbacks=[seen]).train()
    return seen.seen


def mean_gradients(distiller, data, steps):
    """The mean of the gradients that the micro-batches give one by one."""
    parameters, totals = list(distiller.parameters()), None
    for step in range(steps):
        output = distiller(**collate(data[2 * step : 2 * step + 2]))
        gradients = torch.autograd.grad(output["loss"], parameters)
        totals = gradients if totals is None else [total + each for total, each in zip(totals, gradients, strict=True)]
    return [total / steps for total in totals]


@pytest.mark.parametrize(
    "kind, steps, labels", pairs_of([Dense, Silent, Declining, Dividing], [1, 2, 4], ["tensor", "list of dicts"])
)
def test_accumulated_gradients_are_the_mean_of_the_micro_batches(kind, steps, labels, tmp_path):
    distiller, data = distil(kind()).train(), samples(labels)
    expected = mean_gradients(copy.deepcopy(distiller), data, steps)
    gradients = accumulated_gradients(distiller, data, steps, tmp_path)
    for gradient, mean in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)


def test_the_distiller_takes_no_loss_kwargs():
    assert all(distil(kind()).accepts_loss_kwargs is False for kind in (Dense, Silent, Declining, Dividing))


def segmentation_data():
    return [{"pixel_values": torch.rand(3, 64, 64), "labels": torch.zeros(64, 64, dtype=torch.long)}] * 2


def distil_segformer():
    layers = "decode_head.linear_fuse"
    return Distiller(hf_models.segformer(8), hf_models.segformer(8), FBKDLoss([16]), student_layers=layers).train()


def test_activation_checkpointing_reaches_the_student(tmp_path):
    distiller = distil_segformer()
    settings = dict(max_steps=1, save_strategy="no", activation_checkpointing=True)
    Trainer(distiller, arguments(tmp_path, **settings), train_dataset=segmentation_data()).train()
    assert distiller.student.is_gradient_checkpointing and distiller.step == 1
    assert not distiller.teacher.is_gradient_checkpointing


@pytest.mark.parametrize("kind", ["gradient", "activation"])
def test_checkpointing_is_switched_on_and_off(kind):
    distiller = distil_segformer()
    if not hasattr(distiller.student, f"{kind}_checkpointing_enable"):
        pytest.skip("this version of transformers has no such name")
    getattr(distiller, f"{kind}_checkpointing_enable")()
    assert distiller.student.is_gradient_checkpointing
    getattr(distiller, f"{kind}_checkpointing_disable")()
    assert not distiller.student.is_gradient_checkpointing


def distil_detr():
    torch.manual_seed(0)
    models, layers = [hf_models.deformable_detr(width) for width in (32, 64)], "model.input_proj.0"
    return Distiller(*models, FBKDLoss([32], [64]), student_layers=layers).train()


def test_a_student_with_tied_weights_is_saved_and_resumes_bit_equal(tmp_path):
    pytest.importorskip("scipy")  # the matcher of its loss
    data = hf_models.samples("deformable_detr", 8)
    settings = arguments(tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2)
    distillers = [distil_detr() for _ in range(2)]
    names = list(distillers[0].student.state_dict())
    for distiller, checkpoint in zip(distillers, (None, str(tmp_path / "checkpoint-2")), strict=True):
        trainer = Trainer(distiller, settings, train_dataset=data, data_collator=hf_models.collate)
        trainer.train(resume_from_checkpoint=checkpoint)
        assert distiller.step == 4 and list(distiller.student.state_dict()) == names
    whole, resumed = (distiller.state_dict() for distiller in distillers)
    assert len(whole) < len(names) + len(distillers[0].loss.state_dict())
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name
