"""Where things are in a folder: folders by their usual names, lists of a split, and a split for sets without lists."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from .errors import DataError
from .pictures import folded, is_hidden

SPLITS = ("train", "val")
SPLIT_SEED = 2021  # The split is part of the data: no program's seed moves it.
VAL_FRACTION = 0.2
# What a split is called: the name asked for first.
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
PICTURE_FOLDERS = ("JPEGImages", "images", "imgs", "image", "img", "pictures", "photos")

Item = TypeVar("Item")


def split_names(split: str) -> tuple[str, ...]:
    """Return what `split` may be called in names of files and folders."""
    return SPLIT_NAMES.get(split, (split,))


def names_split(name: str, split: str) -> bool:
    """True if a word of `name` is the split's: ``instances_val2017``, but not ``trainval`` for train."""
    return bool(set(re.split(r"[^a-z]+", name.lower())) & set(split_names(split)))


def names_any_split(name: str) -> bool:
    """True if a word of `name` is that of any split."""
    return any(names_split(name, split) for split in SPLIT_NAMES)


def fixed_split(items: Sequence[Item], split: str, origin: Path) -> list[Item]:
    """Return the training or validation part of `items` under a fixed shuffle: a set without lists."""
    if split not in SPLITS:
        raise DataError(f"no list of the split {split!r} in {origin}: without lists there are train and val")
    shuffled = list(items)
    random.Random(SPLIT_SEED).shuffle(shuffled)
    held_out = math.ceil(len(shuffled) * VAL_FRACTION)
    return shuffled[:held_out] if split == "val" else shuffled[held_out:]


def existing_folder(path: Path) -> Path:
    """Return `path`, or raise :class:`DataError` where it is no folder."""
    if not path.is_dir():
        raise DataError(f"no such folder: {path}")
    return path


def subfolders(root: Path) -> list[Path]:
    """Return the folders in `root` that are not hidden, sorted."""
    return sorted(path for path in root.iterdir() if path.is_dir() and not is_hidden(path, root))


def named_folder(root: Path, names: Sequence[str]) -> Path | None:
    """Return the folder in `root` with the first of `names` that there is, in any case of letters."""
    found = {folded(path.name): path for path in subfolders(root)}
    return next((found[folded(name)] for name in names if folded(name) in found), None)


def split_folder(root: Path, split: str) -> Path | None:
    """Return the folder of a split: ``train``, ``valid``, ``val2017``."""
    exact = named_folder(root, split_names(split))
    return exact or next((path for path in subfolders(root) if names_split(path.name, split)), None)


def files_of(folder: Path, *endings: str) -> list[Path]:
    """Return the files in `folder`, not below, with one of the `endings` in any case, sorted; none that is hidden."""
    found = (path for path in folder.iterdir() if path.suffix.lower() in endings and not is_hidden(path, folder))
    return sorted(path for path in found if path.is_file())


def nested_roots(root: Path, is_root: Callable[[Path], bool], depth: int = 3) -> Iterator[Path]:
    """Yield the folders at or below `root` that `is_root` accepts, and none below such a one."""
    if is_root(root):
        yield root
    elif depth:
        for folder in subfolders(root):
            yield from nested_roots(folder, is_root, depth - 1)


def the_only(found: Sequence[Path], root: Path, what: str) -> Path | None:
    """Return the only one of `found`, None if there is none; raise :class:`DataError` where one has to be chosen."""
    if len(found) > 1:
        raise DataError(f"several {what} in {root}, choose one: {', '.join(map(str, found))}")
    return found[0] if found else None


def chosen_path(root: Path, choice: Path | str) -> Path:
    """Return a folder or file that was named by an option: below `root`, or from where the program runs."""
    below = root / choice
    if not below.exists() and not Path(choice).exists():
        raise DataError(f"no such file or folder: {below}")
    return below if below.exists() else Path(choice)
