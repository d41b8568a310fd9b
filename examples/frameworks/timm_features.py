"""timm backbones in a detector of your own, a CNN from a Swin.

Tap: `backbone`; of the Swin permuted to `(N, C, H, W)`
"""

import timm
import torch

from fbkd_ops import Distiller, FBKDLoss, Layer


def backbone(name, **arguments):  # the `self.backbone` of your detector: strides 4, 8, 16 and 32
    return timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1), **arguments)


def channels_first(maps):
    return [x.permute(0, 3, 1, 2) for x in maps]


def make_distiller(student, teacher):
    widths = [model.backbone.feature_info.channels() for model in (student, teacher)]
    of_swin = Layer("backbone", select=channels_first)
    return Distiller(student, teacher, FBKDLoss(*widths), student_layers="backbone", teacher_layers=of_swin)


def train(distiller, loader, lr=1e-3):
    optimizer = torch.optim.AdamW(distiller.parameters(), lr)  # the student's and the loss's
    distiller.train()
    for images, targets in loader:
        loss = distiller(images, targets)  # your detector's scalar with the terms added; a dict gets them as entries
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
