"""What happens to a picture and its boxes before a detector sees them, drawn from a seed for each sample."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from .config import AugmentationConfig, DataConfig

FILL = (124, 116, 104)  # the mean colour that the detectors subtract


def build_augmentation(settings: AugmentationConfig, data: DataConfig) -> v2.Transform:
    """Return torchvision's transforms of a dict ``image``, ``boxes``, ``labels``.

    The image comes as bytes and leaves as floats in 0..1, resized as the detector resizes in evaluation. Boxes are
    clipped to it, and those of less than a pixel are left out with their labels.
    """
    steps: list[v2.Transform] = []
    if settings.photometric > 0:
        steps.append(v2.RandomPhotometricDistort(p=settings.photometric))
    if settings.flip > 0:
        steps.append(v2.RandomHorizontalFlip(settings.flip))
    # Without antialiasing, as torchvision's detectors resize in evaluation.
    if settings.scale:
        size = (data.max_size, data.max_size)
        steps.append(v2.ScaleJitter(size, tuple(settings.scale), antialias=False))
        steps.append(v2.RandomCrop(size, pad_if_needed=True, fill={tv_tensors.Image: FILL}))
    else:
        steps.append(v2.RandomShortestSize(settings.min_sizes or [data.min_size], data.max_size, antialias=False))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()]
    return v2.Compose([*steps, v2.ToPureTensor()])


def augmented(transform: v2.Transform, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return image, boxes and labels after ``transform``."""
    size = (image.shape[-2], image.shape[-1])
    sample = {
        "image": tv_tensors.Image(image),
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size),
        "labels": labels,
    }
    result = transform(sample)
    return result["image"], result["boxes"], result["labels"]


@contextmanager
def drawn_from(*numbers: int) -> Iterator[None]:
    """Seed PyTorch's generator of the CPU inside the block, and put it back as it was."""
    generator = torch.default_generator
    state = generator.get_state()
    generator.manual_seed(int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1))
    try:
        yield
    finally:
        generator.set_state(state)
