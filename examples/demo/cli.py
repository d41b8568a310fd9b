"""The demo's command line: options, and the order of events."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from rich.console import Console
from rich.progress import track
from torch import nn

from fbkd_ops import PRESETS

from ..datasets import FORMATS, Findings
from . import report
from .attention import draw_attention
from .data import DataError, DetectionData, Images, Track
from .detectors import STUDENT, TEACHER, DetectorConfig, build_detector, count_parameters
from .digits import load_digit_scenes
from .distillation import build_distiller
from .evaluation import CocoScore, predict
from .training import Budget, History, TrainingError, train
from .voc import load_voc

SMALLEST_IMAGE = 64
FINDINGS = "findings.csv"
DIGIT_IMAGES = 200  # for the students; the teacher has all
DESCRIPTION = "Train a teacher, a distilled student and two plain students on real pixels, and compare their COCO AP."


class OneLineParser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}\n")


def at_least(smallest: int) -> Callable[[str], int]:
    """An argparse type: a whole number not below `smallest`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = smallest - 1
        if value < smallest:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {smallest}, got {text!r}")
        return value

    return parse


def positive(text: str) -> float:
    """An argparse type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return value


def device(text: str) -> torch.device:
    """An argparse type: ``auto`` is the GPU where there is one."""
    if text == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(text)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"cannot use {text!r}: {str(error).splitlines()[0]}") from None
    return chosen


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options, checked; wrong ones end the program with status 2."""
    parser = OneLineParser(prog="python -m examples.demo", description=DESCRIPTION)
    add = parser.add_argument
    add("--data", type=Path, metavar="PATH", help="a VOC, COCO or YOLO set instead of the embedded digit scenes")
    add("--format", choices=("auto", *FORMATS), default="auto", help="of --data (%(default)s: by what is in it)")
    add("--annotations", metavar="DIR", help="folder of XML files below --data, where its name is no usual one")
    add("--images", metavar="DIR", help="folder of pictures below --data, where its name is no usual one")
    add("--strict", action="store_true", help="stop at the first file of --data that cannot be used")
    add("--train-images", type=at_least(1), default=2000, help="at most so many pictures to train on (%(default)s)")
    few = f"at most so many of them to train the students on (all of --data, {DIGIT_IMAGES} of the digit scenes)"
    add("--student-images", type=at_least(1), help=few)
    add("--val-images", type=at_least(1), default=200, help="at most so many pictures to validate on (%(default)s)")
    add("--image-size", type=at_least(SMALLEST_IMAGE), default=64, help="pixels of the longer side (%(default)s)")
    add("--steps", type=at_least(1), default=1500, help="training steps of a student (%(default)s)")
    add("--teacher-steps", type=at_least(1), default=2500, help="training steps of the teacher (%(default)s)")
    add("--batch-size", type=at_least(1), default=4, help="pictures a step (%(default)s)")
    add("--seed", type=at_least(0), default=0, help="of the weights and of the order of pictures (%(default)s)")
    add("--preset", choices=sorted(PRESETS), default="two_stage", help="of the FBKD loss (%(default)s)")
    add("--share", type=positive, default=0.5, help="of the terms' gradient to the student's own (%(default)s)")
    add("--output", type=Path, default=Path("runs/demo"), metavar="DIR", help="where files go (%(default)s)")
    add("--device", type=device, default="auto", help="auto, cpu, cuda, cuda:1, ... (%(default)s)")
    add("--threads", type=at_least(1), help="CPU threads (PyTorch's choice)")
    options = parser.parse_args(arguments)
    options.student_images = options.student_images or (options.train_images if options.data else DIGIT_IMAGES)
    try:
        options.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --output: cannot make {options.output}: {error.strerror}")
    return options


def steps_in(seconds: float, history: History) -> int:
    """How many steps like those of `history` the time is enough for, at least one."""
    return max(1, round(seconds * len(history.losses) / history.seconds))


class Demo:
    """One run: the data, the options and the terminal it speaks to."""

    def __init__(self, options: argparse.Namespace, console: Console) -> None:
        self.options, self.console = options, console
        self.data = self._load_data()

    def run(self) -> None:
        """Train the four models in turn, then report."""
        teacher, plain, longer, distilled = (self._build(config) for config in (TEACHER, *[STUDENT] * 3))
        options, data = self.options, self.data
        samples, images = [data.train[0][0].to(options.device)], self._student_images()
        teacher_run = self._finish("teacher", "teacher", teacher, teacher, data.train, options.teacher_steps)
        plain_run = self._finish("plain", "plain student", plain, plain, images, options.steps)
        distiller = build_distiller(distilled, teacher, samples, options.preset, options.share)
        distilled_run = self._finish("distilled", "distilled student", distiller, distilled, images, options.steps)
        steps = steps_in(distilled_run.history.seconds, plain_run.history)
        longer_run = self._finish("longer", "plain student, same time", longer, longer, images, steps)
        detectors = {"plain": plain, "distilled": distilled, "teacher": teacher}
        figure = draw_attention(detectors, distiller.loss, self.data.val, self.data.classes)
        figure.savefig(options.output / "attention.png", dpi=130)
        self._report([teacher_run, plain_run, longer_run, distilled_run])

    def _student_images(self) -> Images:
        images = self.data.train.first(self.options.student_images)
        if not any(len(boxes) for boxes in images.boxes):
            raise DataError(
                f"the first {len(images)} pictures have no box to train on; give more with --student-images"
            )
        return images

    def _load_data(self) -> DetectionData:
        options, show = self.options, self._track("reading pictures")
        size = (options.image_size, options.train_images, options.val_images)
        data = self._load_files(*size, show) if options.data else load_digit_scenes(*size, show)
        self.console.print(data.summary, markup=False, highlight=False, soft_wrap=True)
        return data

    def _load_files(self, longest: int, train_images: int, val_images: int, show: Track) -> DetectionData:
        """Read --data, and write what is wrong with its files also where nothing is left to train on."""
        options, findings = self.options, Findings(self.options.strict)
        folders = {"format": options.format, "annotations": options.annotations, "images": options.images}
        try:
            return load_voc(options.data, longest, train_images, val_images, show, findings, **folders)
        finally:
            findings.write(options.output / FINDINGS)
            self.console.print(f"wrote {options.output / FINDINGS}", markup=False, highlight=False, soft_wrap=True)

    def _track(self, description: str, total: int | None = None) -> Track:
        return lambda items: track(items, f"{description:28}", total, console=self.console)

    def _build(self, config: DetectorConfig) -> nn.Module:
        options = self.options
        return build_detector(config, len(self.data.classes), options.image_size, options.seed).to(options.device)

    def _finish(
        self, key: str, name: str, model: nn.Module, detector: nn.Module, images: Images, steps: int
    ) -> report.Run:
        """Train `model` on `images`, then score `detector`, which is all or a part of it."""
        options, data = self.options, self.data
        budget = Budget(steps, options.batch_size, options.seed)
        history = train(model, images, budget, options.device, self._track(f"training {key}", steps))
        found = predict(detector, data.val, options.device, options.batch_size, self._track(f"validating {key}"))
        score = CocoScore(data.val, found, len(data.classes))
        return report.Run(key, name, count_parameters(detector), len(images), history, score)

    def _report(self, runs: list[report.Run]) -> None:
        output = self.options.output
        report.write_csv(output / "log.csv", runs)
        report.write_tensorboard(output / "tensorboard", runs)
        for run in runs:
            self.console.print(report.loss_table(run))
        trunks = f"teacher: {TEACHER.name}; students: {STUDENT.name}; none pretrained"
        self.console.print(report.score_table(runs, trunks))
        for line in report.verdict(**{run.key: run.score for run in runs}, images=len(self.data.val)):
            self.console.print(line, highlight=False, soft_wrap=True)
        for name in ("log.csv", "tensorboard", "attention.png"):
            self.console.print(f"wrote {output / name}", highlight=False, soft_wrap=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; 0 when it went through, 2 when the arguments or the data are at fault, 1 when training failed."""
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console, start = Console(), time.perf_counter()
    errors = Console(stderr=True)
    try:
        Demo(options, console).run()
    except (DataError, TrainingError) as error:
        errors.print(f"error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2 if isinstance(error, DataError) else 1
    console.print(f"took {time.perf_counter() - start:.0f} s on {options.device}", highlight=False)
    return 0
