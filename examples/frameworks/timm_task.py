"""timm's training tasks: its distillation of logits, and of features besides.

Tap: `layer3` and `layer4` of the task's model
"""

import copy

import torch
from timm.task import LogitDistillationTask

from fbkd_ops import Distiller, FBKDLoss


def make_task(student, teacher):
    """The task has a teacher among its own modules, so it gets a copy."""
    return LogitDistillationTask(student, copy.deepcopy(teacher).requires_grad_(False), torch.nn.CrossEntropyLoss())


def make_distiller(task, teacher):
    widths = [[stage["num_chs"] for stage in model.feature_info[-2:]] for model in (task.trainable_module, teacher)]
    return Distiller(
        task, teacher, FBKDLoss(*widths), student_layers=["trainable_module.layer3", "trainable_module.layer4"],
        teacher_layers=["layer3", "layer4"], teacher_entry=("trainable_module", ""),  # the teacher takes no labels
    )  # fmt: skip


def train(distiller, loader, lr=0.01):
    parameters = [each for each in distiller.parameters() if each.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9)
    distiller.train()
    for images, labels in loader:
        losses = distiller(images, labels)  # the task's dict, the terms in its "loss"
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
