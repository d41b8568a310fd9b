"""The boxes of a step's batch, for losses that need them, in the forms in which frameworks give them to a detector.

They are recognised by what they have: this module imports no framework.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .._validation import check_callable, is_list
from .feature_tap import FeatureTap, unwrapped
from .pairing import resizing_module

__all__ = ["BatchBoxes", "BoxSource", "boxes_of_call"]

HOW = (
    "give Distiller(boxes=...), a function of the detector's arguments that returns the boxes of each image, (K, 4) "
    "with x1, y1, x2, y2 in pixels, and the batch's (height, width)"
)


class BatchBoxes(NamedTuple):
    """The boxes of a batch of images.

    Attributes:
        boxes: of each image ``(K, 4)``: x1, y1, x2, y2 in pixels of the batch.
        image_size: the batch's height and width, padding included.
    """

    boxes: Sequence[Tensor]
    image_size: Sequence[int]


class BoxSource:
    """Where the boxes of a step come from.

    Args:
        student: a torchvision detector's own boxes are taken behind its ``transform``, which resizes and pads images.
        function: of the detector's arguments, in place of what is known here.
    """

    def __init__(self, student: nn.Module, function: Callable[..., Any] | None):
        if function is not None:
            check_callable(function, "boxes")
        self.function = function
        self._tap: FeatureTap | None = None
        resizing = None if function is not None else resizing_module(student)
        if resizing is not None:
            path = next(path for path, module in unwrapped(student).named_modules() if module is resizing)
            self._tap = FeatureTap(student, path, name="the images' transform")
            self._tap.close()

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Catch the resized boxes while the student runs."""
        with self._tap or contextlib.nullcontext():
            yield

    def clear(self) -> None:
        """Forget what was caught in a step whose boxes nobody asked for."""
        if self._tap is not None:
            self._tap.clear()

    def of_call(self, args: tuple, kwargs: dict[str, Any]) -> BatchBoxes:
        """Return the boxes of the forward that has just run.

        Raises:
            TypeError: arguments of no known form, or a function that returns something else.
        """
        if self._tap is not None:
            ((images, targets),) = self._tap.caught()
            return BatchBoxes([target["boxes"] for target in targets], tuple(images.tensors.shape[-2:]))
        if self.function is None:
            return boxes_of_call(args, kwargs)
        found = self.function(*args, **kwargs)
        if not isinstance(found, (tuple, list)) or len(found) != 2:
            raise TypeError(f"boxes must return a pair of boxes and (height, width), got {type(found).__name__}")
        return BatchBoxes(*found)


def boxes_of_call(args: tuple, kwargs: Mapping[str, Any]) -> BatchBoxes:
    """Return the boxes in what a detector is given.

    Known are Ultralytics' batch (a dict with ``img``, ``bboxes`` and ``batch_idx``), Hugging Face's ``pixel_values``
    and ``labels``, MMDetection's ``data_samples``, and images with a list of dicts that have ``boxes`` in pixels.

    Raises:
        TypeError: none of these.
    """
    batches = [kwargs, *(value for value in args if isinstance(value, Mapping))]
    for batch in batches:
        if {"img", "bboxes", "batch_idx"} <= set(batch):
            return _of_ultralytics(batch)
        if {"pixel_values", "labels"} <= set(batch) and is_list(batch["labels"]):
            return _of_hugging_face(batch["pixel_values"], batch["labels"])
    values = [*args, *kwargs.values()]
    lists = [value for value in values if is_list(value) and len(value) and not isinstance(value, Tensor)]
    size = _image_size(values)
    for each in lists:
        if size is not None and all(hasattr(item, "gt_instances") for item in each):
            return BatchBoxes([_tensor(item.gt_instances.bboxes) for item in each], size)
        if size is not None and all(isinstance(item, Mapping) and "boxes" in item for item in each):
            return BatchBoxes([item["boxes"] for item in each], size)
    kinds = ", ".join(type(value).__name__ for value in values) or "nothing"
    raise TypeError(f"the loss needs the batch's boxes, but they are not found in {kinds}: {HOW}")


def _of_ultralytics(batch: Mapping[str, Any]) -> BatchBoxes:
    height, width = batch["img"].shape[-2:]
    boxes, index = batch["bboxes"].to(batch["img"].device), batch["batch_idx"].to(batch["img"].device).flatten()
    corners = _corners(boxes, height, width)
    return BatchBoxes([corners[index == image] for image in range(len(batch["img"]))], (height, width))


def _of_hugging_face(images: Tensor, labels: Sequence[Mapping[str, Tensor]]) -> BatchBoxes:
    height, width = images.shape[-2:]
    return BatchBoxes([_corners(each["boxes"], height, width) for each in labels], (height, width))


def _corners(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return x1, y1, x2, y2 in pixels of centre and size in parts of the image, and around a box with an angle."""
    x, y, w, h = (column * side for column, side in zip(boxes.unbind(1), (width, height, width, height), strict=False))
    if boxes.shape[1] == 5:
        cosine, sine = boxes[:, 4].cos().abs(), boxes[:, 4].sin().abs()
        w, h = w * cosine + h * sine, w * sine + h * cosine
    return torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], dim=1)


def _image_size(values: Sequence[Any]) -> tuple[int, ...] | None:
    """Return the size of a batch of images: a tensor, or a list of tensors of one size."""
    for value in values:
        images = [value] if isinstance(value, Tensor) else value if is_list(value) else []
        if len(images) and all(isinstance(image, Tensor) and image.dim() in (3, 4) for image in images):
            sizes = {tuple(image.shape[-2:]) for image in images}
            return sizes.pop() if len(sizes) == 1 else None
    return None


def _tensor(boxes: Any) -> Tensor:
    """Return MMDetection's box structures as corners."""
    return boxes if isinstance(boxes, Tensor) else boxes.tensor
