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

import numpy as np
import torch

from benchmarks.environment import environment
from benchmarks.results import write_json

WAYS = ("alone", "built-in", "fbkd_ops")


class Turns:
    """Lets one thread after the other run a step, in a fixed order, and times the steps."""

    def __init__(self, names: tuple[str, ...]):
        self.waiting, self.condition = list(names), threading.Condition()
        self.seconds: dict[str, list[float]] = {name: [] for name in names}

    def begin(self, name: str) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.waiting[0] == name)
        self.began = time.perf_counter()

    def end(self, name: str) -> None:
        self.seconds[name].append(time.perf_counter() - self.began)
        with self.condition:
            self.waiting.append(name)
            self.leave(name)

    def leave(self, name: str) -> None:
        with self.condition:
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


def train(way: str, arguments: argparse.Namespace, data: str, teacher: str, folder: Path, turns: Turns) -> None:
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
    model.add_callback("on_train_batch_start", lambda _: turns.begin(way))
    model.add_callback("on_train_batch_end", lambda _: turns.end(way))
    try:
        model.train(**settings)
    finally:
        turns.leave(way)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """Seconds of each way's steps after the warm-up."""
    steps = arguments.steps + arguments.warmup
    data = make_data(folder / "data", steps * arguments.batch, arguments.imgsz)
    teacher = saved_teacher(arguments.teacher, folder)
    turns = Turns(WAYS)
    threads = [threading.Thread(target=train, args=(way, arguments, data, teacher, folder, turns)) for way in WAYS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return {way: seconds[arguments.warmup :] for way, seconds in turns.seconds.items()}


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
