"""The FBKD loss for a student and a teacher of the demo's size."""

from __future__ import annotations

import math

import torch
from torch import nn

from fbkd_ops import PRESETS, Distiller, FBKDLoss

# What the presets' weights were chosen for: two pictures of 800×1344, 256 channels, strides 4, 8, 16, ...
PRESET_BATCH, PRESET_HEIGHT, PRESET_WIDTH, PRESET_CHANNELS, PRESET_STRIDE = 2, 800, 1344, 256, 4


def size_free_weights(preset: str, num_levels: int, strength: float = 1.0) -> dict[str, list[float]]:
    """`preset`'s weights for ``normalize="mean"``: what a term weighs on full-sized pictures it weighs on small ones.

    Each term is the root of a sum, so its size grows with the root of the number of elements. Here a weight is
    multiplied by that root at the size the preset was made for, and by `strength`.
    """
    strides = [PRESET_STRIDE * 2**level for level in range(num_levels)]
    pixels = [PRESET_BATCH * math.ceil(PRESET_HEIGHT / s) * math.ceil(PRESET_WIDTH / s) for s in strides]
    elements = {
        "feature_weight": [count * PRESET_CHANNELS for count in pixels],
        "channel_weight": [PRESET_BATCH * PRESET_CHANNELS] * num_levels,
        "spatial_weight": pixels,
        "relation_weight": [count * PRESET_CHANNELS for count in pixels],
    }
    return {
        name: [strength * PRESETS[preset][name] * math.sqrt(count) for count in counts]
        for name, counts in elements.items()
    }


@torch.no_grad()
def features(detector: nn.Module, images: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The pyramid of `images` under `detector`, as it is in evaluation."""
    detector.eval()
    return detector.backbone(detector.transform(images)[0].tensors)


def build_distiller(
    student: nn.Module, teacher: nn.Module, images: list[torch.Tensor], preset: str, strength: float
) -> Distiller:
    """`student` and `teacher` with the loss between their pyramids; `images` only serve to read the widths off."""
    pyramid_s, pyramid_t = features(student, images), features(teacher, images)
    weights = size_free_weights(preset, len(pyramid_s), strength)
    loss = FBKDLoss.from_features(pyramid_s, pyramid_t, preset=preset, normalize="mean", **weights)
    return Distiller(student, teacher, loss, student_layers="backbone")
