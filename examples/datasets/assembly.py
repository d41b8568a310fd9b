"""From what label files say to pictures with boxes that can be used: the same for every format."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image

from .errors import DataError, PictureError
from .pictures import Edges, Frame, read_frame
from .records import DetectionSet, Findings, Picture, Track

# Pixels outside of the picture that are not worth a word: rounded fractions, and VOC files that count from 0.
CLIP_TOLERANCE = 1.0


class LabelledBox(NamedTuple):
    """One object as its file states it; `title` names it in findings."""

    name: str
    edges: Edges
    crowd: bool
    title: str


@dataclass(frozen=True)
class Entry:
    """One picture's labels as they were read.

    Attributes:
        labels: the file that they come from.
        recorded: the picture's ``(width, height)`` as that file has it.
        first_pixel: the number of the first pixel: 1 in VOC, which also includes the last pixel in a box.
        in_fractions: edges are fractions of the shown picture, not pixels.
    """

    picture: Path
    labels: Path
    boxes: list[LabelledBox]
    recorded: tuple[int, int] | None = None
    first_pixel: int = 0
    in_fractions: bool = False


def build_set(
    entries: Sequence[Entry],
    classes: Sequence[str],
    findings: Findings,
    *,
    format: str,
    origin: Path,
    split: str,
    check: bool,
    track: Track,
) -> DetectionSet:
    """Return the set of `entries`, without the pictures and boxes that cannot be used.

    Args:
        classes: the names that labels count.
        origin: the folder or file that an error names.
        check: read all pixels of each picture, not its header alone.
        track: wraps the loop over entries, for a progress bar.

    Raises:
        DataError: no picture is left.
    """
    labels = {name: label for label, name in reversed(list(enumerate(classes, start=1)))}
    pictures = []
    for entry, frame in track(FrameReader(entries, check)):
        if isinstance(frame, PictureError):
            findings.skip(frame.kind, frame.path, frame.detail)
        else:
            pictures.append(_picture(entry, frame, labels, findings))
    if not pictures:
        raise DataError(f"no usable picture of {split} in {origin} ({findings.summary()})")
    return DetectionSet(pictures, tuple(classes), format)


class FrameReader:
    """Iterate over ``(entry, frame or error)``, in order, with the files read by several threads."""

    def __init__(self, entries: Sequence[Entry], check: bool) -> None:
        self.entries, self.check = entries, check

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[tuple[Entry, Frame | PictureError]]:
        Image.init()  # Pillow's list of formats is not made by several threads at once.
        pool = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))
        try:
            yield from zip(self.entries, pool.map(self._inspect, self.entries), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)

    def _inspect(self, entry: Entry) -> Frame | PictureError:
        try:
            return read_frame(entry.picture, self.check)
        except PictureError as error:
            return error


def _picture(entry: Entry, frame: Frame, labels: dict[str, int], findings: Findings) -> Picture:
    as_stored = _refers_to_stored(entry, frame, findings)
    kept = []
    for box in entry.boxes:
        edges = _usable_edges(box, entry, frame, as_stored, findings)
        if edges is None:
            continue
        if box.name in labels:
            kept.append((edges, labels[box.name], box.crowd))
        else:
            findings.skip("unknown label", entry.labels, box.title)
    if not kept:
        findings.note("no box", entry.picture, "kept as a picture of background")
    boxes, numbers, crowd = zip(*kept, strict=True) if kept else ((), (), ())
    return Picture(
        entry.picture,
        torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        torch.tensor(numbers, dtype=torch.int64),
        torch.tensor(crowd, dtype=torch.bool),
    )


def _refers_to_stored(entry: Entry, frame: Frame, findings: Findings) -> bool:
    """True where boxes have to be turned with the picture: the recorded size is that before the EXIF rotation alone.

    Where the size cannot tell, boxes are taken as those of the shown picture: so do Detectron2, MMDetection and
    Ultralytics.
    """
    if entry.recorded == frame.stored != frame.shown:
        findings.note("box rotated with its picture", entry.picture, f"EXIF orientation {frame.orientation}")
        return True
    sizes = f"{{}}×{{}} recorded, {frame.shown[0]}×{frame.shown[1]} in the file"
    if entry.recorded and entry.recorded != frame.shown:
        findings.note("other size recorded", entry.labels, sizes.format(*entry.recorded))
    elif frame.orientation != 1 and (entry.recorded is None or frame.stored == frame.shown):
        detail = f"EXIF orientation {frame.orientation}: boxes taken as those of the rotated picture"
        findings.note("rotation that no recorded size explains", entry.picture, detail)
    return False


def _usable_edges(box: LabelledBox, entry: Entry, frame: Frame, as_stored: bool, findings: Findings) -> Edges | None:
    """The box in pixels of the shown picture, clipped, or None where nothing is left of it."""
    left, top, right, bottom = box.edges
    if not (all(map(math.isfinite, box.edges)) and left < right and top < bottom):
        findings.skip("degenerate box", entry.labels, box.title)
        return None
    whole = (left - entry.first_pixel, top - entry.first_pixel, right, bottom)
    if entry.in_fractions:
        whole = tuple(edge * side for edge, side in zip(whole, frame.shown * 2, strict=True))
    if as_stored:
        whole = frame.upright(whole)
    width, height = frame.shown
    inside = (max(whole[0], 0.0), max(whole[1], 0.0), min(whole[2], float(width)), min(whole[3], float(height)))
    if not (inside[0] < inside[2] and inside[1] < inside[3]):
        findings.skip("box outside", entry.labels, box.title)
        return None
    if max(abs(a - b) for a, b in zip(whole, inside, strict=True)) > CLIP_TOLERANCE:
        findings.note("box clipped", entry.labels, box.title)
    return inside
