"""COCO: one JSON file with the boxes of all pictures of a split."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from pycocotools.coco import COCO

from .assembly import Entry, LabelledBox, build_set
from .errors import DataError, read_text
from .layout import (
    PICTURE_FOLDERS,
    chosen_path,
    existing_folder,
    files_of,
    fixed_split,
    named_folder,
    names_any_split,
    names_split,
    split_folder,
    subfolders,
    the_only,
)
from .pictures import PictureIndex
from .records import DetectionSet, Findings, Track

Record = dict[str, Any]


def read_coco(
    images: Path | str,
    annotations_json: Path | str,
    *,
    classes: Sequence[str] | None = None,
    findings: Findings,
    split: str | None = None,
    limit: int | None = None,
    check: bool = True,
    track: Track = iter,
) -> DetectionSet:
    """Read a COCO JSON file, through pycocotools, and the pictures that it names below the folder `images`.

    Categories are labelled 1..C in the order of their ids, also those without a box. Crowds are ``crowd``.

    Args:
        classes: the names that labels count; those of the categories by default.
        findings: what is wrong with the files is added.
        split: ``"train"`` or ``"val"`` for a part under a fixed shuffle, where one file has all pictures.
        limit, check, track: as in :func:`read_voc`.

    Raises:
        DataError: the folder is missing, the file is no COCO JSON, or no picture is left.
    """
    folder, path = existing_folder(Path(images)), Path(annotations_json)
    coco = load_coco(path, findings)
    names = category_names(coco)
    records = list(coco.imgs.values())
    chosen = fixed_split(records, split, path) if split else records
    index = PictureIndex(folder)
    found = [_entry(record, coco, names, index, path, findings) for record in chosen[:limit]]
    entries = [entry for entry in found if entry]
    _report_unlisted(index, records, path, findings)
    return build_set(
        entries,
        list(names.values()) if classes is None else classes,
        findings,
        format="coco",
        origin=path,
        split=split or "all images",
        check=check,
        track=track,
    )


def load_coco(path: Path, findings: Findings) -> COCO:
    """Return pycocotools' object of a JSON file, without the records that it cannot index."""
    content = load_json(path)
    images = _usable(content["images"], ("id", "file_name"), "image", path, findings)
    known = {record["id"] for record in images}
    annotations = []
    for record in _usable(content["annotations"], ("image_id", "category_id"), "annotation", path, findings):
        if record["image_id"] in known:
            annotations.append(record)
        else:
            findings.skip("annotation of no image", path, f"annotation {record.get('id')}, image {record['image_id']}")
    coco = COCO()
    coco.dataset = {
        "images": images,
        # pycocotools asks for ids, which nothing here uses.
        "annotations": [{"id": number, **record} for number, record in enumerate(annotations, start=1)],
        "categories": _usable(content["categories"], ("id",), "category", path, findings),
    }
    with redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def load_json(path: Path) -> Record:
    """Return a COCO JSON file's content; raise :class:`DataError` where it is none."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise DataError(f"cannot read {path}: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"cannot read {path}: it has no list {key!r}, which COCO's files of boxes have")
    return content


def _usable(records: list[Any], keys: tuple[str, ...], what: str, path: Path, findings: Findings) -> list[Record]:
    """The records that are objects with values at `keys`."""
    usable = []
    for number, record in enumerate(records):
        missing = [key for key in keys if not isinstance(record, dict) or not isinstance(record.get(key), (int, str))]
        if missing:
            findings.skip(f"unreadable {what}", path, f"{what} number {number} has no {' and no '.join(missing)}")
        else:
            usable.append(record)
    return usable


def category_names(coco: COCO) -> dict[Any, str]:
    """Return names by category id, in the order of ids; a name that comes twice has its id added."""
    names = {key: str(coco.cats[key].get("name", key)).strip() for key in sorted(coco.cats, key=_by_number)}
    often = Counter(names.values())
    return {key: f"{name} ({key})" if often[name] > 1 else name for key, name in names.items()}


def _by_number(key: int | str) -> tuple[bool, int, str]:
    return (isinstance(key, str), key if isinstance(key, int) else 0, str(key))


def _entry(
    record: Record, coco: COCO, names: dict[Any, str], index: PictureIndex, path: Path, findings: Findings
) -> Entry | None:
    title = f"image {record['id']} ({record['file_name']})"
    found = index.find(str(record["file_name"]))
    if len(found) != 1:
        kind = "several pictures of that name" if found else "labels without a picture"
        findings.skip(kind, path, f"{title}: {', '.join(map(str, found)) or f'not below {index.folder}'}")
        return None
    boxes = []
    for annotation in coco.imgToAnns[record["id"]]:
        category = annotation["category_id"]
        name = names.get(category, f"category {category}")
        title_of_box = f"annotation {annotation['id']} ({name}) of {title}"
        try:
            left, top, width, height = map(float, annotation["bbox"])
        except (KeyError, TypeError, ValueError):
            findings.skip("object without a box", path, f"{title_of_box}: no bbox of four numbers")
            continue
        edges = (left, top, left + width, top + height)
        boxes.append(LabelledBox(name, edges, bool(annotation.get("iscrowd", 0)), title_of_box))
    return Entry(found[0], path, boxes, _size(record))


def _size(record: Record) -> tuple[int, int] | None:
    """The recorded width and height; None where they are missing, no numbers or 0."""
    try:
        width, height = int(record["width"]), int(record["height"])
    except (KeyError, TypeError, ValueError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _report_unlisted(index: PictureIndex, records: list[Record], path: Path, findings: Findings) -> None:
    """Report pictures that neither this file lists nor one beside it, which may be of another split."""

    def unlisted(pictures: set[Path], images: list[Any]) -> set[Path]:
        named = (record.get("file_name") for record in images if isinstance(record, dict))
        return pictures - {found for name in named for found in index.find(str(name))}

    left = unlisted(set(index.files), records)
    for other in files_of(path.parent, ".json") if left else []:
        try:
            left = unlisted(left, load_json(other)["images"]) if other != path else left
        except DataError:
            continue
    for picture in sorted(left):
        findings.skip("picture without labels file", picture, f"not listed in {path}")


def find_json(root: Path, split: str, annotations: Path | str | None) -> tuple[Path, str | None] | None:
    """Return the JSON file of a split, and `split` where one file has all pictures; None where there is none."""
    if annotations is not None:
        return chosen_path(root, annotations), None
    if root.is_file():
        return root, split
    folders = [root, *(folder for name in ("annotations", "annots") if (folder := named_folder(root, [name])))]
    beside = split_folder(root, split)
    if beside and (inside := files_of(beside, ".json")):
        found = the_only(_boxes_first(inside), beside, "JSON files")
        return (found, None) if found else None
    files = [path for folder in folders for path in files_of(folder, ".json")]
    named = _boxes_first([path for path in files if names_split(path.stem, split)])
    if named:
        found = the_only(named, root, f"JSON files of {split}")
        return (found, None) if found else None
    # A file that is named after another split is no set to split: its pictures would be in two splits.
    found = the_only(_boxes_first([path for path in files if not names_any_split(path.stem)]), root, "JSON files")
    return (found, split) if found else None


def _boxes_first(paths: list[Path]) -> list[Path]:
    """Without COCO's captions and keypoints, where there are files of instances."""
    return [path for path in paths if names_split(path.stem, "instances")] or paths


def find_images(root: Path, path: Path, split: str, images: Path | str | None) -> Path:
    """Return the folder of a JSON file's pictures: the split's own, the usual ones, or else the whole set."""
    if images is not None:
        return existing_folder(chosen_path(root, images))
    folder = root if root.is_dir() else root.parent
    common = named_folder(folder, PICTURE_FOLDERS)
    beside = path.parent if path.parent in subfolders(folder) and names_split(path.parent.name, split) else None
    return beside or (common and split_folder(common, split)) or split_folder(folder, split) or common or folder
