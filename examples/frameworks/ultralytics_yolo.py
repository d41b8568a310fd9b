"""Ultralytics YOLO11 n from m, through its own trainer.

Tap: the inputs of `Detect`
"""

import functools
from typing import Any

from ultralytics import YOLO

from fbkd_ops.integrations.ultralytics import FBKDTrainer


def train(data: str, student: str = "yolo11n.pt", teacher: str = "yolo11m.pt", **settings: Any) -> YOLO:
    model = YOLO(student)
    trainer = functools.partial(FBKDTrainer, teacher=teacher)
    model.train(trainer=trainer, data=data, **settings)
    return model


if __name__ == "__main__":
    train("coco8.yaml", epochs=3)
