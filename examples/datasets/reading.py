"""A detection set in any of the formats, found by what is in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .coco import find_images, find_json, read_coco
from .errors import DataError
from .layout import existing_folder, files_of, named_folder, nested_roots, split_folder
from .records import DetectionSet, Findings, Track
from .voc import has_annotations, read_voc
from .yolo import LABEL_FOLDER, find_yaml, read_yolo

FORMATS = ("voc", "coco", "yolo")


def read_set(
    root: Path | str,
    split: str,
    *,
    format: str = "auto",
    annotations: Path | str | None = None,
    images: Path | str | None = None,
    classes: Sequence[str] | None = None,
    findings: Findings,
    limit: int | None = None,
    check: bool = True,
    track: Track = iter,
) -> DetectionSet:
    """Read a split of a detection set: Pascal VOC, COCO JSON or YOLO text labels.

    Args:
        root: the set's folder, or its JSON or YAML file.
        format: ``"voc"``, ``"coco"``, ``"yolo"``, or ``"auto"``: the first of these that `root` looks like.
        annotations: VOC's folder of XML files, or COCO's JSON file of this split.
        images: the folder of pictures, of VOC and COCO.
        classes, findings, limit, check, track: as in :func:`read_voc`.

    Raises:
        DataError: `root` is no such set, or no picture is left of it.
    """
    root = Path(root)
    chosen = find_format(root, split, annotations) if format == "auto" else format
    common = {"classes": classes, "findings": findings, "limit": limit, "check": check, "track": track}
    if chosen == "voc":
        return read_voc(root, split, annotations=annotations, images=images, **common)
    if chosen == "coco":
        found = find_json(root if root.is_file() else existing_folder(root), split, annotations)
        if found is None:
            raise DataError(f"no JSON file of {split} or of all pictures in {root}, nor in its folder annotations")
        path, part = found
        return read_coco(find_images(root, path, split, images), path, split=part, **common)
    if chosen == "yolo":
        if annotations is not None or images is not None:
            raise DataError(f"{root} is read as YOLO, whose folders are named in data.yaml alone")
        return read_yolo(root, split, **common)
    raise ValueError(f"format should be auto, {', '.join(FORMATS[:-1])} or {FORMATS[-1]}, got {format!r}")


def find_format(root: Path, split: str, annotations: Path | str | None = None) -> str:
    """Return the format of the set at `root`; VOC before COCO before YOLO, where it has labels of several."""
    if root.is_file() or (annotations is not None and str(annotations).lower().endswith(".json")):
        ending = (root if root.is_file() else Path(annotations or "")).suffix.lower()
        formats = {".json": "coco", ".yaml": "yolo", ".yml": "yolo"}
        if ending not in formats:
            raise DataError(f"{root} is no folder, and no JSON or YAML file of a set")
        return formats[ending]
    existing_folder(root)
    beside = split_folder(root, split)
    if annotations is not None or any(nested_roots(root, has_annotations)) or _has(".xml", root, beside):
        return "voc"
    if _has(".json", root, beside, named_folder(root, ["annotations"]), named_folder(root, ["annots"])):
        return "coco"
    if find_yaml(root) or (root / LABEL_FOLDER).is_dir() or _has(".txt", beside, beside and beside / LABEL_FOLDER):
        return "yolo"
    raise DataError(
        f"no detection set in {root}: found no XML files (VOC), no JSON file (COCO) "
        "and neither data.yaml nor a folder labels (YOLO)"
    )


def _has(ending: str, *folders: Path | None) -> bool:
    return any(files_of(folder, ending) for folder in folders if folder and folder.is_dir())
