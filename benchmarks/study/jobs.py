"""A training of the study as a job of a process of its own, whose result is a line of a table."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from examples.demo.data import DetectionData

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
        """Where the trained teacher is kept: the name has all that it depends on."""
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
        return _line(job, setting.teacher_steps, outcome)
    teacher = runs.detector(setting, "teacher", data, runs.TEACHER_SEED)
    teacher.load_state_dict(torch.load(job.teacher_path, weights_only=True))
    return _line(job, steps(setting, job.arm), runs.train_student(setting, job.arm, job.seed, data, teacher.eval()))


@cache
def _pictures(job: Job) -> DetectionData:
    return runs.load(job.numbers, job.folder)


def _line(job: Job, count: int, outcome: runs.Outcome) -> dict[str, Any]:
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
        "torch": torch.__version__,
    }
