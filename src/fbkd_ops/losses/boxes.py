"""Boxes of a batch, and where they lie on a feature map."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .._validation import as_list, check_number

__all__ = ["check_form", "checked_boxes", "inside_and_outside"]

BOXES = 16  # of each image, that are drawn at once


def checked_boxes(boxes: Any, image_size: Any, images: int, device: torch.device) -> Tensor:
    """Return all boxes as one tensor ``(images, K, 4)`` on the device, padded with boxes of area 0.

    Raises:
        TypeError: boxes that are no list of tensors.
        ValueError: another number of images, a shape other than ``(K, 4)``, an image size that is no pair of sizes.
    """
    by_image = as_list(boxes, "a list of one tensor (K, 4) per image", "boxes")
    if len(by_image) != images:
        raise ValueError(f"boxes must have one tensor for each of the {images} images, got {len(by_image)}")
    for index, each in enumerate(by_image):
        if not isinstance(each, Tensor):
            raise TypeError(f"boxes[{index}] must be a tensor (K, 4), got {type(each).__name__}")
        if each.dim() != 2 or each.shape[1] != 4:
            raise ValueError(f"boxes[{index}] must have shape (K, 4): x1, y1, x2, y2, got {tuple(each.shape)}")
    size = as_list(image_size, "a pair of height and width", "image_size")
    if len(size) != 2:
        raise ValueError(f"image_size must be a pair of height and width, got {image_size!r}")
    for each in size:
        check_number(each, "a pair of numbers > 0", lambda number: number > 0, "image_size")
    if not by_image:
        return torch.zeros(0, 0, 4, device=device)
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in by_image) else torch.float32
    return pad_sequence([each.detach().to(device, dtype) for each in by_image], batch_first=True)


def check_form(boxes: Tensor) -> None:
    """Refuse boxes ``(N, K, 4)`` that are most likely of another form. It waits for the device.

    Raises:
        ValueError: sides the wrong way round in most boxes, or no number above 1.
    """
    boxes = boxes[(boxes != 0).any(dim=2)]  # without the padding
    if not len(boxes):
        return
    reversals = int(((boxes[:, 2] < boxes[:, 0]) | (boxes[:, 3] < boxes[:, 1])).sum())
    if 2 * reversals > len(boxes):
        raise ValueError(
            f"boxes must be x1, y1, x2, y2, but in {reversals} of {len(boxes)} the second corner is left of or above "
            "the first: are they x, y, width, height?"
        )
    if float(boxes.max()) <= 1:
        raise ValueError(
            f"boxes must be in pixels, but no number is above 1 ({float(boxes.max()):.3g} is the largest): are they "
            "parts of the image's size?"
        )


def inside_and_outside(boxes: Tensor, image_size: Sequence[float], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return how much the pixels of a map weigh as parts of objects, and of none, ``(N, H, W)`` each.

    A box reaches from the cell of its first corner to the cell behind its second one, and each of its cells weighs 1
    over their number; cells beyond the map's border count. Where boxes overlap the largest weight counts. A cell of no
    box weighs 1 over the number of such cells.

    Args:
        boxes: ``(N, K, 4)``, x1, y1, x2, y2. One without area, or outside of the image, marks nothing.
        image_size: height and width, in the boxes' unit.
        size: H and W of the map.

    Source: Yang et al. 2022 (FGD), equations 2 to 4, and the authors' code for the cells.
    """
    (height, width), (rows, cols) = image_size, size
    x1, y1, x2, y2 = boxes.unbind(2)  # each (N, K)
    is_there = (x2 > x1) & (y2 > y1) & (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    # The product first: x / width * cols may miss the integer of a corner on a cell's border.
    left, right = (x1 * cols / width).floor().clamp(0, cols), (x2 * cols / width).ceil().clamp(0, cols)
    top, bottom = (y1 * rows / height).floor().clamp(0, rows), (y2 * rows / height).ceil().clamp(0, rows)
    weight = torch.where(is_there, 1 / ((bottom + 1 - top) * (right + 1 - left)), 0.0)
    row = torch.arange(rows, device=boxes.device)[:, None]
    col = torch.arange(cols, device=boxes.device)
    edges = [each[:, :, None, None] for each in (left, right, top, bottom, weight)]  # (N, K, 1, 1)
    inside = boxes.new_zeros(len(boxes), rows, cols)
    if torch.compiler.is_compiling():
        # One graph serves any number of boxes. The compiler joins mask and maximum, so (N, K, H, W) is never stored.
        return _with_outside(torch.maximum(inside, _largest_weight(edges, row, col)))
    for first in range(0, boxes.shape[1], BOXES):
        inside = torch.maximum(inside, _largest_weight([each[:, first : first + BOXES] for each in edges], row, col))
    return _with_outside(inside)


def _largest_weight(edges: list[Tensor], row: Tensor, col: Tensor) -> Tensor:
    """Return the largest weight of any box at each cell, ``(N, H, W)``."""
    left, right, top, bottom, weight = edges
    is_inside = (col >= left) & (col <= right) & (row >= top) & (row <= bottom)  # (N, K, H, W)
    # Prepend a weight of 0, because the maximum of no box at all is an error.
    return F.pad(torch.where(is_inside, weight, 0.0), (0, 0, 0, 0, 1, 0)).amax(dim=1)


def _with_outside(inside: Tensor) -> tuple[Tensor, Tensor]:
    outside = (inside == 0).to(inside.dtype)
    return inside, outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
