"""Every loss on a GPU beside the same on the CPU: terms, gradients, and the masks that MGD draws."""

import copy

import pytest
import torch
from helpers import randomise

from fbkd_ops.losses.registry import LOSSES

SIZES = [(16, 20), (8, 10), (3, 5)]
OTHERS = {
    "FGDLoss": {
        "boxes": [torch.tensor([[8.0, 8.0, 90.0, 60.0], [70.0, 30.0, 160.0, 128.0]]), torch.zeros(0, 4)],
        "image_size": (128, 160),
    },
    "ScoreWeightedLoss": {
        "scores": [torch.rand(2, *size, generator=torch.Generator().manual_seed(3)) for size in SIZES]
    },
}


def results(loss, student, teacher, others):
    leaves = [x.requires_grad_() for x in student]
    terms = loss(leaves, teacher, **others)
    gradients = torch.autograd.grad(sum(terms.values()), [*leaves, *loss.parameters()], allow_unused=True)
    return [*terms.values(), *(torch.zeros(()) if each is None else each for each in gradients)]


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.detach().to(device)
    return [moved(each, device) for each in value] if isinstance(value, list) else value


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("widths", [(16, 16), (16, 24)])
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_the_cpu_s(name, widths):
    compare(name, widths, "cuda")


@pytest.mark.parametrize("name", LOSSES)
def test_the_comparison_runs_without_a_gpu(name):
    compare(name, (16, 24), "cpu")


def compare(name, widths, device):
    generator = torch.Generator().manual_seed(0)
    student, teacher = ([torch.randn(2, width, *size, generator=generator) for size in SIZES] for width in widths)
    loss = LOSSES[name](*widths, num_levels=3)
    loss = randomise(loss) if name != "MGDLoss" else loss
    others = OTHERS.get(name, {})
    expected = results(loss, moved(student, "cpu"), teacher, others)
    there = copy.deepcopy(loss).to(device)
    if name == "MGDLoss":
        there.draws.zero_()
    found = results(
        there, moved(student, device), moved(teacher, device), {key: moved(x, device) for key, x in others.items()}
    )
    for mine, theirs in zip(found, expected, strict=True):
        scale = max(theirs.abs().max().item(), 1e-12)
        torch.testing.assert_close(mine.cpu(), theirs, rtol=1e-3, atol=1e-3 * scale)
