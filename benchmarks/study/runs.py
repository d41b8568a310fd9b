"""One training of the study: a student of one arm and one seed, or the teacher that all of them have."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from examples.demo.data import DetectionData, Images
from examples.demo.digits import load_digit_scenes
from examples.demo.distillation import features
from examples.demo.evaluation import CocoScore, predict
from examples.demo.training import Budget, train
from examples.demo.voc import load_voc
from fbkd_ops import Distiller, inherit, size_free_weights
from fbkd_ops.losses.registry import LOSSES

from .detectors import DETECTORS
from .protocol import TERMS, Recipe, Setting, recipe, steps

CPU = torch.device("cpu")
TEACHER_SEED = 2021
CURVE_POINTS = 5  # of a learning curve, the end included


@dataclass
class Outcome:
    """What a training came to.

    ``shares`` are the measured ratios of the terms' gradient to the detector's own, in their order.
    """

    ap: float
    ap50: float
    ap75: float
    seconds: float  # CPU time of the training, without scoring
    curve: list[tuple[int, float]] = field(default_factory=list)  # steps, AP
    shares: list[float] = field(default_factory=list)


def load(setting: Setting, folder: Path | None) -> DetectionData:
    """Return the pictures of a setting; ``folder`` is that of a Pascal VOC set, None for the digits."""
    size = (setting.image_size, setting.teacher_pictures, setting.val_pictures)
    return load_voc(folder, *size) if folder else load_digit_scenes(*size)


def detector(setting: Setting, role: str, data: DetectionData, seed: int) -> nn.Module:
    """Return an untrained ``"teacher"`` or ``"student"``."""
    return DETECTORS[setting.detector](role, len(data.classes), setting.image_size, seed)


def train_teacher(setting: Setting, data: DetectionData) -> tuple[nn.Module, Outcome]:
    """Return the trained teacher and its score."""
    model = detector(setting, "teacher", data, TEACHER_SEED)
    budget = Budget(setting.teacher_steps, setting.batch_size, TEACHER_SEED)
    return model, _trained(model, model, data, data.train, budget, setting)


def train_student(setting: Setting, arm: str, seed: int, data: DetectionData, teacher: nn.Module) -> Outcome:
    """Train a student of ``arm``; what is drawn depends on ``seed`` alone, so that arms are paired."""
    student, model = student_of(setting, arm, seed, data, teacher)
    budget = Budget(steps(setting, arm), setting.batch_size, seed)
    return _trained(model, student, data, data.train.first(setting.pictures), budget, setting)


def student_of(
    setting: Setting, arm: str, seed: int, data: DetectionData, teacher: nn.Module | None
) -> tuple[nn.Module, nn.Module]:
    """Return an arm's student, and what is trained: itself, or the distiller around it.

    Args:
        teacher: a trained one; may be None for an arm that neither distils nor inherits.
    """
    chosen = recipe(arm)
    student = detector(setting, "student", data, seed)
    if chosen.inherits:
        inherit(student, teacher, setting.inheritable)
    if chosen.pull is None:
        return student, student
    return student, distiller(setting, chosen, student, teacher, data, steps(setting, arm))


def distiller(
    setting: Setting, chosen: Recipe, student: nn.Module, teacher: nn.Module, data: DetectionData, total_steps: int
) -> Distiller:
    """Return the student with the teacher and the loss between their pyramids, as a recipe says."""
    sample = [data.train[0][0]]
    pyramids = features(student, sample), features(teacher, sample)
    options: dict[str, Any] = {}
    if chosen.proportions == "size_free":
        options = {"normalize": "mean", **size_free_weights(setting.preset, len(pyramids[0]))}
    options.update({f"{term}_weight": 0.0 for term in TERMS if term not in chosen.terms})
    options["feature_norm"] = chosen.feature_norm
    if chosen.loss != "fbkd":
        options = {}  # proportions, terms and norm are FBKD's
    loss = LOSSES[f"{chosen.loss.upper()}Loss"].from_features(*pyramids, preset=setting.preset, **options)
    stop_step, share_steps = (
        None if part is None else round(part * total_steps) for part in (chosen.stop, chosen.calibration)
    )
    return Distiller(
        student,
        teacher,
        loss,
        student_layers="backbone",
        gradient_share=None if chosen.pull == "preset" else chosen.pull,
        share_steps=share_steps,
        stop_step=stop_step,
    )


def _trained(
    model: nn.Module, scored: nn.Module, data: DetectionData, images: Images, budget: Budget, setting: Setting
) -> Outcome:
    """Train ``model`` and score ``scored``, which is all or a part of it, on the way and in the end."""
    watch = Watch(model, scored, data, budget.steps, setting.batch_size)
    start = time.process_time()
    train(model, images, budget, CPU, watch.track)
    seconds = time.process_time() - start - watch.scoring_seconds
    score = watch.score()
    curve = [*watch.curve, (budget.steps, score.ap)]
    return Outcome(score.ap, score.ap50, score.ap75, seconds, curve, watch.shares)


class Watch:
    """Scores a model between the steps of its training, and notes the shares that were measured."""

    def __init__(self, model: nn.Module, scored: nn.Module, data: DetectionData, total: int, batch_size: int):
        self._model, self._scored, self._data, self._batch_size = model, scored, data, batch_size
        self._points = {round(total * part / CURVE_POINTS) for part in range(1, CURVE_POINTS)}
        self.curve: list[tuple[int, float]] = []
        self.shares: list[float] = []
        self.scoring_seconds = 0.0

    def track(self, batches: Iterable[Any]) -> Iterator[Any]:
        """Yield the batches of a training, and look at the model before each."""
        for step, batch in enumerate(batches):
            if step in self._points:
                start = time.process_time()
                self.curve.append((step, self.score().ap))
                self._model.train()
                self.scoring_seconds += time.process_time() - start
            yield batch
            self._note_share()

    def score(self) -> CocoScore:
        """Return the COCO score of the model as it is now."""
        found = predict(self._scored, self._data.val, CPU, self._batch_size)
        return CocoScore(self._data.val, found, len(self._data.classes))

    def _note_share(self) -> None:
        share = self._model.share if isinstance(self._model, Distiller) else None
        if share is not None and int(share.measured) > len(self.shares):
            self.shares.append(float(share.share))
