"""Pictures without labels."""

from __future__ import annotations

from pathlib import Path

import torch

from .assembly import Entry, FrameReader
from .errors import DataError, PictureError
from .layout import existing_folder, files_of, subfolders
from .pictures import PICTURE_ENDINGS
from .records import DetectionSet, Findings, Picture, Track

__all__ = ["read_unlabelled"]


def read_unlabelled(folder: Path | str, *, findings: Findings, check: bool = True, track: Track = iter) -> DetectionSet:
    """Return the pictures in a folder and below it, none of which has a box.

    Args:
        folder: of the pictures.
        findings, check, track: as in :func:`read_voc`.

    Raises:
        DataError: no such folder, or no picture in it that can be read.
    """
    root = existing_folder(Path(folder))
    entries = [Entry(path, path, []) for path in _pictures_in(root)]
    pictures = []
    for entry, frame in track(FrameReader(entries, check)):
        if isinstance(frame, PictureError):
            findings.skip(frame.kind, frame.path, frame.detail)
        else:
            none = torch.zeros(0)
            pictures.append(Picture(entry.picture, none.reshape(0, 4), none.long(), none.bool()))
    if not pictures:
        raise DataError(f"no usable picture in {root} ({findings.summary()})")
    return DetectionSet(pictures, (), "unlabelled")


def _pictures_in(folder: Path) -> list[Path]:
    below = [path for each in subfolders(folder) for path in _pictures_in(each)]
    return [*files_of(folder, *PICTURE_ENDINGS), *below]
