"""Two teachers of one student: a larger detector and a vision transformer, each with its layers, loss and share.

Tap: `backbone`; of the transformer the tokens behind its last norm
"""

import torch

from examples.frameworks import torchvision_faster_rcnn
from examples.teachers import vit_teacher
from fbkd_ops import Distiller, FBKDLoss, PKDLoss, sum_losses


def build(num_classes, **arguments):
    _, detector = torchvision_faster_rcnn.build(num_classes, weights_backbone=None)
    student, vit = vit_teacher.build(num_classes, **arguments)
    return student, {"detector": detector, "vit": vit}


def make_distiller(student, teachers):
    width = teachers["vit"].model.embed_dim
    losses = {"detector": FBKDLoss(256, num_levels=5), "vit": PKDLoss(256, width, num_levels=2)}
    return Distiller(
        student, teachers, losses, student_layers="backbone", student_levels={"vit": ["1", "2"]},
        teacher_layers={"detector": "backbone", "vit": ""}, teacher_levels={"vit": [0, 0]}, resize=True,
        teacher_entry={"detector": "backbone", "vit": ("backbone", "")}, gradient_share={"detector": 0.4, "vit": 0.1},
    )  # fmt: skip


def train(distiller, loader, lr=0.01):
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)
    for images, targets in loader:
        optimizer.zero_grad()
        sum_losses(distiller(images, targets)).backward()
        optimizer.step()
