"""Hugging Face RT-DETR, the student's features read from its output.

Tap: the output's `encoder_last_hidden_state`; of the teacher `model.encoder`
"""

from operator import attrgetter

import torch
from transformers import Trainer, TrainingArguments

from fbkd_ops import Distiller, FBKDLoss, Layer


def make_distiller(student, teacher):
    widths = [[model.config.encoder_hidden_dim] * 3 for model in (student, teacher)]
    loss = FBKDLoss(*widths, preset="one_stage")
    of_student = attrgetter("encoder_last_hidden_state")  # a function of the output: no hook
    of_teacher = Layer("model.encoder", select=attrgetter("last_hidden_state"))  # its decoder does not run
    return Distiller(student, teacher, loss, student_layers=of_student, teacher_layers=of_teacher)


def make_trainer(distiller, dataset, collate, **arguments):
    arguments = TrainingArguments(remove_unused_columns=False, label_names=["labels"], **arguments)
    return Trainer(distiller, arguments, train_dataset=dataset, data_collator=collate)


def train(distiller, loader, lr=1e-4):  # without a Trainer
    optimizer = torch.optim.AdamW(distiller.parameters(), lr)  # the student's and the loss's
    distiller.train()  # from_pretrained gives models in eval mode
    for batch in loader:  # pixel_values and labels, of the image processor
        output = distiller(**batch)
        optimizer.zero_grad()
        output.loss.backward()  # the terms are in it
        optimizer.step()
