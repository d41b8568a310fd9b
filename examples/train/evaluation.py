"""The validation set's COCO AP, from all processes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from examples.demo.data import Track
from examples.demo.evaluation import CocoScore, detect

from .processes import Processes


@dataclass(frozen=True)
class Evaluation:
    """The score, and a line for each picture that could not be read and is not in it."""

    score: CocoScore
    unreadable: list[str]

    def row(self, classes: tuple[str, ...]) -> dict[str, float]:
        """Return AP in numbers, by size and by class."""
        score = self.score
        row = {"AP": score.ap, "AP50": score.ap50, "AP75": score.ap75}
        row |= {f"AP {size}": value for size, value in score.sizes.items()}
        return row | {f"AP of {name}": value for name, value in zip(classes, score.class_ap, strict=True)}


def evaluate(
    detector: nn.Module, loader: Any, num_classes: int, processes: Processes, track: Track = iter
) -> Evaluation | None:
    """Return the score on the main process, None on the others.

    Args:
        loader: lists of ``(index, sample)`` of this process's share, as `data.validation_loader` makes them.
        track: wraps the loop over batches, for a progress bar.
    """
    found: list[tuple[int, Any, Any]] = []
    unreadable: list[tuple[int, str]] = []
    for batch in track(loader):
        samples = [(index, sample) for index, sample in batch if not isinstance(sample, str)]
        unreadable += [(index, sample) for index, sample in batch if isinstance(sample, str)]
        if not samples:
            continue
        predictions = detect(detector, [image for _, (image, _) in samples], processes.device)
        found += [
            (index, target, prediction) for (index, (_, target)), prediction in zip(samples, predictions, strict=True)
        ]
    shares = processes.gather((found, unreadable))
    if not shares:
        return None
    found = sorted((entry for share, _ in shares for entry in share), key=lambda entry: entry[0])
    lines = [line for _, line in sorted(entry for _, share in shares for entry in share)]
    targets, predictions = ([entry[part] for entry in found] for part in (1, 2))
    return Evaluation(CocoScore(targets, predictions, num_classes, by_size=True), lines)
