"""Detectron2 R-CNN (run with Detectron2 itself once, tested on a stand-in where it is not installed).

Tap: `backbone`
"""

import torch

from fbkd_ops import Distiller, FBKDLoss


def make_distiller(student, teacher):
    """Return it from your DefaultTrainer's `build_model`, whose optimizer then has the loss's parameters too.

    Before, load both models (`DetectionCheckpointer(student).load(cfg.MODEL.WEIGHTS)`) and empty `cfg.MODEL.WEIGHTS`:
    the trainer's own checkpointer sees the student's parameters under `student.`.
    """
    widths = [[shape.channels for shape in model.backbone.output_shape().values()] for model in (student, teacher)]
    loss = FBKDLoss(*widths, preset="two_stage").to(student.device)
    return Distiller(student, teacher, loss, student_layers="backbone")  # each normalizes and pads the same images


def train(distiller, loader, lr=0.01):  # the steps of a SimpleTrainer
    optimizer = torch.optim.SGD(distiller.parameters(), lr, momentum=0.9)
    distiller.train()
    for batched_inputs in loader:
        losses = distiller(batched_inputs)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
