"""torchvision SSDlite320, of any two MobileNetV3.

Tap: `backbone`
"""

import torch

from fbkd_ops import Distiller, FBKDLoss


def make_distiller(student, teacher):
    image = torch.zeros(1, 3, 320, 320)
    with torch.no_grad():  # six levels, each of another width, from 20x20 pixels to 1x1
        features = [model.cpu().eval().backbone(image) for model in (student, teacher)]
    loss = FBKDLoss.from_features(*features, preset="one_stage")
    return Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")


def train(distiller, loader, lr=0.01):
    """Batches of at least two images (`drop_last=True`): a BatchNorm, also SSDlite's own, needs two of 1x1 pixels."""
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)  # the student's and the loss's
    distiller.train()
    for images, targets in loader:
        losses = distiller(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
