"""Pascal VOC: an XML file for each picture and, where present, lists of a split in ``ImageSets/Main``."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from .assembly import Entry, LabelledBox, build_set
from .errors import DataError, first_line, read_text
from .layout import (
    PICTURE_FOLDERS,
    chosen_path,
    existing_folder,
    files_of,
    fixed_split,
    named_folder,
    nested_roots,
    split_folder,
    split_names,
    the_only,
)
from .pictures import PictureIndex, folded, without_ending
from .records import DetectionSet, Findings, Track

ANNOTATION_FOLDERS = ("Annotations", "annots", "annotation", "xmls", "xml", "labels")
EDGES = ("xmin", "ymin", "xmax", "ymax")
# Lists of one class have " 1", "-1" (not in the picture) or " 0" (difficult) behind each name.
CLASS_FLAG = re.compile(r"\s+(-1|0|1)$")


def read_voc(
    root: Path | str,
    split: str,
    *,
    annotations: Path | str | None = None,
    images: Path | str | None = None,
    classes: Sequence[str] | None = None,
    findings: Findings,
    limit: int | None = None,
    check: bool = True,
    track: Track = iter,
) -> DetectionSet:
    """Read a split of a VOC folder: ``Annotations/*.xml``, ``JPEGImages/*``, ``ImageSets/Main/<split>.txt``.

    Other usual names of these folders are found too, also below `root` (``VOCdevkit/VOC2007``), and XML files beside
    their pictures in a folder of the split's name. Without lists a fixed shuffle makes train and val.

    VOC counts pixels from 1 and includes the last one, so only the near edges are shifted by 1. Difficult objects are
    ``crowd``.

    Args:
        annotations, images: folders with other names, relative to `root` or not.
        classes: the names that labels count. By default all names in the XML files, sorted: the same for each split.
        findings: what is wrong with the files is added.
        limit: read at most so many pictures, the first ones.
        check: read all pixels of each picture now, so that damage shows before a training; otherwise its header.
        track: wraps the loop over pictures, for a progress bar.

    Raises:
        DataError: a folder or a list is missing, or no picture is left.
    """
    folder = find_voc(Path(root), split, annotations, images)
    entries = folder.entries(split, limit, findings)
    if classes is None:
        classes = folder.class_names()
    return build_set(
        entries, classes, findings, format="voc", origin=folder.root, split=split, check=check, track=track
    )


@dataclass
class Annotation:
    """What an XML file says, and what could not be read in it: ``(kind, detail)``."""

    filename: str = ""
    size: tuple[int, int] | None = None
    boxes: list[LabelledBox] = field(default_factory=list)
    problems: list[tuple[str, str]] = field(default_factory=list)


def read_annotation(path: Path) -> Annotation:
    """Read a VOC file; raise :class:`DataError` where it is no XML."""
    try:
        tree = ElementTree.parse(path).getroot()
    except (OSError, ValueError, LookupError, ElementTree.ParseError) as error:
        raise DataError(first_line(error)) from error
    filename = re.split(r"[\\/]", (tree.findtext("filename") or "").strip())[-1]
    found = Annotation(filename, _size(tree))
    for number, item in enumerate(tree.findall("object"), start=1):
        name = (item.findtext("name") or "").strip()
        if not name:
            found.problems.append(("object without a name", f"object {number} has no name"))
            continue
        title = f"object {number} ({name})"
        try:
            left, top, right, bottom = (float(item.findtext(f"bndbox/{edge}", "")) for edge in EDGES)
        except ValueError:
            found.problems.append(("object without a box", f"{title} has no bndbox of four numbers"))
            continue
        difficult = (item.findtext("difficult") or "").strip() == "1"
        found.boxes.append(LabelledBox(name, (left, top, right, bottom), difficult, title))
    return found


def _size(tree: ElementTree.Element) -> tuple[int, int] | None:
    """The recorded width and height; None where they are missing, no numbers or 0."""
    try:
        width, height = (int(float(tree.findtext(f"size/{side}", ""))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def find_voc(root: Path, split: str, annotations: Path | str | None, images: Path | str | None) -> VocFolder:
    """Return the folders of a VOC set at or below `root`; those of the arguments where they are given."""
    existing_folder(root)
    if annotations is not None:
        xml_folder = existing_folder(chosen_path(root, annotations))
        return VocFolder(root, xml_folder, _picture_folder(root, xml_folder, images))
    found = the_only(list(nested_roots(root, has_annotations)), root, "VOC folders")
    if found:
        xml_folder = _annotation_folder(found)
        return VocFolder(found, xml_folder, _picture_folder(found, xml_folder, images))
    beside = split_folder(root, split)
    if beside and files_of(beside, ".xml"):
        return VocFolder(beside, beside, _picture_folder(beside, beside, images), holds_one_split=True)
    if files_of(root, ".xml"):
        return VocFolder(root, root, _picture_folder(root, root, images))
    raise DataError(f"no folder of XML files in {root}: looked for {', '.join(ANNOTATION_FOLDERS)}")


def _annotation_folder(root: Path) -> Path | None:
    """The first of the usual folders that holds XML files."""
    found = (named_folder(root, [name]) for name in ANNOTATION_FOLDERS)
    return next((folder for folder in found if folder and files_of(folder, ".xml")), None)


def has_annotations(root: Path) -> bool:
    return _annotation_folder(root) is not None


def _picture_folder(root: Path, xml_folder: Path, images: Path | str | None) -> Path:
    """The folder named by the caller, the first of the usual ones, or else the whole set."""
    if images is not None:
        return existing_folder(chosen_path(root, images))
    return named_folder(root, PICTURE_FOLDERS) or (root if xml_folder != root else xml_folder)


@dataclass
class VocFolder:
    """A VOC set's folders, and what is in them by name."""

    root: Path
    annotations: Path
    images: Path
    holds_one_split: bool = False

    @cached_property
    def pictures(self) -> PictureIndex:
        return PictureIndex(self.images)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The XML files by stem, sorted."""
        return dict(sorted((path.stem, path) for path in files_of(self.annotations, ".xml")))

    @cached_property
    def parsed(self) -> dict[str, Annotation | DataError]:
        """All XML files by stem, or why they cannot be read."""
        return {stem: _annotation_or_error(path) for stem, path in self.files.items()}

    @cached_property
    def stems(self) -> dict[str, str]:
        """Stems of XML files by each name that a list may use: the file's own before that of its picture."""
        known: dict[str, str] = {}
        for stem in self.files:
            known.setdefault(folded(stem), stem)
        for stem, content in self.parsed.items():
            if isinstance(content, Annotation) and content.filename:
                known.setdefault(folded(without_ending(content.filename)), stem)
        return known

    def class_names(self) -> tuple[str, ...]:
        """Return all names of objects in the set, sorted."""
        read = (content for content in self.parsed.values() if isinstance(content, Annotation))
        return tuple(sorted({box.name for content in read for box in content.boxes}))

    def entries(self, split: str, limit: int | None, findings: Findings) -> list[Entry]:
        """Return the pictures of a split with their boxes; add what is missing to `findings`."""
        lists = None if self.holds_one_split else self._list_folder()
        if lists:
            names = self._listed_names(lists, split, findings)
        else:
            names = list(self.files)
            if not self.holds_one_split:
                names = fixed_split(names, split, self.annotations)
            if not names:
                raise DataError(f"no {split} images are listed in {self.annotations}")
        found = [self._entry(name, findings) for name in names[:limit]]
        if not lists:
            self._report_pictures_without_labels(findings)
        return [entry for entry in found if entry]

    def _list_folder(self) -> Path | None:
        """The folder with lists of splits."""
        main = self.root / "ImageSets" / "Main"
        if main.is_dir():
            return main
        named = [f"{name}.txt" for split in ("train", "val") for name in split_names(split)]
        return next((f for f in (main.parent, self.root) if any((f / name).is_file() for name in named)), None)

    def _listed_names(self, folder: Path, split: str, findings: Findings) -> list[str]:
        paths = [folder / f"{name}.txt" for name in split_names(split)]
        path = next((path for path in paths if path.is_file()), paths[0])
        lines = [line.strip() for line in read_text(path).splitlines() if line.strip()]
        if not lines:
            raise DataError(f"no {split} images are listed in {path}")
        is_class_list = all(CLASS_FLAG.search(line) for line in lines)
        names: dict[str, None] = {}
        for line in lines:
            # A name may end like a flag ("img 1"), so a file of the whole name comes first.
            name = CLASS_FLAG.sub("", line) if is_class_list and not self._is_known(line) else line
            if name in names:
                findings.skip("listed twice", path, name)
            names[name] = None
        return list(names)

    def _is_known(self, name: str) -> bool:
        return self._stem(name) is not None or bool(self.pictures.find(name))

    def _stem(self, name: str) -> str | None:
        """The stem of the XML file that a listed name means; itself in the plain case."""
        last = re.split(r"[\\/]", name)[-1]
        for candidate in (name, last, without_ending(last)):
            if candidate in self.files:
                return candidate
        return self.stems.get(folded(last)) or self.stems.get(folded(without_ending(last)))

    def _entry(self, name: str, findings: Findings) -> Entry | None:
        stem = self._stem(name)
        if stem is None:
            self._report_missing_labels(name, findings)
            return None
        path, content = self.files[stem], self.parsed[stem]
        if isinstance(content, DataError):
            findings.skip("broken XML", path, str(content))
            return None
        found, other = self._find_picture(stem, content)
        if len(found) != 1:
            kind = "several pictures of that name" if found else "labels without a picture"
            wanted = f"{self.images / stem}.jpg"
            detail = ", ".join(map(str, found)) or f"there is no {wanted}, nor one with another ending"
            findings.skip(kind, path, detail)
            return None
        if other:
            findings.note("filename of another picture", path, f"{content.filename}, taken as {found[0].name}")
        for problem in content.problems:
            findings.skip(problem[0], path, problem[1])
        return Entry(found[0], path, content.boxes, content.size, first_pixel=1)

    def _find_picture(self, stem: str, content: Annotation) -> tuple[list[Path], bool]:
        """The pictures that an XML file can mean, and whether its <filename> is another one's.

        The XML's own name comes first: <filename> is often left from before files were renamed. It decides between
        pictures that differ in their ending.
        """
        named = self.pictures.find(content.filename) if content.filename else []
        found = self.pictures.find(stem)
        if not found:
            return named, False
        if len(named) == 1 and folded(named[0].stem) == folded(stem):
            return named, False
        return found, bool(named)

    def _report_missing_labels(self, name: str, findings: Findings) -> None:
        expected = self.annotations / f"{without_ending(name)}.xml"
        pictures = self.pictures.find(name)
        if pictures:
            findings.skip("picture without labels file", pictures[0], f"there is no {expected}")
        else:
            findings.skip("listed name without files", expected, f"nor a picture in {self.images}")

    def _report_pictures_without_labels(self, findings: Findings) -> None:
        contents = {stem: content for stem, content in self.parsed.items() if isinstance(content, Annotation)}
        used = {path for stem, content in contents.items() for path in self._find_picture(stem, content)[0]}
        for path in self.pictures.files:
            if path not in used and path.stem not in self.files:
                findings.skip("picture without labels file", path, f"there is no {path.stem}.xml in {self.annotations}")


def _annotation_or_error(path: Path) -> Annotation | DataError:
    try:
        return read_annotation(path)
    except DataError as error:
        return error
