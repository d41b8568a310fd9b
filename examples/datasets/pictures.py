"""Picture files: decoding to 8-bit RGB as the picture is shown, and finding files by name."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from .errors import PictureError, first_line

# In the order of preference among files that differ in their ending alone.
PICTURE_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".jpe", ".jfif"),
    *(".dib", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".avif"),
)
# How files of the usual formats begin: one that cannot be opened in spite of it ends too early, or is damaged.
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"RIFF", b"II*\0", b"MM\0*")
ORIENTATION_TAG = 0x0112
Edges = tuple[float, float, float, float]


class Turn(NamedTuple):
    """What shows a picture upright, and where its point (x, y) of width × height pixels goes."""

    transpose: Image.Transpose
    move: Callable[[float, float, float, float], tuple[float, float]]


# EXIF 2.32, tag Orientation. 1 is upright.
TURNS = {
    2: Turn(Image.Transpose.FLIP_LEFT_RIGHT, lambda x, y, width, height: (width - x, y)),
    3: Turn(Image.Transpose.ROTATE_180, lambda x, y, width, height: (width - x, height - y)),
    4: Turn(Image.Transpose.FLIP_TOP_BOTTOM, lambda x, y, width, height: (x, height - y)),
    5: Turn(Image.Transpose.TRANSPOSE, lambda x, y, width, height: (y, x)),
    6: Turn(Image.Transpose.ROTATE_270, lambda x, y, width, height: (height - y, x)),
    7: Turn(Image.Transpose.TRANSVERSE, lambda x, y, width, height: (height - y, width - x)),
    8: Turn(Image.Transpose.ROTATE_90, lambda x, y, width, height: (y, width - x)),
}


class Frame(NamedTuple):
    """A picture's size as it is stored, ``(width, height)``, and its EXIF orientation (1 is upright)."""

    stored: tuple[int, int]
    orientation: int

    @property
    def shown(self) -> tuple[int, int]:
        """The size after the rotation."""
        return self.stored[::-1] if self.orientation >= 5 else self.stored

    def upright(self, edges: Edges) -> Edges:
        """Return the box of the shown picture for `edges` in the stored one."""
        if self.orientation == 1:
            return edges
        move = TURNS[self.orientation].move
        corners = [move(*edges[:2], *self.stored), move(*edges[2:], *self.stored)]
        (left, right), (top, bottom) = (sorted(values) for values in zip(*corners, strict=True))
        return left, top, right, bottom


def open_picture(path: Path | str) -> Tensor:
    """Return the picture as it is shown: a uint8 tensor ``(3, H, W)``, RGB.

    The EXIF rotation is applied. Transparent pixels show black, the value that detectors pad with and that most files
    have under full transparency. 16 bits become 8 by a fixed scale: 65535 is 255. Of an animation it is the first
    picture.

    Raises:
        PictureError: a :class:`DataError`: the file is empty, truncated or damaged, or its values have no fixed range.
    """
    return pil_to_tensor(load_picture(Path(path)))


def load_picture(path: Path) -> Image.Image:
    """Return the picture of :func:`open_picture` as a Pillow image of mode RGB."""
    with _open(path) as picture:
        return _decode(picture, path)


def read_frame(path: Path, decode: bool) -> Frame:
    """Return size and orientation of a picture; with `decode` all of its pixels are read, which shows damage."""
    with _open(path) as picture:
        orientation = _orientation(picture)
        size = picture.size
        # Pillow gives a TIFF's size as it is shown.
        stored = size[::-1] if picture.format == "TIFF" and orientation >= 5 else size
        if decode:
            _decode(picture, path)
        return Frame(stored, orientation)


def _open(path: Path) -> Image.Image:
    try:
        if path.stat().st_size == 0:
            raise PictureError("empty picture file", path, "0 bytes")
        return Image.open(path)
    except PictureError:
        raise
    except Exception as error:  # Pillow's readers raise what they like on damaged files.
        kind = "truncated picture" if _begins_like_a_picture(path) else "unreadable picture"
        raise PictureError(kind, path, first_line(error)) from error


def _begins_like_a_picture(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4).startswith(SIGNATURES)
    except OSError:
        return False


def _decode(picture: Image.Image, path: Path) -> Image.Image:
    try:
        picture.load()
    except Exception as error:
        raise PictureError("truncated picture", path, first_line(error)) from error
    try:
        # Pillow has turned a TIFF when it is loaded, and has removed the tag.
        turn = TURNS.get(_orientation(picture))
        colours = _rgb(picture)
        return colours.transpose(turn.transpose) if turn else colours
    except Exception as error:
        raise PictureError("unreadable picture", path, first_line(error)) from error


def _orientation(picture: Image.Image) -> int:
    """The EXIF orientation, 1 where there is none, or none that can be read: so other programs show the picture."""
    try:
        value = picture.getexif().get(ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if value in TURNS else 1


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        picture = _eight_bits(picture)
    if picture.mode == "F":
        raise ValueError("pixels are floating-point numbers, whose range is not known")
    if picture.has_transparency_data:
        colours = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colours.size, (0, 0, 0, 255)), colours).convert("RGB")
    return picture.convert("RGB")


def _eight_bits(picture: Image.Image) -> Image.Image:
    """16-bit grey, rounded to 8 bits. Pillow's own conversion clips at 255, which leaves white."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > 65535:
        raise ValueError("pixels of 32 bits, whose range is not known")
    return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8))


class PictureIndex:
    """The pictures below a folder, by name. Hidden files and folders are no part of it.

    A name is found with or without its ending, in any case and Unicode form, and with fewer or more leading folders
    than the file has below the index's own.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in PICTURE_ENDINGS)
        self.files = [path for path in paths if not is_hidden(path, folder) and path.is_file()]
        self._by_key: dict[tuple[str, str], list[Path]] = defaultdict(list)
        for path in self.files:
            for key in self._keys(path.name, path.stem):
                self._by_key[key].append(path)

    def find(self, name: str) -> list[Path]:
        """Return the files that `name` can mean: one, none, or several in different folders."""
        *folders, last = re.split(r"[\\/]", name.strip())
        folders = [folder for folder in folders if folder not in ("", ".")]
        for key in self._keys(last, without_ending(last)):
            found = [path for path in self._by_key.get(key, ()) if self._is_below(path, folders)]
            if found:
                return self._preferred(found, folders)
        return []

    def _is_below(self, path: Path, folders: list[str]) -> bool:
        """True if one list of folders ends with the other: train/1.jpg is not val/1.jpg."""
        own = [folded(part) for part in path.relative_to(self.folder).parts[:-1]]
        shared = min(len(own), len(folders))
        return not shared or own[-shared:] == [folded(folder) for folder in folders[-shared:]]

    def _preferred(self, found: list[Path], folders: list[str]) -> list[Path]:
        exact = [path for path in found if list(path.relative_to(self.folder).parts[:-1]) == folders]
        found = exact or found
        best = min(PICTURE_ENDINGS.index(path.suffix.lower()) for path in found)
        return [path for path in found if PICTURE_ENDINGS.index(path.suffix.lower()) == best]

    @staticmethod
    def _keys(name: str, stem: str) -> list[tuple[str, str]]:
        """From the strictest to the most lenient."""
        return [("name", name), ("folded name", folded(name)), ("stem", stem), ("folded stem", folded(stem))]


def folded(name: str) -> str:
    """Return `name` without differences of case and of Unicode form: macOS decomposes accents, lists often do not."""
    return unicodedata.normalize("NFC", name).casefold()


def without_ending(name: str) -> str:
    """Return `name` without a picture's or an XML file's ending; other dots are part of the name."""
    stem, dot, ending = name.rpartition(".")
    return stem if stem and (dot + ending).lower() in (*PICTURE_ENDINGS, ".xml") else name


def is_hidden(path: Path, root: Path) -> bool:
    """True of ``.DS_Store``, ``._picture.jpg``, ``.ipynb_checkpoints/`` and the like below `root`."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.relative_to(root).parts)
