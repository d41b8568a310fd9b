"""Boxes of a batch, and where they lie on a feature map."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .._validation import as_list, check_number

__all__ = ["check_form", "checked_boxes", "inside_and_outside"]

BOXES = 16  # of each image, that are drawn at once


def checked_boxes(boxes: Any, image_size: Any, images: int, device: torch.device) -> Tensor:
    """Return the boxes of all images, ``(images, K, 4)`` on the device, those that some lack without area.

    Raises:
        TypeError: boxes that are no list of tensors.
        ValueError: another number of images, a shape other than ``(K, 4)``, an image size that is no pair of sizes.
    """
    given = as_list(boxes, "a list of one tensor (K, 4) per image", "boxes")
    if len(given) != images:
        raise ValueError(f"boxes must have one tensor for each of the {images} images, got {len(given)}")
    for index, each in enumerate(given):
        if not isinstance(each, Tensor):
            raise TypeError(f"boxes[{index}] must be a tensor (K, 4), got {type(each).__name__}")
        if each.dim() != 2 or each.shape[1] != 4:
            raise ValueError(f"boxes[{index}] must have shape (K, 4): x1, y1, x2, y2, got {tuple(each.shape)}")
    size = as_list(image_size, "a pair of height and width", "image_size")
    if len(size) != 2:
        raise ValueError(f"image_size must be a pair of height and width, got {image_size!r}")
    for each in size:
        check_number(each, "a pair of numbers > 0", lambda number: number > 0, "image_size")
    if not given:
        return torch.zeros(0, 0, 4, device=device)
    dtype = torch.float64 if any(each.dtype == torch.float64 for each in given) else torch.float32
    return pad_sequence([each.detach().to(device, dtype) for each in given], batch_first=True)


def check_form(boxes: Tensor) -> None:
    """Refuse boxes ``(N, K, 4)`` that are most likely of another form. It waits for the device.

    Raises:
        ValueError: sides the wrong way round in most boxes, or no number above 1.
    """
    given = boxes[(boxes != 0).any(dim=2)]
    if not len(given):
        return
    turned = int(((given[:, 2] < given[:, 0]) | (given[:, 3] < given[:, 1])).sum())
    if 2 * turned > len(given):
        raise ValueError(
            f"boxes must be x1, y1, x2, y2, but in {turned} of {len(given)} the second corner is left of or above the "
            "first: are they x, y, width, height?"
        )
    if float(given.max()) <= 1:
        raise ValueError(
            f"boxes must be in pixels, but no number is above 1 ({float(given.max()):.3g} is the largest): are they "
            "parts of the image's size?"
        )


def inside_and_outside(boxes: Tensor, image_size: Sequence[float], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return how much the pixels of a map weigh as parts of objects, and of none, ``(N, H, W)`` each.

    A pixel of a box weighs 1 over the number of the box's pixels; where boxes overlap the largest weight counts. A
    pixel of no box weighs 1 over the number of such pixels.

    Args:
        boxes: ``(N, K, 4)``, x1, y1, x2, y2. One without area, or outside of the image, marks nothing.
        image_size: height and width, in the boxes' unit.
        size: H and W of the map.

    Source: Yang et al. 2022 (FGD), equations 2 to 4; that a box reaches to the cell behind ``ceil(x2)`` is the code's.
    """
    (height, width), (rows, cols) = image_size, size
    x1, y1, x2, y2 = boxes.unbind(2)  # each (N, K)
    is_there = (x2 > x1) & (y2 > y1) & (x2 > 0) & (y2 > 0) & (x1 < width) & (y1 < height)
    left, right = (x1 / width * cols).floor().clamp(0, cols), (x2 / width * cols).ceil().clamp(0, cols)
    top, bottom = (y1 / height * rows).floor().clamp(0, rows), (y2 / height * rows).ceil().clamp(0, rows)
    weight = torch.where(is_there, 1 / ((bottom + 1 - top) * (right + 1 - left)), 0.0)
    row = torch.arange(rows, device=boxes.device)[:, None]
    col = torch.arange(cols, device=boxes.device)
    inside = boxes.new_zeros(len(boxes), rows, cols)
    for first in range(0, boxes.shape[1], BOXES):
        some = [each[:, first : first + BOXES, None, None] for each in (left, right, top, bottom, weight)]
        is_inside = (col >= some[0]) & (col <= some[1]) & (row >= some[2]) & (row <= some[3])  # (N, some, H, W)
        inside = torch.maximum(inside, torch.where(is_inside, some[4], 0.0).amax(dim=1))
    outside = (inside == 0).to(boxes.dtype)
    return inside, outside / outside.sum(dim=(1, 2), keepdim=True).clamp(min=1)
