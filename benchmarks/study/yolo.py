"""A student of Ultralytics alone, with its built-in distillation and with ``FBKDTrainer``, over paired seeds.

    python -m benchmarks.study.yolo [--arms baseline built_in] [--seeds 100-105] [--jobs 2]
    python -m benchmarks.study.yolo --arms PKDLoss:0.5 --seeds 900-900 --change epochs=40 --output build/pilot.csv

YOLO11n learns from YOLO11s, both from random weights, on the digits of the study. ``NAME:SHARE`` is an arm of a loss
with a gradient share. The protocol is in docs/ultralytics.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from benchmarks.study import __main__ as study  # noqa: E402
from benchmarks.study.jobs import TEACHER, TEACHERS, line  # noqa: E402
from benchmarks.study.protocol import SHARE, changed  # noqa: E402
from benchmarks.study.runs import TEACHER_SEED, Outcome  # noqa: E402
from benchmarks.yolo_set import write_yolo_set  # noqa: E402
from examples.demo.digits import load_digit_scenes  # noqa: E402
from fbkd_ops import size_free_weights  # noqa: E402
from fbkd_ops.losses.registry import LOSSES  # noqa: E402

RESULTS = Path("benchmarks/results/cpu-study-yolo.csv")
STUDENT_MODEL, TEACHER_MODEL, LEVELS = "yolo11n.yaml", "yolo11s.yaml", 3


@dataclasses.dataclass(frozen=True)
class Budget:
    """What student and teacher are trained on, and how long."""

    image_size: int = 64
    pictures: int = 100
    teacher_pictures: int = 2000
    val_pictures: int = 500
    epochs: int = 120
    teacher_epochs: int = 12
    batch_size: int = 16
    teacher_batch_size: int = 8
    learning_rate: float = 0.005
    teacher_learning_rate: float = 0.002
    time_factor: float = 1.4  # what a step of the built-in distillation takes, in steps of a plain one; of the pilot


BUDGET = Budget()
ARMS = ("baseline", "time_matched", "built_in", f"FBKDLoss:{SHARE}", "ScoreWeightedLoss:2")
SEEDS = range(100, 106)


class Job(NamedTuple):
    """One training; the fields are those by which the study knows a line again."""

    setting: str
    changes: str
    arm: str
    seed: int

    @property
    def budget(self) -> Budget:
        return changed(BUDGET, self.changes)

    @property
    def teacher_path(self) -> Path:
        return TEACHERS / "yolo.pt"

    @property
    def epochs(self) -> int:
        budget = self.budget
        if self.arm == TEACHER:
            return budget.teacher_epochs
        return round(budget.epochs * (budget.time_factor if self.arm == "time_matched" else 1))


def jobs_of(arms: Sequence[str], seeds: range, changes: str = "") -> list[Job]:
    """Return all trainings, the teacher's first, then seed by seed."""
    pairs = [(TEACHER, TEACHER_SEED), *((arm, seed) for seed in seeds for arm in arms)]
    return [Job("yolo", changes, arm, seed) for arm, seed in pairs]


def settings_of(job: Job, teacher: str) -> dict[str, Any]:
    """Return the arguments of Ultralytics' ``train`` that an arm has beside the others'.

    Args:
        job: the training.
        teacher: path of the teacher's checkpoint.
    """
    if job.arm == "built_in":
        return {"distill_model": teacher}
    name, _, share = job.arm.partition(":")
    if not share:
        return {}
    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    loss: dict[str, Any] = {"type": name}
    if name == "FBKDLoss":
        loss |= {"preset": "one_stage", "normalize": "mean", **size_free_weights("one_stage", LEVELS)}
    return {"trainer": functools.partial(FBKDTrainer, teacher=teacher, loss=loss, gradient_share=float(share))}


def run(job: Job) -> dict[str, Any]:
    """Do a training on one thread, and return its line."""
    is_teacher, budget = job.arm == TEACHER, job.budget
    pictures = budget.teacher_pictures if is_teacher else budget.pictures
    batch_size = budget.teacher_batch_size if is_teacher else budget.batch_size
    learning_rate = budget.teacher_learning_rate if is_teacher else budget.learning_rate
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ.update(YOLO_CONFIG_DIR=name, YOLO_OFFLINE="true", YOLO_VERBOSE="false")
        teacher = "" if is_teacher else _checkpoint_of(job, folder)
        data = load_digit_scenes(budget.image_size, budget.teacher_pictures, budget.val_pictures)
        settings = dict(
            data=write_yolo_set(folder / "data", data.train.first(pictures), data.val, data.classes),
            imgsz=budget.image_size,
            batch=batch_size,
            nbs=batch_size,
            optimizer="AdamW",
            lr0=learning_rate,
            epochs=job.epochs,
            seed=job.seed,
            project=name,
        )
        model, outcome = trained(TEACHER_MODEL if is_teacher else STUDENT_MODEL, settings | settings_of(job, teacher))
    if is_teacher:
        job.teacher_path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(model.float().state_dict(), job.teacher_path)
    return line(job, job.epochs * -(-pictures // batch_size), outcome)


def _checkpoint_of(job: Job, folder: Path) -> str:
    """Return the path of the teacher as a checkpoint of Ultralytics."""
    from ultralytics import YOLO
    from ultralytics.nn.tasks import DetectionModel

    teacher = YOLO(TEACHER_MODEL)
    teacher.model = DetectionModel(TEACHER_MODEL, nc=10, verbose=False)
    teacher.model.load_state_dict(torch.load(job.teacher_path, weights_only=True))
    teacher.model.names = dict(enumerate("0123456789"))
    teacher.save(folder / "teacher.pt")
    return str(folder / "teacher.pt")


def trained(yaml: str, settings: dict[str, Any]) -> tuple[nn.Module, Outcome]:
    """Train a model of Ultralytics from random weights; return its averaged weights and how well they do."""
    from ultralytics import YOLO
    from ultralytics.utils.torch_utils import init_seeds

    watch, model = Watch(), YOLO(yaml)
    # The teacher's and the loss's own numbers are drawn by now: from here on arms of one seed see the same pictures.
    model.add_callback("on_train_start", lambda trainer: init_seeds(settings["seed"]))
    for event, callback in watch.callbacks().items():
        model.add_callback(event, callback)
    torch.set_num_threads(1)
    model.train(
        **settings,
        device="cpu",
        workers=0,
        cache="ram",
        # Digits that are mirrored are none; with mosaics they are smaller than a cell.
        fliplr=0.0,
        mosaic=0.0,
        scale=0.2,
        plots=False,
        val=False,  # but for the last epoch
        verbose=False,
    )
    return model.trainer.ema.ema, watch.outcome


class Watch:
    """Notes how well a training's last epoch does, what it took, and the shares that were measured."""

    def __init__(self):
        self.outcome = Outcome(0.0, 0.0, 0.0, 0.0)
        self._started = self._validating = 0.0

    def callbacks(self) -> dict[str, Callable[[Any], None]]:
        return {
            "on_train_start": self._start,
            "on_train_batch_end": self._note_share,
            "on_val_start": self._pause,
            "on_val_end": self._resume,
            "on_fit_epoch_end": self._score,
        }

    def _start(self, trainer: Any) -> None:
        self._started = time.process_time()

    def _pause(self, validator: Any) -> None:
        self._validating -= time.process_time()

    def _resume(self, validator: Any) -> None:
        self._validating += time.process_time()

    def _note_share(self, trainer: Any) -> None:
        share = getattr(trainer, "share", None)
        if share is not None and int(share.measured) > len(self.outcome.shares):
            self.outcome.shares.append(float(share.share))

    def _score(self, trainer: Any) -> None:
        """Keep the last epoch's score; the one after it is that of the best epoch."""
        if trainer.epoch + 1 < trainer.epochs or self.outcome.curve:
            return
        box, seconds = trainer.validator.metrics.box, time.process_time() - self._started - self._validating
        self.outcome = Outcome(box.map, box.map50, box.map75, seconds, [(trainer.epochs, box.map)], self.outcome.shares)


def arm(text: str) -> str:
    """An argparse type: one of ``ARMS``, or the name of a loss with its gradient share."""
    name, _, share = text.partition(":")
    if text not in ARMS and not (name in LOSSES and share.replace(".", "", 1).isdigit()):
        raise argparse.ArgumentTypeError(f"expected of {', '.join(ARMS)} or a loss with its share, got {text!r}")
    return text


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.study.yolo", description=__doc__.splitlines()[0])
    parser.add_argument("--arms", nargs="+", type=arm, default=ARMS, help=f"of {', '.join(ARMS)} or NAME:SHARE")
    parser.add_argument("--seeds", type=study.seeds, metavar="FIRST-LAST", default=SEEDS)
    parser.add_argument("--change", nargs="+", metavar="NAME=NUMBER", default=[], help="other numbers, for a pilot")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time, a core each (%(default)s)")
    parser.add_argument("--output", type=Path, metavar="CSV", default=RESULTS, help="%(default)s")
    options = parser.parse_args(arguments)
    jobs = jobs_of(options.arms, options.seeds, " ".join(sorted(options.change)))
    study.finish(jobs, options.jobs, options.output, run)


if __name__ == "__main__":
    main()
