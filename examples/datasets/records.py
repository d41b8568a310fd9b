"""What the readers make: pictures with boxes, sets of them, and what was wrong with the files."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .errors import DataError
from .pictures import open_picture

Target = dict[str, Tensor]
Track = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture's file and its objects.

    Attributes:
        path: the file, for :func:`open_picture`.
        boxes: ``(K, 4)`` float32, left, top, right and bottom in pixels of the picture as it is shown, which is after
            its EXIF rotation. They lie inside of the picture and have an area.
        labels: ``(K,)`` int64, from 1; label 1 is the set's ``classes[0]``.
        crowd: ``(K,)`` bool: COCO's crowds and VOC's difficult objects. Leave these out of a training and ignore them
            in a score.
    """

    path: Path
    boxes: Tensor
    labels: Tensor
    crowd: Tensor


@dataclass
class DetectionSet(Dataset[tuple[Tensor, Target]]):
    """Pictures over common classes; an item is ``(image, target)``, read from its file when it is asked for.

    The image is a uint8 tensor ``(3, H, W)``, RGB. The target has ``boxes (K, 4)``, ``labels (K,)``, ``image_id`` (the
    item's index), ``area (K,)`` of the boxes and ``iscrowd (K,)``, as torchvision's and COCO's tools name them.
    """

    pictures: list[Picture]
    classes: tuple[str, ...]
    format: str = ""

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        picture = self.pictures[index]
        sides = picture.boxes[:, 2:] - picture.boxes[:, :2]
        target = {
            "boxes": picture.boxes.clone(),
            "labels": picture.labels.clone(),
            "image_id": torch.tensor(index % len(self.pictures)),
            "area": sides.prod(dim=1),
            "iscrowd": picture.crowd.long(),
        }
        return open_picture(picture.path), target


class Finding(NamedTuple):
    """One thing that is wrong with a file, and whether it cost a picture or a box (``skipped``) or not (``kept``)."""

    effect: str
    kind: str
    file: str
    detail: str


@dataclass
class Findings:
    """What was wrong with the files of a set. The same finding is counted once, however often it is reported.

    With ``strict`` the first picture or box that has to be skipped raises :class:`DataError`.

    Example:
        >>> findings = Findings()
        >>> findings.skip("truncated picture", "images/a.jpg", "70 bytes are missing")
        >>> findings.note("box clipped", "labels/b.xml", "object 2 (cell)")
        >>> findings.summary()
        'skipped: truncated picture (1); kept: box clipped (1)'
    """

    strict: bool = False
    _found: dict[Finding, None] = field(default_factory=dict, repr=False)

    def skip(self, kind: str, file: Path | str, detail: str = "") -> None:
        """Count a picture or a box that is left out."""
        if self.strict:
            raise DataError(f"{file}: {kind}" + (f": {detail}" if detail else ""))
        self._found[Finding("skipped", kind, str(file), detail)] = None

    def note(self, kind: str, file: Path | str, detail: str = "") -> None:
        """Count an oddity that leaves nothing out."""
        self._found[Finding("kept", kind, str(file), detail)] = None

    def counts(self) -> dict[str, int]:
        """Return how often each kind was found, in the order of the first ones."""
        return dict(Counter(finding.kind for finding in self._found))

    def files(self, kind: str) -> list[str]:
        """Return the files of one kind, each once."""
        return list(dict.fromkeys(finding.file for finding in self._found if finding.kind == kind))

    def summary(self) -> str:
        """Return the counts in one line."""
        parts = []
        for effect in ("skipped", "kept"):
            counts = Counter(finding.kind for finding in self._found if finding.effect == effect)
            if counts:
                parts.append(f"{effect}: " + ", ".join(f"{kind} ({count})" for kind, count in counts.items()))
        return "; ".join(parts) or "nothing is wrong with the files"

    def write(self, path: Path | str) -> None:
        """Write a CSV file with a row for each finding: effect, kind, file and detail."""
        # surrogateescape: names of files need not be UTF-8.
        with Path(path).open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = csv.writer(file)
            rows.writerow(Finding._fields)
            rows.writerows(self._found)
