"""Folders of pictures with boxes, read by :mod:`examples.datasets` and held in memory at the demo's size."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from ..datasets import DetectionSet, Findings, Picture, PictureError, load_picture, read_set
from .data import SPLITS, DataError, DetectionData, Images, Track


def resized(picture: Image.Image, boxes: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes ``(3, H, W)`` of `picture` with its longer side at `longest` pixels, and `boxes (K, 4)` to match."""
    width, height = (max(round(side * longest / max(picture.size)), 1) for side in picture.size)
    factors = torch.tensor([width / picture.width, height / picture.height]).repeat(2)
    return pil_to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR)), boxes * factors


def load_voc(
    root: Path,
    longest: int,
    train_images: int,
    val_images: int,
    track: Track = iter,
    findings: Findings | None = None,
    format: str = "voc",
    **folders: Any,
) -> DetectionData:
    """Read at most so many images of each split, all of them now, so that a broken file shows before any training.

    Args:
        track: wraps the loop over files, for a progress bar.
        findings: what is wrong with the files is added; a file that cannot be used is left out.
        format: ``"voc"``, or another one of :func:`examples.datasets.read_set`, which also takes `folders`.
    """
    findings = Findings() if findings is None else findings
    sets: dict[str, DetectionSet] = {}
    for split, limit in zip(SPLITS, (train_images, val_images), strict=True):
        classes = sets["train"].classes if sets else None
        # All pixels are read below, once.
        sets[split] = read_set(
            root, split, format=format, classes=classes, findings=findings, limit=limit, check=False, **folders
        )
    pictures = [(split, picture) for split in SPLITS for picture in sets[split].pictures]
    read = [(split, *loaded) for split, picture in track(pictures) if (loaded := _load(picture, longest, findings))]
    return _combined(root, sets, read, findings)


def _load(picture: Picture, longest: int, findings: Findings) -> tuple[Picture, torch.Tensor, torch.Tensor] | None:
    """The picture with its pixels and boxes at the demo's size; None where its file is damaged."""
    try:
        return picture, *resized(load_picture(picture.path), picture.boxes, longest)
    except PictureError as error:
        findings.skip(error.kind, error.path, error.detail)
        return None


def _combined(
    root: Path,
    sets: dict[str, DetectionSet],
    read: list[tuple[str, Picture, torch.Tensor, torch.Tensor]],
    findings: Findings,
) -> DetectionData:
    """Both splits over the classes that occur in them, by name."""
    names, found = sets["train"].classes, sets["train"].format
    # A crowd's box is around many objects; VOC's difficult ones are single objects, and stay.
    kept = [picture.crowd.logical_not() if found == "coco" else picture.crowd | True for _, picture, *_ in read]
    labels = [picture.labels[keep].tolist() for (_, picture, *_), keep in zip(read, kept, strict=True)]
    classes = tuple(sorted({names[label - 1] for label in itertools.chain(*labels)}))
    images = {split: Images() for split in SPLITS}
    for (split, picture, pixels, boxes), keep, numbers in zip(read, kept, labels, strict=True):
        images[split].add(pixels, boxes[keep], [classes.index(names[number - 1]) + 1 for number in numbers])
        if not keep.all():
            findings.note("crowd left out", picture.path, f"{keep.logical_not().sum()} boxes")
    for split in SPLITS:
        if not any(map(len, images[split].labels)):
            raise DataError(f"no usable box in the {split} images of {root} ({findings.summary()})")
    summary = (
        f"{root}: {len(images['train'])} training and {len(images['val'])} validation images, {len(classes)} classes, "
        f"format {found}; {findings.summary()}"
    )
    return DetectionData(images["train"], images["val"], classes, summary)
