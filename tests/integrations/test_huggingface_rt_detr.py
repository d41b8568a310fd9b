"""Hugging Face's RT-DETR as its example distils it."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("scipy")  # the matcher of its loss

from contract import Calls, check_predictions, check_step, check_terms  # noqa: E402
from hf_models import collate, rt_detr, samples  # noqa: E402

from examples.frameworks import huggingface_rt_detr as example  # noqa: E402


def batch():
    return collate(samples("rt_detr", 2))


@pytest.fixture
def distiller():
    return example.make_distiller(rt_detr(16), rt_detr(32))


def test_rt_detr_terms_in_the_outputs_loss(distiller):
    inputs, encoder, own = batch(), Calls(distiller.student.model.encoder), []
    distiller.student.register_forward_hook(lambda module, inputs, output: own.append(output.loss))
    output = check_terms(
        distiller,
        lambda: distiller(**inputs),
        lambda teacher: (encoder[-1][1].last_hidden_state, teacher(**inputs).encoder_last_hidden_state),
    )
    assert [tuple(level.shape) for level in output.encoder_last_hidden_state] == [
        (2, 16, 8, 8),
        (2, 16, 4, 4),
        (2, 16, 2, 2),
    ]
    torch.testing.assert_close(output.loss, own[0] + sum(distiller.terms().values()))
    assert torch.isfinite(output.loss) and output["loss"] is output.loss


def test_rt_detr_step(distiller):
    inputs = batch()
    check_step(
        distiller,
        lambda: example.train(distiller, [inputs], lr=0.01),
        [distiller.teacher.model.decoder],
        lambda: distiller.teacher(**inputs),
    )


def test_rt_detr_from_eval_mode(distiller):
    """As `from_pretrained` gives it."""
    distiller.student.eval()
    example.train(distiller, [batch()])
    assert all(module.training for module in distiller.student.modules())


def test_rt_detr_in_a_trainer_that_resumes(distiller, tmp_path):
    pytest.importorskip("accelerate")
    dataset = samples("rt_detr", 2) * 2
    quiet = dict(report_to=[], disable_tqdm=True, use_cpu=True)
    arguments = dict(output_dir=tmp_path, max_steps=4, save_steps=2, per_device_train_batch_size=2, **quiet)
    before = {name: value.clone() for name, value in distiller.state_dict().items()}
    distiller.student.eval()
    example.make_trainer(distiller, dataset, collate, **arguments).train()
    assert distiller.step == 4 and distiller.student.training and not distiller.teacher.training
    after = distiller.state_dict()
    for side in ("student.", "loss."):
        assert any(not torch.equal(after[name], before[name]) for name in before if name.startswith(side))

    resumed = example.make_distiller(rt_detr(16), distiller.teacher)
    trainer = example.make_trainer(resumed, dataset, collate, **arguments)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.step == 4 and trainer.state.global_step == 4
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=lambda text: f"{name}: {text}")


def test_rt_detr_predictions(distiller):
    pixels = batch()["pixel_values"]
    check_predictions(distiller, lambda model: model(pixel_values=pixels).logits)
    assert distiller(pixel_values=pixels).loss is None


def test_rt_detr_on_images_without_labels(distiller):
    output = distiller.train()(pixel_values=batch()["pixel_values"])
    assert type(output).__name__ == "RTDetrObjectDetectionOutput" and list(output)[0] == "loss"
    torch.testing.assert_close(output.loss, sum(distiller.terms().values()), check_device=False)
    assert output["loss"] is output.loss is output[0]
    output.loss.backward()
    assert all(parameter.grad is not None for parameter in distiller.loss.parameters())
