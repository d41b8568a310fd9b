"""Pascal VOC folders: ``Annotations/*.xml``, ``JPEGImages/*`` and, where present, lists in ``ImageSets/Main``."""

from __future__ import annotations

import math
import random
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torchvision.transforms.functional import pil_to_tensor

from .data import SPLIT_SEED, SPLITS, VAL_FRACTION, DataError, DetectionData, Images, Track

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".JPG", ".JPEG", ".PNG")


@dataclass
class Annotation:
    """One picture's boxes that can be used, in pixels from 0, their classes, and how many boxes could not be used."""

    boxes: list[tuple[float, float, float, float]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    skipped: int = 0


def unreadable(path: Path, reason: object) -> DataError:
    """The error that names `path` and gives the first line of the reason."""
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return DataError(f"cannot read {path}: {text.splitlines()[0]}")


def read_annotation(path: Path, width: int, height: int) -> Annotation:
    """Read a VOC file for a picture of ``width × height`` pixels.

    VOC counts pixels from 1 and includes the last one, so only the near edges are shifted. Boxes are clipped to the
    picture; those without area, before or after, are counted and not kept.
    """
    try:
        objects = ElementTree.parse(path).getroot().findall("object")
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise unreadable(path, error) from error
    found = Annotation()
    for number, item in enumerate(objects, start=1):
        name = (item.findtext("name") or "").strip()
        if not name:
            raise unreadable(path, f"object {number} has no name")
        try:
            edges = [float(item.findtext(f"bndbox/{edge}", "")) for edge in ("xmin", "ymin", "xmax", "ymax")]
        except ValueError as error:
            raise unreadable(path, f"object {number} ({name}) has no bndbox of four numbers") from error
        left, top = max(edges[0] - 1, 0.0), max(edges[1] - 1, 0.0)
        right, bottom = min(edges[2], float(width)), min(edges[3], float(height))
        has_area = edges[0] < edges[2] and edges[1] < edges[3] and left < right and top < bottom
        if has_area and all(map(math.isfinite, edges)):
            found.boxes.append((left, top, right, bottom))
            found.names.append(name)
        else:
            found.skipped += 1
    return found


def read_picture(folder: Path, stem: str) -> Image.Image:
    """The picture called `stem`, whatever its format."""
    candidates = [folder / (stem + suffix) for suffix in IMAGE_SUFFIXES]
    path = next((candidate for candidate in candidates if candidate.exists()), candidates[0])
    try:
        return Image.open(path).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise unreadable(path, error) from error


def read_list(path: Path) -> list[str]:
    """The first word of each line that has one."""
    try:
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def split_stems(root: Path) -> dict[str, list[str]]:
    """File stems of both splits: the folder's own lists, or a fixed shuffle of all annotations where it has none."""
    for folder in (root, root / "Annotations", root / "JPEGImages"):
        if not folder.is_dir():
            raise DataError(f"no such folder: {folder}")
    origin = root / "ImageSets" / "Main"
    if origin.is_dir():
        stems = {split: read_list(origin / f"{split}.txt") for split in SPLITS}
    else:
        origin = root / "Annotations"
        shuffled = sorted(path.stem for path in origin.glob("*.xml"))
        random.Random(SPLIT_SEED).shuffle(shuffled)
        held_out = math.ceil(len(shuffled) * VAL_FRACTION)
        stems = {"train": shuffled[held_out:], "val": shuffled[:held_out]}
    for split in SPLITS:
        if not stems[split]:
            raise DataError(f"no {split} images are listed in {origin}")
    return stems


def resized(picture: Image.Image, boxes: torch.Tensor, longest: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Bytes ``(3, H, W)`` of `picture` with its longer side at `longest` pixels, and `boxes (K, 4)` to match."""
    width, height = (max(round(side * longest / max(picture.size)), 1) for side in picture.size)
    factors = torch.tensor([width / picture.width, height / picture.height]).repeat(2)
    return pil_to_tensor(picture.resize((width, height), Image.Resampling.BILINEAR)), boxes * factors


def load_voc(root: Path, longest: int, train_images: int, val_images: int, track: Track = iter) -> DetectionData:
    """Read at most so many images of each split, all of them now, so that a broken file shows before any training.

    `track` wraps the loop over files, for a progress bar.
    """
    listed, read = split_stems(root), []
    stems = {"train": listed["train"][:train_images], "val": listed["val"][:val_images]}
    for split, stem in track([(each, stem) for each in SPLITS for stem in stems[each]]):
        picture = read_picture(root / "JPEGImages", stem)
        found = read_annotation(root / "Annotations" / f"{stem}.xml", *picture.size)
        boxes = torch.tensor(found.boxes, dtype=torch.float32).reshape(-1, 4)
        read.append((split, *resized(picture, boxes, longest), found))
    classes = tuple(sorted({name for *_, found in read for name in found.names}))
    sets = {split: Images() for split in SPLITS}
    for split, pixels, boxes, found in read:
        sets[split].add(pixels, boxes, [classes.index(name) + 1 for name in found.names])
    for split in SPLITS:
        if not any(map(len, sets[split].labels)):
            raise DataError(f"no usable box in the {split} images of {root}")
    skipped = sum(found.skipped for *_, found in read)
    summary = (
        f"{root}: {len(sets['train'])} training and {len(sets['val'])} validation images, {len(classes)} classes, "
        f"{skipped} degenerate {'box' if skipped == 1 else 'boxes'} skipped"
    )
    return DetectionData(sets["train"], sets["val"], classes, summary)
