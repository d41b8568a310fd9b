"""torchvision Faster R-CNN, ResNet-50 from ResNet-101.

Tap: `backbone`
"""

import torch
from torchvision.models.detection import FasterRCNN, fasterrcnn_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

from fbkd_ops import Distiller, FBKDLoss


def build(num_classes, weights_backbone="DEFAULT", **arguments):
    student = fasterrcnn_resnet50_fpn(num_classes=num_classes, weights_backbone=weights_backbone, **arguments)
    teacher = FasterRCNN(resnet_fpn_backbone(backbone_name="resnet101", weights=None), num_classes, **arguments)
    return student, teacher  # load your trained teacher: teacher.load_state_dict(torch.load("teacher.pth"))


def make_distiller(student, teacher):
    loss = FBKDLoss(256, num_levels=5, preset="two_stage")
    # torchvision resizes at random inside: teacher_entry hands the teacher's backbone what the student's was given.
    return Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")


def train(distiller, loader, lr=0.01):
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)  # the student's and the loss's
    distiller.train()
    for images, targets in loader:
        losses = distiller(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
