"""torchvision FCOS, ResNet-50 from ResNet-101.

Tap: `backbone`
"""

import torch
from torchvision.models.detection import FCOS, fcos_resnet50_fpn
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from fbkd_ops import Distiller, FBKDLoss


def build(num_classes, weights_backbone="DEFAULT", **arguments):
    student = fcos_resnet50_fpn(num_classes=num_classes, weights_backbone=weights_backbone, **arguments)
    levels = dict(returned_layers=[2, 3, 4], extra_blocks=LastLevelP6P7(256, 256))  # P3..P7
    backbone = resnet_fpn_backbone(backbone_name="resnet101", weights=None, **levels)
    return student, FCOS(backbone, num_classes, **arguments)  # load your trained teacher's state dict


def make_distiller(student, teacher):
    loss = FBKDLoss(256, num_levels=5, preset="one_stage")
    return Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")


def train(distiller, loader, lr=0.01):
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)  # the student's and the loss's
    distiller.train()
    for images, targets in loader:
        losses = distiller(images, targets)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
