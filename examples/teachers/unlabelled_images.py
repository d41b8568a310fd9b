"""Images without labels: in each step the terms of such a batch stand beside the losses of a labelled one.

Tap: `backbone`
"""

import torch

from examples.frameworks.torchvision_faster_rcnn import build, make_distiller
from fbkd_ops import sum_losses

__all__ = ["build", "make_distiller", "train"]


def no_targets(images):  # torchvision's detectors ask for some before their backbone runs
    return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)} for _ in images]


def train(distiller, labelled, unlabelled, lr=0.01):
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)
    distiller.train()
    for (images, targets), others in zip(labelled, unlabelled, strict=False):
        losses = distiller(images, targets)
        with distiller.unlabelled():
            terms = distiller(others, no_targets(others))
        optimizer.zero_grad()
        (sum_losses(losses) + sum_losses(terms)).backward()
        optimizer.step()
