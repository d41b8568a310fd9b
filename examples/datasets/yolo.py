"""YOLO text labels: a file for each picture, with a line ``class x y width height`` in fractions for each box."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .assembly import Entry, LabelledBox, build_set
from .errors import DataError, first_line, read_text
from .layout import (
    PICTURE_FOLDERS,
    existing_folder,
    files_of,
    fixed_split,
    named_folder,
    names_any_split,
    split_folder,
    split_names,
    subfolders,
    the_only,
)
from .pictures import PictureIndex
from .records import DetectionSet, Findings, Track

LABEL_FOLDER = "labels"
NAME_FILES = ("classes.txt", "obj.names", "names.txt")
# Above this an edge is meant in pixels: a box that is only partly outside has a centre below 2.
LARGEST_FRACTION = 2.0


def read_yolo(
    root_or_yaml: Path | str,
    split: str,
    *,
    classes: Sequence[str] | None = None,
    findings: Findings,
    limit: int | None = None,
    check: bool = True,
    track: Track = iter,
) -> DetectionSet:
    """Read a split of a set with YOLO's text labels.

    The pictures are those that ``data.yaml`` names (a folder, several, or a list of files), or else those in
    ``images/<split>`` or ``<split>/images``; without such a folder a fixed shuffle makes train and val. The labels lie
    beside a picture or where ``images`` in its path is ``labels``. Lines of polygons give the polygon's box.

    Args:
        root_or_yaml: the set's folder or its YAML file.
        classes: the names that labels count. By default those of ``data.yaml`` (a list or a dict) or ``classes.txt``.
        findings: what is wrong with the files is added.
        limit, check, track: as in :func:`read_voc`.

    Raises:
        DataError: a folder or a list is missing, the YAML file cannot be read, or no picture is left.
    """
    found = find_yolo(Path(root_or_yaml), split, findings)
    entries = [_entry(path, found.names, findings) for path in found.pictures[:limit]]
    if classes is None:
        classes = list(found.names.values()) or _numbered(entries)
    return build_set(
        [entry for entry in entries if entry],
        classes,
        findings,
        format="yolo",
        origin=found.origin,
        split=split,
        check=check,
        track=track,
    )


@dataclass
class YoloSplit:
    """The pictures of a split, and names by class number, none where the set has no names."""

    origin: Path
    pictures: list[Path]
    names: dict[int, str]


def find_yaml(root: Path) -> Path | None:
    """Return a set's YAML file: `root` itself, ``data.yaml``, or the only one with ``names``."""
    if root.is_file():
        return root
    files = files_of(root, ".yaml", ".yml")
    usual = [path for path in files if path.stem.lower() in ("data", "dataset")]
    return the_only(usual or [path for path in files if "names" in load_yaml(path)], root, "YAML files of names")


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the content of a set's YAML file; raise :class:`DataError` where it is no mapping."""
    try:
        content = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise DataError(f"cannot read {path}: expected a mapping with train, val and names")
    return content


def find_yolo(root: Path, split: str, findings: Findings) -> YoloSplit:
    """Return a split's pictures and the names of classes; report labels without a picture."""
    if not root.is_file():
        existing_folder(root)
    path = find_yaml(root)
    config = load_yaml(path) if path else {}
    base = root if root.is_dir() else root.parent
    source = next((config[name] for name in split_names(split) if config.get(name)), None)
    if source is not None:
        base = _base_folder(base, config)
        pictures = _configured_pictures(base, source, path or base, findings)
    else:
        pictures = _pictures_of_folders(base, split, findings)
    names = _unique(_configured_names(config, path or base) or _listed_names(base, split))
    return YoloSplit(path or base, pictures, names)


def _base_folder(folder: Path, config: dict[str, Any]) -> Path:
    """The folder that paths in the YAML file are relative to: its ``path`` where that exists here."""
    stated = folder / str(config.get("path") or ".")
    return stated if stated.is_dir() else folder


def _configured_pictures(base: Path, source: Any, path: Path, findings: Findings) -> list[Path]:
    """The pictures of ``train: images/train``, of a list of such folders, or of a text file with a picture a line."""
    pictures: list[Path] = []
    for item in source if isinstance(source, list) else [source]:
        # Roboflow's files say ../train/images and mean train/images.
        choices = [base / str(item), base / str(item).removeprefix("../")]
        place = next((choice for choice in choices if choice.exists()), None)
        if place is None:
            raise DataError(f"no such file or folder: {choices[0]} (named in {path})")
        if place.is_dir():
            found = PictureIndex(place).files
            _report_labels_without_picture(found, place, findings)
            pictures += found
        else:
            pictures += _listed_pictures(base, place, findings)
    return list(dict.fromkeys(pictures))


def _listed_pictures(base: Path, path: Path, findings: Findings) -> list[Path]:
    pictures, index = [], None
    for line in filter(None, map(str.strip, read_text(path).splitlines())):
        plain = next((choice for choice in (path.parent / line, base / line) if choice.is_file()), None)
        index = index or (None if plain else PictureIndex(base))
        found = [plain] if plain else index.find(line) if index else []
        if len(found) == 1:
            pictures.append(found[0])
        else:
            kind = "several pictures of that name" if found else "listed name without files"
            findings.skip(kind, path, line)
    return pictures


def _pictures_of_folders(base: Path, split: str, findings: Findings) -> list[Path]:
    images = named_folder(base, PICTURE_FOLDERS)
    own = (images and split_folder(images, split)) or split_folder(base, split)
    place = own or images or base
    if not own and any(names_any_split(folder.name) for folder in subfolders(place)):
        # A shuffle would put pictures of the other split into this one.
        raise DataError(f"no folder of the split {split!r} in {place}, which has those of others")
    pictures = PictureIndex(place).files
    _report_labels_without_picture(pictures, place, findings)
    chosen = pictures if own else fixed_split(pictures, split, place)
    if not chosen:
        raise DataError(f"no {split} images in {place}")
    return chosen


def label_paths(picture: Path) -> list[Path]:
    """Return where a picture's labels may be: ``images`` in its path replaced by ``labels``, and beside it."""
    parts = list(picture.parent.parts)
    usual = {name.lower() for name in PICTURE_FOLDERS}
    places = [position for position, part in enumerate(parts) if part.lower() in usual]
    folders = [picture.parent]
    if places:
        folders.insert(0, Path(*parts[: places[-1]], LABEL_FOLDER, *parts[places[-1] + 1 :]))
    return [folder / f"{picture.stem}.txt" for folder in folders]


def _report_labels_without_picture(pictures: list[Path], place: Path, findings: Findings) -> None:
    used = {path for picture in pictures for path in label_paths(picture)}
    folders = {path.parent for path in used} | {path.parent for path in label_paths(place / "any")}
    lists = {f"{name}.txt" for split in ("train", "val", "test") for name in split_names(split)}
    for folder in sorted(folder for folder in folders if folder.is_dir()):
        for path in files_of(folder, ".txt"):
            is_label = path.name.lower() not in {*NAME_FILES, *lists} and not path.name.lower().startswith("readme")
            if is_label and path not in used:
                findings.skip("labels without a picture", path, f"no picture of that name in {place}")


def _configured_names(config: dict[str, Any], path: Path) -> dict[int, str]:
    """``names`` by number: a list, or a dict from number to name."""
    names = config.get("names") or {}
    try:
        pairs = names.items() if isinstance(names, dict) else enumerate(list(names))
        return {number: str(name).strip() for number, name in sorted((int(key), name) for key, name in pairs)}
    except (TypeError, ValueError) as error:
        raise DataError(f"cannot read {path}: names should be a list, or a dict from number to name") from error


def _listed_names(base: Path, split: str) -> dict[int, str]:
    """The lines of ``classes.txt``, in the set's folder, that of the labels or that of the split."""
    labels = named_folder(base, [LABEL_FOLDER])
    own = [split_folder(folder, split) for folder in (base, labels) if folder]
    nested = [folder and named_folder(folder, [LABEL_FOLDER]) for folder in own]
    for folder in filter(None, [base, labels, *own, *nested]):
        for name in NAME_FILES:
            if (folder / name).is_file():
                lines = map(str.strip, read_text(folder / name).splitlines())
                return dict(enumerate(filter(None, lines)))
    return {}


def _unique(names: dict[int, str]) -> dict[int, str]:
    """`names` with the number added to those that come twice."""
    often = Counter(names.values())
    return {number: f"{name} ({number})" if often[name] > 1 else name for number, name in names.items()}


def _numbered(entries: Sequence[Entry | None]) -> list[str]:
    """Names for a set without names: ``class 0`` to the largest number in its labels."""
    titles = {box.name for entry in entries if entry for box in entry.boxes}
    numbers = [int(title.removeprefix("class ")) for title in titles]
    return [f"class {number}" for number in range(max(numbers, default=-1) + 1)]


def _entry(picture: Path, names: dict[int, str], findings: Findings) -> Entry | None:
    choices = label_paths(picture)
    path = next((choice for choice in choices if choice.is_file()), None)
    if path is None:
        findings.skip("picture without labels file", picture, f"there is no {choices[0]}")
        return None
    try:
        lines = read_text(path).splitlines()
    except DataError as error:
        findings.skip("unreadable labels file", path, str(error))
        return None
    boxes = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            boxes.append(parse_line(line, names, f"line {number}"))
        except ValueError as error:
            findings.skip("unreadable line", path, f"line {number}: {error}")
    return Entry(picture, path, boxes, in_fractions=True)


def parse_line(line: str, names: dict[int, str], title: str) -> LabelledBox:
    """Return the box of a line: class, centre and size, or class and the corners of a polygon; all in fractions."""
    words = line.split()
    if len(words) != 5 and (len(words) < 7 or len(words) % 2 == 0):
        raise ValueError(f"expected a class and four numbers, or a polygon; got {line.strip()!r}")
    number, *values = map(float, words)
    if not number.is_integer():
        raise ValueError(f"the class {words[0]} is no whole number")
    if any(math.isfinite(value) and abs(value) > LARGEST_FRACTION for value in values):
        raise ValueError(f"numbers are no fractions of the picture: {line.strip()!r}")
    if len(values) == 4:
        x, y, width, height = values
        edges = (x - width / 2, y - height / 2, x + width / 2, y + height / 2)
    else:
        edges = (min(values[::2]), min(values[1::2]), max(values[::2]), max(values[1::2]))
    name = names.get(int(number), f"class {int(number)}")
    return LabelledBox(name, edges, False, f"{title} ({name})")
