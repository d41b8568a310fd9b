"""Tiny sets of pictures with the labels of each of Ultralytics' tasks, and settings of its own for a test file."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

PIXELS = 64


@contextlib.contextmanager
def own_settings(folder: Path) -> Iterator[None]:
    """Ultralytics' settings in a folder, no downloads, and what its import patches put back behind it."""
    from process_state import kept

    with kept():
        os.environ.update(YOLO_CONFIG_DIR=str(folder), YOLO_OFFLINE="true")
        yield


def corners(x, y, width, height) -> np.ndarray:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]]) / PIXELS


def line(task: str, label: int, x: int, y: int, width: int, height: int) -> str:
    """A rectangle in pixels as a line of a label file."""
    box = np.array([x + width / 2, y + height / 2, width, height]) / PIXELS
    points = corners(x, y, width, height)
    values = {
        "detect": box,
        "segment": points.flatten(),
        "obb": points.flatten(),
        "pose": np.concatenate([box, np.concatenate([points[:2], np.full((2, 1), 2.0)], axis=1).flatten()]),
    }[task]
    return " ".join(map(str, (label, *values)))


def write_set(folder: Path, task: str = "detect", images: int = 6, seed: int = 0) -> str:
    """Pictures of a red and a green rectangle in YOLO's format; the path of their YAML."""
    from PIL import Image

    generator = np.random.default_rng(seed)
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for index in range(images):
        picture, lines = np.full((PIXELS, PIXELS, 3), 40, np.uint8), []
        for label in range(2):
            width, height = generator.integers(16, 30, 2)
            x, y = generator.integers(0, 34, 2)
            picture[y : y + height, x : x + width, label] = 255
            lines.append(line(task, label, x, y, width, height))
        Image.fromarray(picture).save(folder / "images" / f"{index}.png")
        (folder / "labels" / f"{index}.txt").write_text("\n".join(lines))
    text = f"path: {folder}\ntrain: images\nval: images\nnames: [red, green]\n"
    if task == "pose":
        text += "kpt_shape: [2, 3]\nflip_idx: [1, 0]\n"
    (folder / "data.yaml").write_text(text)
    return str(folder / "data.yaml")
