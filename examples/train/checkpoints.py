"""Checkpoints that a killed process or a full disk cannot spoil."""

from __future__ import annotations

import contextlib
import errno
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


class DiskError(Exception):
    """A file that could not be written; what was there before is untouched."""


def write_atomically(path: Path, state: Any) -> None:
    """Write ``torch.save``'s file so that ``path`` is the old or the new one at every moment.

    Raises:
        DiskError: the disk is full, or the file cannot be written for another reason.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's writer turns a failed write into a RuntimeError
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise DiskError(f"cannot write {path}: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    chain = [error]
    while chain[-1].__cause__ or chain[-1].__context__:
        chain.append(chain[-1].__cause__ or chain[-1].__context__)  # type: ignore[arg-type]
    for each in chain:
        if isinstance(each, OSError):
            return "the disk is full" if each.errno in (errno.ENOSPC, errno.EDQUOT) else str(each.strerror or each)
    return str(error).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    """Make the new name survive a power cut; file systems without such a sync refuse it."""
    with contextlib.suppress(OSError):
        number = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(number)
        finally:
            os.close(number)


class Checkpoints:
    """The newest checkpoints of a run, one an epoch."""

    def __init__(self, folder: Path, keep: int):
        self.folder, self.keep = folder, keep

    def files(self) -> list[Path]:
        """Return the checkpoints, the newest first."""
        return sorted(self.folder.glob("epoch-*.pth"), reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write the state of an epoch's end, then delete the oldest files beyond ``keep``.

        Raises:
            DiskError: it could not be written; every earlier checkpoint is still there.
        """
        path = self.folder / f"epoch-{state['epoch']:05}.pth"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DiskError(f"cannot make {self.folder}: {_reason(error)}") from error
        write_atomically(path, state)
        for old in self.files()[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self) -> tuple[Path | None, dict[str, Any], list[str]]:
        """Return the newest checkpoint that can be read, its state, and a line for each that cannot."""
        broken = []
        for path in self.files():
            try:
                return path, torch.load(path, map_location="cpu", weights_only=True), broken
            except Exception as error:  # torch.load raises whatever the archive, zlib or pickle do
                broken.append(f"cannot read {path}: {str(error).splitlines()[0]}")
        return None, {}, broken


def random_states(device: torch.device) -> dict[str, Any]:
    """Return the state of every global generator of this process, as tensors and numbers."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    states = {
        "python": random.getstate(),
        "numpy": (name, keys.tolist(), position, has_gauss, gauss),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(states["numpy"]))
    torch.set_rng_state(states["torch"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
