"""A training step in Ultralytics' trainer: alone, with its built-in distillation and with ``FBKDTrainer``.

    python -m benchmarks.ultralytics_step [--student yolo11n.yaml] [--teacher yolo11s.yaml] [--imgsz 160] [--batch 4]
        [--steps 30] [--warmup 10] [--threads 1] [--json FILE]

Three trainers take turns: each step runs from the batch's start to its end, optimizer included, while the others wait.
The weights are random, for models from YAMLs; the images are noise with boxes.
"""

import argparse
import functools
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.results import write_json

WAYS = ("alone", "built-in", "fbkd_ops")


class Turns:
    """Lets one thread after the other pass, in a fixed order."""

    def __init__(self, names: tuple[str, ...]):
        self.waiting, self.condition = list(names), threading.Condition()

    def begin(self, name: str) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.waiting[0] == name)

    def end(self, name: str, leave: bool = False) -> None:
        with self.condition:
            self.waiting.remove(name)
            self.waiting += [] if leave else [name]
            self.condition.notify_all()


class Stopwatch:
    """Callbacks of one trainer: seconds of each of its steps."""

    def __init__(self, name: str, turns: Turns):
        self.name, self.turns, self.seconds = name, turns, []

    def callbacks(self) -> dict:
        return {"on_train_batch_start": self.start, "on_train_batch_end": self.stop}

    def start(self, _: Any) -> None:
        self.turns.begin(self.name)
        self.began = time.perf_counter()

    def stop(self, _: Any) -> None:
        self.seconds.append(time.perf_counter() - self.began)
        self.turns.end(self.name)


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


def train(way: str, arguments: argparse.Namespace, data: str, teacher: str, folder: Path, watch: Stopwatch) -> None:
    from ultralytics import YOLO

    from fbkd_ops.integrations.ultralytics import FBKDTrainer

    settings = dict(
        data=data,
        imgsz=arguments.imgsz,
        batch=arguments.batch,
        nbs=arguments.batch,
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
        settings["distill_model"] = teacher
    elif way == "fbkd_ops":
        settings["trainer"] = functools.partial(FBKDTrainer, teacher=teacher)
    model = YOLO(arguments.student)
    for event, callback in watch.callbacks().items():
        model.add_callback(event, callback)
    try:
        model.train(**settings)
    finally:
        watch.turns.begin(way)
        watch.turns.end(way, leave=True)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way's steps after the warm-up."""
    steps = arguments.steps + arguments.warmup
    data = make_data(folder / "data", steps * arguments.batch, arguments.imgsz)
    teacher = saved_teacher(arguments.teacher, folder)
    turns = Turns(WAYS)
    watches = {way: Stopwatch(way, turns) for way in WAYS}
    threads = [
        threading.Thread(target=train, args=(way, arguments, data, teacher, folder, watches[way])) for way in WAYS
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {way: watch.seconds[arguments.warmup :] for way, watch in watches.items()}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--student", default="yolo11n.yaml")
    parser.add_argument("--teacher", default="yolo11s.yaml")
    for name, default in (("imgsz", 160), ("batch", 4), ("steps", 30), ("warmup", 10), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    return parser.parse_args(words)


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(YOLO_CONFIG_DIR=folder, YOLO_OFFLINE="true", YOLO_VERBOSE="false")
        seconds = measure(arguments, Path(folder))
    medians = {way: 1e3 * statistics.median(times) for way, times in seconds.items()}
    for way, milliseconds in medians.items():
        ratio = milliseconds / medians["built-in"]
        print(f"{way:10} {milliseconds:7.1f} ms a step, {ratio:.2f} times the built-in distillation's")
    if arguments.json:
        size = {name: value for name, value in vars(arguments).items() if name != "json"}
        report = {"environment": environment("cpu", arguments.threads), "size": size, "milliseconds": medians}
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
