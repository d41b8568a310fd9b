"""What the run leaves behind: tables on the terminal, a CSV file and TensorBoard scalars."""

from __future__ import annotations

import csv
import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter

from .evaluation import CocoScore, standard_error
from .training import History

LOSS_COLUMNS = 6


@dataclass
class Run:
    """One trained model: a key for files, a name for people, its size, how many pictures it saw, losses and score."""

    key: str
    name: str
    parameters: int
    pictures: int
    history: History
    score: CocoScore


def score_table(runs: list[Run], caption: str) -> Table:
    """COCO AP of every run, with what it cost."""
    table = Table(title="COCO average precision, validation images", caption=caption)
    table.add_column("model")
    for heading in ("parameters", "pictures", "steps", "training", "AP", "AP50", "AP75"):
        table.add_column(heading, justify="right")
    for run in runs:
        table.add_row(
            run.name,
            f"{run.parameters:,}",
            f"{run.pictures}",
            f"{len(run.history.losses)}",
            f"{run.history.seconds:.0f} s",
            *(f"{value:.3f}" for value in (run.score.ap, run.score.ap50, run.score.ap75)),
        )
    return table


def windows(steps: int, count: int = LOSS_COLUMNS) -> list[range]:
    """`steps` steps in at most `count` stretches of about equal length."""
    edges = np.linspace(0, steps, min(steps, count) + 1).round().astype(int).tolist()
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def loss_table(run: Run) -> Table:
    """Each loss term of `run` over time, as means over stretches of steps."""
    losses = run.history.losses
    spans = windows(len(losses))
    table = Table(title=f"{run.name}: losses by step")
    table.add_column("term")
    for span in spans:
        table.add_column(f"{span.start + 1}-{span.stop}" if len(span) > 1 else f"{span.stop}", justify="right")
    for term in losses[0]:
        table.add_row(term, *(f"{np.mean([losses[step][term] for step in span]):.4f}" for span in spans))
    return table


def verdict(teacher: CocoScore, plain: CocoScore, longer: CocoScore, distilled: CocoScore, images: int) -> list[str]:
    """What the scores do and do not show, in sentences. `longer` is the plain student that was given the same time.

    A difference counts when it is more than twice its standard error, which comes from drawing the validation images
    anew; what another seed of the training would change is not in it.
    """
    lead, lead_error = _difference(teacher, plain, images)
    lines = [
        f"Teacher minus plain student: {lead:+.3f} AP (standard error {lead_error:.3f} over the validation images).",
        _gain(distilled, plain, images, "with as many steps"),
        _gain(distilled, longer, images, "with as much time"),
    ]
    if lead <= 2 * lead_error:
        lines.append("The teacher is not clearly better than the student: this budget leaves little to distil.")
    lines.append("One seed is no evidence either way: repeat with other values of --seed before concluding anything.")
    return lines


def _gain(distilled: CocoScore, plain: CocoScore, images: int, budget: str) -> str:
    gain, error = _difference(distilled, plain, images)
    if gain > 2 * error:
        meaning = "ahead by more than twice that error"
    elif gain < -2 * error:
        meaning = "no gain: behind by more than twice that error"
    else:
        meaning = "no gain: within twice that error"
    return f"Distilled minus plain student {budget}: {gain:+.3f} AP (standard error {error:.3f}), {meaning}."


def _difference(first: CocoScore, second: CocoScore, images: int) -> tuple[float, float]:
    error = standard_error(lambda chosen: first.resampled_ap(chosen) - second.resampled_ap(chosen), images)
    return first.ap - second.ap, error


def write_csv(path: Path, runs: list[Run]) -> None:
    """One row a step of each run; a term that a run does not have stays empty."""
    terms = list(dict.fromkeys(term for run in runs for term in run.history.losses[0]))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["model", "step", *terms])
        writer.writeheader()
        for run in runs:
            for step, losses in enumerate(run.history.losses, start=1):
                writer.writerow({"model": run.key, "step": step, **losses})


def write_tensorboard(folder: Path, runs: list[Run]) -> None:
    """One TensorBoard run a model, in place of an earlier one's: its losses by step and its AP at the end."""
    for run in runs:
        for earlier in (folder / run.key).glob("events.out.tfevents.*"):
            earlier.unlink()
        with SummaryWriter(str(folder / run.key)) as writer:
            for step, losses in enumerate(run.history.losses, start=1):
                for term, value in losses.items():
                    writer.add_scalar(f"loss/{term.removeprefix('loss_')}", value, step)
            writer.add_scalar("score/AP", run.score.ap, len(run.history.losses))
