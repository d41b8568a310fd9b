"""The FBKD loss for a student and a teacher of the demo's size."""

from __future__ import annotations

import torch
from torch import nn

from fbkd_ops import Distiller, FBKDLoss, size_free_weights


@torch.no_grad()
def features(detector: nn.Module, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pyramid of `images` under `detector`, as it is in evaluation."""
    detector.eval()
    return detector.backbone(detector.transform(images)[0].tensors)


def build_distiller(
    student: nn.Module, teacher: nn.Module, images: list[torch.Tensor], preset: str, share: float
) -> Distiller:
    """`student` and `teacher` with the loss between their pyramids, by the recipe of docs/study.md.

    Args:
        images: only serve to read the widths off.
        share: of the terms' gradient to that of the student's own losses.
    """
    pyramid_s, pyramid_t = features(student, images), features(teacher, images)
    weights = size_free_weights(preset, len(pyramid_s))
    loss = FBKDLoss.from_features(pyramid_s, pyramid_t, preset=preset, normalize="mean", **weights)
    return Distiller(student, teacher, loss, student_layers="backbone", gradient_share=share)
