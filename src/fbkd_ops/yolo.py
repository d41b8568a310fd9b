"""Distillation in Ultralytics from the command line.

    python -m fbkd_ops.yolo model=yolo11n.pt teacher=yolo11m.pt data=coco8.yaml epochs=3
    python -m fbkd_ops.yolo model=yolo11n-seg.pt teacher=yolo11m-seg.pt data=coco8-seg.yaml loss=PKDLoss
    python -m fbkd_ops.yolo resume=runs/detect/train/weights/last.pt

Arguments are Ultralytics' own, as ``yolo train`` takes them, and those of FBKDTrainer: ``teacher``, ``loss`` (its name;
``loss.preset=two_stage`` and so on are its arguments), ``gradient_share``, ``weight``, ``start_step``, ...
"""

import functools
import sys
from typing import Any

__all__ = ["main"]


def main(words: list[str] | None = None) -> None:
    """Train as the words say, each ``key=value``; without any, or with ``help``, say what they are."""
    words = sys.argv[1:] if words is None else words
    if not words or {"-h", "--help", "help"} & set(words):
        print(__doc__.strip())
        return
    from ultralytics import YOLO

    from .integrations.ultralytics import FBKDTrainer, Settings

    given = _parsed(words)
    own = {name: given.pop(name) for name in Settings._fields if name in given}
    loss = {name.removeprefix("loss."): given.pop(name) for name in list(given) if name.startswith("loss.")}
    if "loss" in own:
        loss["type"] = own.pop("loss")
    if loss:
        own["loss"] = loss
    resumed = given.get("resume")
    model = given.pop("model", resumed if isinstance(resumed, str) else None)
    if model is None:
        raise SystemExit("fbkd_ops.yolo: model is needed, e.g. model=yolo11n.pt, or resume=runs/.../weights/last.pt")
    if "teacher" not in own and not resumed:
        raise SystemExit("fbkd_ops.yolo: teacher is needed, e.g. teacher=yolo11m.pt")
    YOLO(model).train(trainer=functools.partial(FBKDTrainer, **own), **given)


def _parsed(words: list[str]) -> dict[str, Any]:
    """Return the values by their keys, as Ultralytics reads them."""
    from ultralytics.cfg import parse_key_value_pair

    given = {}
    for word in words:
        if "=" not in word:
            raise SystemExit(f"fbkd_ops.yolo: {word!r} must be key=value; without arguments the command shows examples")
        key, value = parse_key_value_pair(word)
        given[key] = value
    return given


if __name__ == "__main__":
    main()
