"""What both sources of pictures share: a set of images with boxes, held in memory."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..datasets import SPLIT_SEED, SPLITS, VAL_FRACTION, DataError, Target, Track

__all__ = ["SPLITS", "SPLIT_SEED", "VAL_FRACTION", "DataError", "DetectionData", "Images", "Sample", "Target", "Track"]

Sample = tuple[Tensor, Target]


@dataclass
class Images(Dataset[Sample]):
    """Pictures ``(3, H, W)`` as bytes, boxes ``(K, 4)`` in pixels and labels ``(K,)`` that count from 1.

    Items are as torchvision's detectors take them: ``(image, target)`` with an image of floats in 0..1.
    """

    pixels: list[Tensor] = field(default_factory=list)
    boxes: list[Tensor] = field(default_factory=list)
    labels: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Sample:
        target = {"boxes": self.boxes[index].clone(), "labels": self.labels[index].clone()}
        return self.pixels[index].float() / 255, target

    def first(self, count: int) -> Images:
        """The first `count` pictures, or all."""
        return Images(self.pixels[:count], self.boxes[:count], self.labels[:count])

    def add(self, pixels: Tensor, boxes: Any, labels: list[int]) -> None:
        """Append one picture; no box at all is fine."""
        self.pixels.append(pixels)
        self.boxes.append(torch.as_tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        self.labels.append(torch.tensor(labels, dtype=torch.int64))


@dataclass
class DetectionData:
    """A training and a validation set over the same classes, and what the reader has to say about them."""

    train: Images
    val: Images
    classes: tuple[str, ...]
    summary: str
