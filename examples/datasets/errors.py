"""The errors of the readers."""

from __future__ import annotations

from pathlib import Path


class DataError(Exception):
    """A set or a file that cannot be used; the message is one line that names the file or folder at fault."""


class PictureError(DataError):
    """A picture that cannot be read: `kind` and `detail` are those of its finding."""

    def __init__(self, kind: str, path: Path, detail: str) -> None:
        super().__init__(f"{path}: {kind}: {detail}")
        self.kind, self.path, self.detail = kind, path, detail

    def __reduce__(self) -> tuple[type[PictureError], tuple[str, Path, str]]:
        """Let worker processes hand the error on."""
        return type(self), (self.kind, self.path, self.detail)


def first_line(reason: object) -> str:
    """Return the first line of an error's text, or its type where it has none."""
    text = getattr(reason, "strerror", None) or str(reason) or type(reason).__name__
    return str(text).splitlines()[0]


def read_text(path: Path) -> str:
    """Return the text of a UTF-8 file, without a byte-order mark; raise :class:`DataError` if that fails."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from error
