"""A vision transformer of timm (DINOv2) as the teacher of torchvision's Faster R-CNN.

Tap: `backbone`; of the transformer the tokens behind its last norm, as one map for three levels
"""

import timm
import torch
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fbkd_ops import Distiller, PKDLoss, TokenMaps, sum_losses


def build(num_classes, weights_backbone="DEFAULT", vit="vit_small_patch14_reg4_dinov2.lvd142m", pretrained=True):
    student = fasterrcnn_resnet50_fpn(num_classes=num_classes, weights_backbone=weights_backbone)
    teacher = timm.create_model(vit, pretrained=pretrained, dynamic_img_size=True)
    return student, TokenMaps(teacher, "norm", stride=16)  # a patch of 14 pixels lies on 16 of the student's


def make_distiller(student, teacher):
    loss = PKDLoss(256, teacher.model.embed_dim, num_levels=3)
    return Distiller(
        student, teacher, loss, student_layers="backbone", student_levels=["1", "2", "3"], gradient_share=0.5,
        teacher_entry=("backbone", ""), teacher_layers="", teacher_levels=[0, 0, 0], resize=True,
    )  # fmt: skip


def train(distiller, loader, lr=0.01):
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)
    distiller.train()
    for images, targets in loader:
        optimizer.zero_grad()
        sum_losses(distiller(images, targets)).backward()
        optimizer.step()
