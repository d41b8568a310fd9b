"""How models expect their images to be normalised, and whether a teacher gets them so."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from .feature_tap import unwrapped

__all__ = ["Normalization", "difference", "find_normalization"]

TOLERANCE = 0.01  # of a standard deviation: configs round these numbers to three digits


class Normalization(NamedTuple):
    """What is subtracted from each channel of an image, and what divides it."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    unit: float  # the largest value of a raw pixel: 1 or 255
    source: str  # where it was read, for a message
    inside: nn.Module | None = None  # the module that does it; None: the data pipeline, before the model is called
    is_flipped: bool = False  # whether the order of the channels is reversed

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in values) for values in (self.mean, self.std))
        flipped = ", channels reversed" if self.is_flipped else ""
        return f"mean ({mean}), std ({std}) of pixels in 0..{self.unit:.0f}{flipped} ({self.source})"


def find_normalization(model: nn.Module, preprocessor: Any = None) -> Normalization | None:
    """Return what a model says of its images; None where it says nothing, as Hugging Face's and Ultralytics' do.

    Known are torchvision's detectors (``transform.image_mean``), Detectron2's (``pixel_mean``), MMDetection's
    (``data_preprocessor.mean``) and timm's models (``pretrained_cfg`` or ``default_cfg``), the latter anywhere inside.
    They are told by these names alone: this module imports no framework.

    Args:
        model: any model, wrapped or not.
        preprocessor: the one that runs in place of the model's ``data_preprocessor``.
    """
    model = unwrapped(model)
    preprocessor = preprocessor or getattr(model, "data_preprocessor", None)
    if hasattr(preprocessor, "_enable_normalize"):
        return _of_preprocessor(preprocessor)
    for name, module in model.named_modules():
        if hasattr(module, "image_mean") and hasattr(module, "image_std"):
            return _made(module.image_mean, module.image_std, 1.0, f"{name}.image_mean", module)
        if hasattr(module, "pixel_mean") and hasattr(module, "pixel_std"):
            return _made(module.pixel_mean, module.pixel_std, 255.0, f"{name}.pixel_mean".lstrip("."), module)
    for name, module in model.named_modules():
        for config in ("pretrained_cfg", "default_cfg"):
            settings = getattr(module, config, None)
            if isinstance(settings, Mapping) and settings.get("mean") and settings.get("std"):
                return _made(settings["mean"], settings["std"], 1.0, f"{name}.{config}".lstrip("."))
    return None


def _of_preprocessor(preprocessor: Any) -> Normalization | None:
    """Return what MMEngine's preprocessor of images does; one that only moves them has no such flag."""
    is_flipped = bool(getattr(preprocessor, "_channel_conversion", False))
    if not preprocessor._enable_normalize:
        return Normalization((0.0,) * 3, (1.0,) * 3, 255.0, "data_preprocessor without a mean", is_flipped=is_flipped)
    found = _made(preprocessor.mean, preprocessor.std, 255.0, "data_preprocessor.mean")
    return None if found is None else found._replace(is_flipped=is_flipped)


def _made(mean: Any, std: Any, unit: float, source: str, inside: nn.Module | None = None) -> Normalization | None:
    """Return the record of numbers in lists or tensors; None where these are no numbers, or have no values (meta)."""
    try:
        means, stds = (torch.as_tensor(each, dtype=torch.float64).flatten().tolist() for each in (mean, std))
    except (TypeError, ValueError, RuntimeError):
        return None
    return Normalization(tuple(means), tuple(stds), unit, source, inside) if len(means) == len(stds) else None


def difference(student: Normalization | None, teacher: Normalization | None, entry: nn.Module | None) -> str | None:
    """Return what the teacher is given and what it expects, in words; None where that agrees or is not known.

    Args:
        student: what the student says of its images.
        teacher: what the teacher says of its own.
        entry: the teacher's module that is called with what the student's was given; None: the whole teacher is called
            with what the whole student is.
    """
    if student is None or teacher is None:
        return None
    teacher_does = teacher.inside is not None and (entry is None or _contains(entry, teacher.inside))
    if teacher_does:
        # Only the whole teacher, or an entry that is a detector itself, does; it is given what the student is.
        if student.inside is not None:
            return None
        return f"normalised already, with {student}, and normalises them once more, with {teacher}"
    if student.inside is not None and entry is None:
        return f"as they are, for the student normalises them inside, with {student}, and was trained with {teacher}"
    return None if _agree(student, teacher) else f"with {student}, and was trained with {teacher}"


def _contains(module: nn.Module, part: nn.Module) -> bool:
    return any(each is part for each in module.modules())


def _agree(first: Normalization, second: Normalization) -> bool:
    """Whether both make the same images of the same raw ones."""
    if first.is_flipped != second.is_flipped and first.inside is None and second.inside is None:
        return False
    if len(first.mean) != len(second.mean):  # grey images on one side
        return True
    numbers = zip(first.mean, first.std, second.mean, second.std, strict=True)
    return all(
        abs(s1 / first.unit - s2 / second.unit) <= TOLERANCE * s2 / second.unit
        and abs(m1 / first.unit - m2 / second.unit) <= TOLERANCE * s2 / second.unit
        for m1, s1, m2, s2 in numbers
    )
