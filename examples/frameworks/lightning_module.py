"""PyTorch Lightning, a module that holds the distiller.

Tap: `backbone`
"""

import lightning
import torch

from fbkd_ops import Distiller
from fbkd_ops.training.checkpoints import fit_names
from fbkd_ops.training.student_attributes import StudentAttributes


class Distillation(StudentAttributes, lightning.LightningModule):
    student_path = "distiller.student"  # callbacks find the student's names on the module

    def __init__(self, student, teacher, loss, lr=0.01):
        super().__init__()
        self.lr = lr  # before the student is there, which may have a name like this
        self.distiller = Distiller(student, teacher, loss, student_layers="backbone", teacher_entry="backbone")
        self.distiller.train()  # Lightning leaves every module in the mode that it came in
        self.register_load_state_dict_pre_hook(fit_names)  # a plain student's checkpoint goes into the student

    def forward(self, images):
        return self.distiller(images)  # in eval mode the plain student

    def training_step(self, batch, index):
        images, targets = batch
        losses = self.distiller(images, targets)
        self.log_dict(self.distiller.terms(), batch_size=len(images))
        return sum(losses.values())

    def configure_optimizers(self):
        return torch.optim.SGD(self.distiller.parameters(), self.lr, momentum=0.9)  # the student's and the loss's
