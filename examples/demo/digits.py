"""The embedded set: scenes of scikit-learn's handwritten digits, on clutter. Nothing is downloaded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from torchvision.ops import box_iou

from .data import SPLIT_SEED, SPLITS, VAL_FRACTION, DetectionData, Images, Track

CLASSES = tuple("0123456789")


@cache
def handwritten() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's 1797 digits, ``(1797, 8, 8)`` with values 0..16, and what they are ``(1797,)``."""
    digits = load_digits()
    return digits.images, digits.target


@cache
def digit_sources(split: str) -> np.ndarray:
    """Indices into the handwritten digits that `split` draws from; no digit serves both splits."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(handwritten()[1]))
    held_out = int(len(order) * VAL_FRACTION)
    return order[:held_out] if split == "val" else order[held_out:]


def resize(plane: np.ndarray, side: int) -> np.ndarray:
    """`plane`, resampled smoothly to ``(side, side)``."""
    return np.asarray(Image.fromarray(plane.astype(np.float32)).resize((side, side), Image.Resampling.BICUBIC))


def digit_opacity(digit: np.ndarray, size: int) -> np.ndarray:
    """An 8×8 digit (0..16) as opacities 0..1 of `size` pixels a side, cropped to the pixels that show."""
    opacity = np.clip(resize(digit / 12.0, size), 0, 1)
    opacity = np.where(opacity < 0.3, 0, opacity)
    rows, columns = np.flatnonzero(opacity.any(axis=1)), np.flatnonzero(opacity.any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


@dataclass
class Scene:
    """One picture in the making: `canvas (S, S, 3)`, the boxes and labels on it, and its own source of chance."""

    canvas: np.ndarray
    boxes: np.ndarray
    labels: list[int]
    rng: np.random.Generator

    @classmethod
    def background(cls, side: int, rng: np.random.Generator) -> Scene:
        """Soft colour under rough grey, and nothing to find."""
        soft = np.stack([resize(rng.uniform(0.25, 0.75, (4, 4)), side) for _ in range(3)], axis=-1)
        rough = resize(rng.normal(0, 0.06, (16, 16)), side)
        return cls(soft + rough[..., None], np.zeros((0, 4)), [], rng)

    def add_fragment(self, digit: np.ndarray) -> None:
        """Paste a quarter of `digit`: clutter with the strokes of a digit, without its shape."""
        row, column = self.rng.integers(0, 2, size=2) * 4
        piece = np.zeros((8, 8))
        piece[2:6, 2:6] = digit[row : row + 4, column : column + 4]
        if piece.max() >= 8:
            opacity = digit_opacity(piece, self._size())
            self._paste(opacity * 0.6, self._place(opacity))

    def add_digit(self, digit: np.ndarray, label: int) -> None:
        """Paste `digit` and note its box, unless it would cover another digit's."""
        opacity = digit_opacity(digit, self._size())
        box = self._place(opacity)
        if not box_iou(torch.from_numpy(self.boxes), torch.from_numpy(box[None])).gt(0.02).any():
            self._paste(opacity, box)
            self.boxes = np.concatenate([self.boxes, box[None]])
            self.labels.append(label)

    def pixels(self) -> Tensor:
        """The picture with a camera's noise, as bytes ``(3, S, S)``."""
        noisy = self.canvas + self.rng.normal(0, 0.03, self.canvas.shape)
        return torch.from_numpy((np.clip(noisy, 0, 1) * 255).astype(np.uint8)).permute(2, 0, 1).contiguous()

    def _size(self) -> int:
        """A side of 1/5 to 1/2 of the picture, small ones as likely as large ones on a log scale."""
        return int(len(self.canvas) * np.exp(self.rng.uniform(np.log(1 / 5), np.log(1 / 2))))

    def _place(self, opacity: np.ndarray) -> np.ndarray:
        """A box of `opacity`'s size anywhere inside the picture."""
        height, width = opacity.shape
        left = self.rng.integers(len(self.canvas) - width + 1)
        top = self.rng.integers(len(self.canvas) - height + 1)
        return np.array([left, top, left + width, top + height], dtype=float)

    def _paste(self, opacity: np.ndarray, box: np.ndarray) -> None:
        """Blend in an ink that is lighter or darker than what lies under it, by a contrast of 0.3 to 0.8."""
        left, top, right, bottom = box.astype(int)
        region = self.canvas[top:bottom, left:right]
        under = region.mean(axis=(0, 1))
        sign = 1 if under.mean() < 0.5 else -1
        ink = under + sign * self.rng.uniform(0.3, 0.8) + self.rng.normal(0, 0.05, 3)
        region += opacity[..., None] * (ink - region)


def draw_scene(split: str, index: int, side: int) -> Scene:
    """Scene number `index` of `split`: one to five digits, a function of these arguments alone."""
    (digits, values), sources = handwritten(), digit_sources(split)
    rng = np.random.default_rng([SPLIT_SEED, SPLITS.index(split), index])
    scene = Scene.background(side, rng)
    for source in rng.choice(sources, rng.integers(2, 6)):
        scene.add_fragment(digits[source])
    for source in rng.choice(sources, rng.integers(1, 6)):
        scene.add_digit(digits[source], int(values[source]) + 1)
    return scene


def load_digit_scenes(side: int, train_images: int, val_images: int, track: Track = iter) -> DetectionData:
    """Draw both splits; `track` wraps the loop over scenes, for a progress bar."""
    sets = {split: Images() for split in SPLITS}
    order = [
        (split, index)
        for split, length in zip(SPLITS, (train_images, val_images), strict=True)
        for index in range(length)
    ]
    for split, index in track(order):
        scene = draw_scene(split, index, side)
        sets[split].add(scene.pixels(), scene.boxes, scene.labels)
    summary = (
        f"scenes of handwritten digits: {train_images} for training from {len(digit_sources('train'))} digits, "
        f"{val_images} for validation from {len(digit_sources('val'))} others"
    )
    return DetectionData(sets["train"], sets["val"], CLASSES, summary)
