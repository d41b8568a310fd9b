"""A training step in Ultralytics' trainer: alone, with its built-in distillation and with ``FBKDTrainer``.

    python -m benchmarks.ultralytics_step [--student yolo11n.yaml] [--teacher yolo11s.yaml] [--imgsz 160 640]
        [--batch 4 16] [--images 160] [--threads 2] [--json FILE]

Three trainers take turns: a step is all that one does from a batch's start to the next one's, optimizer and the loading
of the next batch included, while the others wait.
The memory is the largest of a process that trains in one way alone. The weights are random, for models from YAMLs; the
images are noise with boxes.
"""

import argparse
import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.memory import peak_bytes
from benchmarks.results import write_json

WAYS = ("alone", "built-in", "fbkd_ops")
# Steps that are not counted, the fewest and the most that are; of a process whose memory is measured.
WARMUP, FEWEST, MOST, MEMORY_STEPS = 2, 5, 30, 3


class Run(NamedTuple):
    """What is trained."""

    student: str
    teacher: str
    imgsz: int
    batch: int
    steps: int
    threads: int


class Turns:
    """Lets one thread after the other run a step, in a fixed order, and times the steps."""

    def __init__(self, names: tuple[str, ...]):
        self.waiting, self.condition = list(names), threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}
        self.began: float | None = None  # of the step of the first of those who wait

    def begin(self, name: str) -> None:
        """End this thread's last step, let the others have theirs, and begin the next one."""
        if self.began is not None and self.waiting[0] == name:
            self.seconds[name].append(time.perf_counter() - self.began)
            with self.condition:
                self.waiting.append(name)
                self.leave(name)
        with self.condition:
            self.condition.wait_for(lambda: self.waiting[0] == name)
        self.began = time.perf_counter()

    def leave(self, name: str) -> None:
        """Pass the turn on."""
        with self.condition:
            self.began = None
            self.waiting.remove(name)
            self.condition.notify_all()


def make_data(folder: Path, images: int, size: int) -> str:
    """Return the path of a data set of noise in YOLO's format: ``images`` pictures to train on, one to validate."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for index in range(images + 1):
        split = "train" if index < images else "val"
        picture = generator.integers(0, 256, (size, size, 3), np.uint8)
        boxes = [(label, *generator.uniform(0.3, 0.7, 2), *generator.uniform(0.1, 0.5, 2)) for label in range(2)]
        for kind in ("images", "labels"):
            (folder / kind / split).mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(folder / "images" / split / f"{index}.png")
        text = "\n".join(" ".join(map(str, box)) for box in boxes)
        (folder / "labels" / split / f"{index}.txt").write_text(text)
    description = folder / "data.yaml"
    description.write_text(f"path: {folder}\ntrain: images/train\nval: images/val\nnames: [a, b]\n")
    return str(description)


def saved_teacher(teacher: str, folder: Path) -> str:
    """A checkpoint of random weights, which the built-in distillation asks for."""
    from ultralytics import YOLO

    path = folder / "teacher.pt"
    YOLO(teacher).save(path)
    return str(path)


def train(way: str, run: Run, data: str, folder: Path, turns: Turns) -> None:
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    settings = dict(
        data=data,
        imgsz=run.imgsz,
        batch=run.batch,
        nbs=run.batch,
        epochs=1,
        warmup_epochs=0,
        optimizer="SGD",
        device="cpu",
        workers=0,
        plots=False,
        val=False,
        verbose=False,
        save=False,
        project=str(folder),
        name=way,
    )
    if way == "built-in":
        settings["distill_model"] = run.teacher
    elif way == "fbkd_ops":
        settings["trainer"] = functools.partial(FBKDTrainer, teacher=run.teacher)
    model = YOLO(run.student)
    model.add_callback("on_train_batch_start", lambda _: turns.begin(way))
    try:
        model.train(**settings)
    finally:
        turns.leave(way)


@contextlib.contextmanager
def prepared(run: Run) -> Iterator[tuple[Run, str, Path]]:
    """Yield the run with a teacher that is a file, its data and a folder; Ultralytics' settings lie there."""
    torch.set_num_threads(run.threads)
    with tempfile.TemporaryDirectory() as name:
        os.environ.update(YOLO_CONFIG_DIR=name, YOLO_OFFLINE="true", YOLO_VERBOSE="false")
        folder = Path(name)
        data = make_data(folder / "data", run.steps * run.batch, run.imgsz)
        yield run._replace(teacher=saved_teacher(run.teacher, folder)), data, folder


def seconds_of(run: Run) -> dict[str, list[float]]:
    """Seconds of each way's steps after the warm-up, but for the last one, behind which other things follow."""
    with prepared(run) as (ready, data, folder):
        turns = Turns(WAYS)
        threads = [threading.Thread(target=train, args=(way, ready, data, folder, turns)) for way in WAYS]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return {way: seconds[WARMUP:] for way, seconds in turns.seconds.items()}


def peak_mb(way: str, run: Run) -> float:
    """The largest memory of this process, which trains in one way."""
    with prepared(run) as (ready, data, folder):
        train(way, ready, data, folder, Turns((way,)))
    return peak_bytes() / 1e6


def alone(function, *arguments):
    """What a function returns in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def rows_of(run: Run) -> Iterator[dict]:
    """Yield the figures of each way; ``times_built_in`` is of the same rounds."""
    seconds = alone(seconds_of, run)
    for way in WAYS:
        ratios = [ours / theirs for ours, theirs in zip(seconds[way], seconds["built-in"], strict=True)]
        yield {
            "imgsz": run.imgsz,
            "batch": run.batch,
            "way": way,
            "steps": len(ratios),
            "ms": round(1e3 * statistics.median(seconds[way]), 1),
            "images_a_second": round(run.batch / statistics.median(seconds[way]), 2),
            "times_built_in": round(statistics.median(ratios), 3),
            "peak_mb": round(alone(peak_mb, way, run._replace(steps=MEMORY_STEPS))),
        }


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="yolo11n.yaml")
    parser.add_argument("--teacher", default="yolo11s.yaml")
    parser.add_argument("--imgsz", type=int, nargs="+", default=[160, 640])
    parser.add_argument("--batch", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--images", type=int, default=160, help="to train on, at a size of 160; fewer at a larger one")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="sizes that are in it already are kept")
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> None:
    arguments = parse(words)
    report = {"environment": environment("cpu", arguments.threads), "rows": []}
    report |= {"student": arguments.student, "teacher": arguments.teacher}
    measured = list(itertools.product(arguments.imgsz, arguments.batch))
    if arguments.json and arguments.json.exists():
        earlier = json.loads(arguments.json.read_text())
        report["rows"] = [row for row in earlier["rows"] if (row["imgsz"], row["batch"]) not in measured]
    for imgsz, batch in measured:
        counted = arguments.images * (160 / imgsz) ** 2 / batch
        steps = WARMUP + 1 + min(max(round(counted), FEWEST), MOST)
        run = Run(arguments.student, arguments.teacher, imgsz, batch, steps, arguments.threads)
        for row in rows_of(run):
            print(", ".join(f"{name} {value}" for name, value in row.items()), flush=True)
            report["rows"].append(row)
            if arguments.json:
                write_json(arguments.json, report)


if __name__ == "__main__":
    main()
