"""A picture of where the detectors look."""

from __future__ import annotations

from matplotlib.figure import Figure
from torch import Tensor, nn

from fbkd_ops import FBKDLoss, visualize

from .data import Images
from .distillation import features

LEVELS_SHOWN = 3


def most_crowded(images: Images) -> int:
    """The image with the most boxes, the first of them."""
    return max(range(len(images)), key=lambda index: len(images.labels[index]))


def draw_attention(detectors: dict[str, nn.Module], loss: FBKDLoss, images: Images, classes: tuple[str, ...]) -> Figure:
    """The attention of `detectors` (``plain``, ``distilled``, ``teacher``) over the most crowded of `images`."""
    image, target = images[most_crowded(images)]
    on_device = image.to(next(detectors["teacher"].parameters()).device)
    pyramids: dict[str, list[Tensor]] = {
        name: list(features(detector, [on_device]).values()) for name, detector in detectors.items()
    }
    return visualize.attention(
        image,
        pyramids["distilled"],
        pyramids["teacher"],
        loss=loss,
        levels=range(min(LEVELS_SHOWN, len(loss.levels))),
        boxes=target["boxes"],
        labels=[classes[label - 1] for label in target["labels"].tolist()],
        padded_size=tuple(detectors["teacher"].transform([on_device])[0].tensors.shape[-2:]),
        others={"plain student": pyramids["plain"]},
        student_title="distilled student",
    )
