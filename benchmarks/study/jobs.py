"""A training of the study as a job of a process of its own, whose result is a line of a table."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from benchmarks.environment import revision
from examples.demo.data import DetectionData
from examples.demo.training import TrainingError

from . import runs
from .protocol import SETTINGS, Setting, Study, changed, steps

TEACHERS = Path("build/study")
KEY = ("setting", "changes", "arm", "seed")
TEACHER = "teacher"  # beside the arms


class Job(NamedTuple):
    """One training that the study needs."""

    setting: str
    changes: str
    arm: str
    seed: int
    folder: Path | None  # of the setting's pictures

    @property
    def numbers(self) -> Setting:
        return changed(SETTINGS[self.setting], self.changes)

    @property
    def teacher_path(self) -> Path:
        """Where the trained teacher is kept. Its line in the table has a digest of it, and so have its students'."""
        own = self.numbers
        numbers = own.image_size, own.teacher_pictures, own.batch_size, own.teacher_steps
        return TEACHERS / f"{self.setting}-{own.detector}-{'-'.join(map(str, numbers))}.pt"


def jobs_of(study: Study, folder: Path | None) -> list[Job]:
    """Return all trainings of a part of the study, the teacher's first, then seed by seed."""
    runs_of_seeds = [(arm, seed) for seed in study.seeds for arm in study.arms]
    pairs = [(TEACHER, runs.TEACHER_SEED), *runs_of_seeds]
    return [Job(study.setting, study.changes, arm, seed, folder) for arm, seed in pairs]


def is_done(job: Job, rows: list[dict[str, Any]]) -> bool:
    """Whether a job has its line, and a teacher its weights, too."""
    found = any(all(str(row[name]) == str(value) for name, value in zip(KEY, job, strict=False)) for row in rows)
    return found and (job.arm != TEACHER or job.teacher_path.exists())


def run(job: Job) -> dict[str, Any]:
    """Do a job on one thread, and return its line."""
    torch.set_num_threads(1)
    setting = job.numbers
    data = _pictures(job._replace(arm="", seed=0))
    if job.arm == TEACHER:
        model, outcome = runs.train_teacher(setting, data)
        partial = job.teacher_path.with_suffix(".partial")
        partial.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), partial)
        partial.replace(job.teacher_path)
        return line(job, setting.teacher_steps, outcome)
    teacher = runs.detector(setting, "teacher", data, runs.TEACHER_SEED)
    teacher.load_state_dict(torch.load(job.teacher_path, weights_only=True))
    return line(job, steps(setting, job.arm), _outcome(job, data, teacher.eval()))


def _outcome(job: Job, data: DetectionData, teacher: nn.Module) -> runs.Outcome:
    """Train a student. One whose loss is not finite has an AP of 0, as the protocol says."""
    try:
        return runs.train_student(job.numbers, job.arm, job.seed, data, teacher)
    except TrainingError:
        return runs.Outcome(0.0, 0.0, 0.0, 0.0)


def check_teacher(job: Job, rows: list[dict[str, Any]]) -> None:
    """Refuse to mix students of two teachers in one table.

    Raises:
        ValueError: the teacher that is kept is not the one of the students that have their lines.
    """
    digest = digest_of(job.teacher_path)
    others = {row["teacher"] for row in rows if all(row[name] == getattr(job, name) for name in ("setting", "changes"))}
    if others - {digest}:
        raise ValueError(
            f"{job.teacher_path} is {digest}, but the table has runs with {', '.join(sorted(others - {digest}))}: give "
            "another --output, or the weights that those had"
        )


def digest_of(path: Path) -> str:
    """Return a few letters that tell one file of weights from another."""
    state = torch.load(path, weights_only=True)
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()[:12]


@cache
def _pictures(job: Job) -> DetectionData:
    return runs.load(job.numbers, job.folder)


def line(job: Any, count: int, outcome: runs.Outcome) -> dict[str, Any]:
    """Return the line of a training of ``count`` steps; the first fields of ``job`` are the ``KEY``."""
    second_half = outcome.shares[len(outcome.shares) // 2 :]
    low, middle, high = np.quantile(second_half, [0.1, 0.5, 0.9]) if second_half else ("", "", "")
    return {
        **dict(zip(KEY, job, strict=False)),
        "steps": count,
        "ap": outcome.ap,
        "ap50": outcome.ap50,
        "ap75": outcome.ap75,
        "seconds": outcome.seconds,
        "share_p10": low,
        "share_p50": middle,
        "share_p90": high,
        "curve": " ".join(f"{step}:{ap:.4f}" for step, ap in outcome.curve),
        "teacher": digest_of(job.teacher_path),
        "revision": revision(),
        "torch": torch.__version__,
    }
