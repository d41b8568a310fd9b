"""Pictures with boxes as a data set in YOLO's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torchvision.ops import box_convert
from torchvision.utils import save_image

from examples.demo.data import Images


def write_yolo_set(folder: Path, train: Images, val: Images, classes: Sequence[str]) -> str:
    """Write pictures and label files; return the path of the set's YAML.

    Args:
        folder: of the set; it is made.
        train, val: pictures of any sizes, whose labels count from 1.
        classes: names, of label 1 and so on.
    """
    for split, images in (("train", train), ("val", val)):
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True)
        for index in range(len(images)):
            pixels, target = images[index]
            save_image(pixels, folder / "images" / split / f"{index:05}.png")
            (folder / "labels" / split / f"{index:05}.txt").write_text(_labels(target, *pixels.shape[1:]))
    description = folder / "data.yaml"
    description.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: {list(classes)}\n")
    return str(description)


def _labels(target: dict, height: int, width: int) -> str:
    """A line for each box: its class, counted from 0, and its centre and size as parts of the picture's."""
    boxes = box_convert(target["boxes"], "xyxy", "cxcywh") / target["boxes"].new_tensor([width, height, width, height])
    rows = zip(target["labels"].tolist(), boxes.tolist(), strict=True)
    return "\n".join(f"{label - 1} {' '.join(f'{value:.6f}' for value in box)}" for label, box in rows)
