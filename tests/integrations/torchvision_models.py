"""Batches for torchvision's detectors, and what their examples have in common."""

import torch
from contract import Calls, check_predictions, check_step, check_terms

RANDOM_SIZES = dict(min_size=(64, 96, 128), max_size=160)


def batch(size=(60, 80)):
    """Two images, the second one narrower, with a box each."""
    images = [torch.rand(3, *size), torch.rand(3, size[0], size[1] - 10)]
    targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 44.0]]), "labels": torch.tensor([label])} for label in (1, 2)]
    return images, targets


def check_torchvision_terms(distiller, own, steps=3):
    """Terms beside the losses `own`, of the images as the student resized them; the sizes that it made."""
    backbone, sizes, inputs = Calls(distiller.student.backbone), set(), batch()
    for step in range(steps):
        torch.manual_seed(step)
        losses = check_terms(
            distiller,
            lambda: distiller(*inputs),
            lambda teacher: (backbone[-1][1], teacher.backbone(*backbone[-1][0])),
        )
        assert set(losses) == own | set(distiller.terms())
        assert all(torch.isfinite(loss) for loss in losses.values())
        for name, term in distiller.terms().items():
            torch.testing.assert_close(losses[name].detach(), term)
        sizes.add(tuple(backbone[-1][0][0].shape[-2:]))
    return sizes


def check_torchvision_step(distiller, train, heads):
    images, targets = batch()
    check_step(
        distiller,
        lambda: train(distiller, [(images, targets)], lr=0.1),
        [getattr(distiller.teacher, head) for head in heads],
        lambda: distiller.teacher(images),
    )


def check_torchvision_predictions(distiller):
    images, _ = batch()
    check_predictions(distiller, lambda model: model(images))
