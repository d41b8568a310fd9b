"""A picture of where the detectors look."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.patches import Rectangle
from torch import Tensor, nn

from fbkd_ops import FBKDLoss
from fbkd_ops.functional import attention_mask, attention_pool

from .data import Images
from .distillation import features

LEVELS_SHOWN = 3
COLUMNS = ("image", "plain student", "distilled student", "teacher", "mask")
ATTENTION_COLOURS, MASK_COLOURS = "inferno", "viridis"
PANELS = (
    ("plain", ATTENTION_COLOURS),
    ("distilled", ATTENTION_COLOURS),
    ("teacher", ATTENTION_COLOURS),
    ("mask", MASK_COLOURS),
)


def most_crowded(images: Images) -> int:
    """The image with the most boxes, the first of them."""
    return max(range(len(images)), key=lambda index: len(images.labels[index]))


def spatial_maps(detectors: dict[str, nn.Module], loss: FBKDLoss, image: Tensor) -> list[dict[str, Tensor]]:
    """Per level, each detector's spatial attention ``(H, W)``, and as ``"mask"`` how the loss weighs the pixels."""
    pyramids = {name: features(detector, [image]) for name, detector in detectors.items()}
    levels = []
    for key, level in zip(pyramids["teacher"], loss.levels):
        maps = {name: attention_pool(pyramid[key]).spatial_attention for name, pyramid in pyramids.items()}
        settings = level.settings
        mask = attention_mask(
            maps["distilled"],
            maps["teacher"],
            temperature=settings.spatial_temperature,
            mask_rule=settings.mask_rule,
        )
        levels.append({name: value[0].cpu() for name, value in (maps | {"mask": mask}).items()})
    return levels


def over_image(values: Tensor, height: int, width: int, padded: tuple[int, int]) -> np.ndarray:
    """A map ``(h, w)`` of a padded picture, enlarged smoothly and cut to the picture's own size."""
    large = nn.functional.interpolate(values[None, None], padded, mode="bilinear", align_corners=False)
    return large[0, 0, :height, :width].numpy()


def draw_boxes(axes: Axes, boxes: Tensor, names: list[str]) -> None:
    """Outline `boxes (K, 4)`, and write each one's name above it."""
    for (left, top, right, bottom), name in zip(boxes.tolist(), names):
        axes.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, color="white", lw=1.2))
        plate = {"facecolor": "black", "alpha": 0.6, "pad": 1, "linewidth": 0}
        axes.text(left, top, name, color="white", fontsize=7, va="bottom", bbox=plate)


def draw_heat(axes: Axes, image: Tensor, values: np.ndarray, colours: str) -> None:
    """Lay `values` over a grey `image`, and write their range below."""
    axes.imshow(image.mean(dim=0).numpy(), cmap="gray", vmin=0, vmax=1)
    axes.imshow(values, cmap=colours, alpha=0.7)
    axes.set_xlabel(f"{values.min():.2f} to {values.max():.2f}", fontsize=8)


def add_scale(figure: Figure, place: SubplotSpec, colours: str, label: str) -> None:
    """A colour bar without numbers: each panel has its own range."""
    bar = figure.colorbar(ScalarMappable(cmap=colours), cax=figure.add_subplot(place), orientation="horizontal")
    bar.set_ticks([0.03, 0.97], labels=["lowest", "highest"], fontsize=8)
    bar.ax.tick_params(length=0)
    bar.set_label(label, fontsize=9)


def save_attention(
    path: Path, detectors: dict[str, nn.Module], loss: FBKDLoss, images: Images, classes: tuple[str, ...]
) -> None:
    """Draw the attention of `detectors` (``plain``, ``distilled``, ``teacher``) over the most crowded of `images`.

    One row a level; the colours of each panel run from its own lowest to its own highest value, written below it.
    """
    index = most_crowded(images)
    image, target = images[index]
    names = [classes[label - 1] for label in target["labels"].tolist()]
    device = next(detectors["teacher"].parameters()).device
    levels = spatial_maps(detectors, loss, image.to(device))[:LEVELS_SHOWN]
    padded = tuple(detectors["teacher"].transform([image.to(device)])[0].tensors.shape[-2:])
    height, width = image.shape[-2:]

    figure = Figure(figsize=(2.3 * len(COLUMNS), 2.5 * len(levels) * height / width + 0.9), layout="constrained")
    grid = figure.add_gridspec(len(levels) + 1, len(COLUMNS), height_ratios=[1] * len(levels) + [0.05])
    for row, maps in enumerate(levels):
        panels = [figure.add_subplot(grid[row, column], xticks=[], yticks=[]) for column in range(len(COLUMNS))]
        panels[0].imshow(image.permute(1, 2, 0).numpy())
        draw_boxes(panels[0], target["boxes"], names)
        panels[0].set_ylabel(f"stride {padded[1] // maps['teacher'].shape[-1]}", fontsize=10)
        for axes, (name, colours) in zip(panels[1:], PANELS):
            draw_heat(axes, image, over_image(maps[name], height, width, padded), colours)
        if row == 0:
            for axes, title in zip(panels, COLUMNS):
                axes.set_title(title, fontsize=11)
    add_scale(figure, grid[-1, 1:4], ATTENTION_COLOURS, "spatial attention: mean of |feature| over channels")
    add_scale(figure, grid[-1, 4], MASK_COLOURS, "weight in the loss (mean 1)")
    figure.savefig(path, dpi=130)
