"""What a teacher is given in place of the images that its student is given."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._numerics import accumulation_dtype
from .._validation import as_list, check_callable, check_number, is_list
from .feature_tap import unwrapped

__all__ = ["Renormalize", "TeacherInput", "checked_teacher_input", "first_argument", "with_first_argument"]

TeacherInput = Callable[[Any], Any] | Mapping[str, Any]

# Entries of a dict that hold images: of Hugging Face, Detectron2, and batches of one's own.
IMAGE_ENTRIES = ("pixel_values", "image", "images", "img", "inputs")


class Renormalize:
    """Make images normalised for the teacher of images normalised for the student, for a ``teacher_input``.

    Both sides subtract a mean from each channel of the same raw images and divide by a standard deviation. Pixels of 0
    with which a batch was padded after that are the student's mean, and become what the teacher makes of it.

    Args:
        student: mean and standard deviation of the student's images, one number a channel each, in a pair.
        teacher: the same of the images that the teacher was trained with, in the same order of channels and in the same
            unit: both of pixels in 0..1, or both of pixels in 0..255.

    Raises:
        TypeError: a side that is no pair of lists.
        ValueError: lists of different lengths, a mean that is not finite, a standard deviation that is not > 0.

    Example:
        >>> imagenet = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        >>> renormalize = Renormalize(student=imagenet, teacher=([0.5] * 3, [0.5] * 3))
        >>> renormalize(torch.zeros(1, 3, 1, 1)).flatten()  # the student's mean
        tensor([-0.0300, -0.0880, -0.1880])
    """

    def __init__(self, student: Any, teacher: Any):
        (mean_s, std_s), (mean_t, std_t) = _checked_side(student, "student"), _checked_side(teacher, "teacher")
        if len(mean_s) != len(mean_t):
            raise ValueError(
                f"student and teacher must have numbers for as many channels, got {len(mean_s)} and {len(mean_t)}"
            )
        # (x std_s + mean_s - mean_t) / std_t
        self.scale = [s / t for s, t in zip(std_s, std_t, strict=True)]
        self.shift = [(s - t) / std for s, t, std in zip(mean_s, mean_t, std_t, strict=True)]

    def __call__(self, images: Any) -> Any:
        """Return the teacher's images, in the form of the student's.

        Args:
            images: ``(N, C, H, W)`` or ``(C, H, W)`` of a floating-point dtype, a list or tuple of these, or a dict
                with them under ``"pixel_values"``, ``"image"``, ``"images"``, ``"img"`` or ``"inputs"``; also a list
                of such dicts. Everything else in a dict stays as it is.

        Raises:
            TypeError: images in another form, or of integers, which nobody has normalised yet.
            ValueError: images with another number of channels.
        """
        if isinstance(images, Tensor):
            return self._renormalized(images)
        if isinstance(images, (list, tuple)):
            return type(images)(map(self, images))
        names = [name for name in IMAGE_ENTRIES if name in images] if isinstance(images, Mapping) else []
        if not names:
            found = f"a dict with {list(images)}" if isinstance(images, Mapping) else type(images).__name__
            raise TypeError(
                f"Renormalize takes images in a tensor, a list, or a dict under {', '.join(map(repr, IMAGE_ENTRIES))}, "
                f"got {found}: give teacher_input a function of your own"
            )
        return {**images, **{name: self(images[name]) for name in names}}

    def _renormalized(self, images: Tensor) -> Tensor:
        """Return ``images (..., C, H, W)`` renormalised. Factors are Python's numbers: none has to reach a GPU."""
        if not images.is_floating_point():
            raise TypeError(
                f"Renormalize takes images that are normalised for the student, got {images.dtype}: such images are raw"
            )
        if images.dim() < 3 or images.shape[-3] != len(self.scale):
            raise ValueError(
                f"Renormalize has numbers for {len(self.scale)} channels, got images of shape {tuple(images.shape)}"
            )
        wide = images.to(accumulation_dtype(images))
        channels = zip(wide.unbind(-3), self.scale, self.shift, strict=True)
        return torch.stack([x * scale + shift for x, scale, shift in channels], dim=-3).to(images.dtype)


def _checked_side(side: Any, name: str) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation, one number a channel."""
    expected = "a pair of lists, (mean, std), with a number for each channel"
    if not is_list(side) or len(side) != 2 or not all(map(is_list, side)):
        raise TypeError(f"{name} must be {expected}, got {side!r}")
    mean, std = (
        (each.flatten().tolist() if isinstance(each, Tensor) else as_list(each, expected, name)) for each in side
    )
    if len(mean) != len(std) or not mean:
        raise ValueError(f"{name} must be {expected}, got {len(mean)} and {len(std)} numbers")
    return (
        [check_number(each, "a list of finite numbers", lambda value: True, f"{name}: the mean") for each in mean],
        [check_number(each, "a list of numbers > 0", lambda value: value > 0, f"{name}: the std") for each in std],
    )


def checked_teacher_input(value: Any) -> Callable[[Any], Any] | None:
    """Return the function that makes the teacher's images; a dict, as a config has it, holds Renormalize's arguments.

    Raises:
        TypeError: something that cannot be called, a dict with other names.
        ValueError: as for :class:`Renormalize`.
    """
    if value is None:
        return None
    if isinstance(value, Mapping):
        if set(value) != {"student", "teacher"}:
            raise TypeError(
                f"teacher_input must have the entries 'student' and 'teacher', each (mean, std), got {list(value)}"
            )
        return Renormalize(**value)
    if is_list(value):
        raise TypeError(
            "teacher_input must be a function of the images, got a list; for two normalisations give "
            "Renormalize(student=(mean, std), teacher=(mean, std))"
        )
    check_callable(value, "teacher_input")
    return value


def first_argument(module: nn.Module) -> str | None:
    """Return the name of the first argument of a module's forward; None where it has none by name."""
    try:
        parameters = inspect.signature(unwrapped(module).forward).parameters.values()
    except (TypeError, ValueError):  # TorchScript's forward has no signature
        return None
    first = next(iter(parameters), None)
    return first.name if first is not None and first.kind is first.POSITIONAL_OR_KEYWORD else None


def with_first_argument(
    change: Callable[[Any], Any], name: str | None, args: tuple, kwargs: dict[str, Any]
) -> tuple[tuple, dict[str, Any]]:
    """Return a call's arguments with ``change`` of the first one in its place, be it given by position or by ``name``.

    Raises:
        TypeError: there is no such argument.
    """
    if args:
        return (change(args[0]), *args[1:]), kwargs
    if name is None and len(kwargs) == 1:
        (name,) = kwargs
    if name not in kwargs:
        raise TypeError(
            f"teacher_input makes the teacher's first argument, {name or 'which has no name'}, but the teacher is "
            f"given {', '.join(map(repr, kwargs)) or 'nothing'}: pass the images by position"
        )
    return args, {**kwargs, name: change(kwargs[name])}
