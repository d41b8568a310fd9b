"""A tiny COCO-format set and a tiny configuration, for the tests of examples/train and the processes they start."""

import json
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

CLASSES = ("disc", "box")
SIZE = 64
# Distilled from a teacher with another width; everything that a checkpoint has to hold is in use.
CONFIG = {
    "data": {"min_size": SIZE, "max_size": SIZE, "workers": 0},
    "augmentation": {"photometric": 0.5},
    "student": {"backbone": "mobilenet_v3_small", "width": 8, "anchor_sizes": [8, 16, 24, 32, 48]},
    "teacher": {"backbone": "mobilenet_v3_small", "width": 16, "anchor_sizes": [8, 16, 24, 32, 48]},
    "distillation": {"gradient_share": 0.1, "share_every": 2},
    "optimizer": {"learning_rate": 0.005, "max_gradient_norm": 5.0},
    "schedule": {"epochs": 2, "milestones": [1], "warmup_steps": 2},
    "training": {"batch_size": 4, "accumulate": 2, "ema_decay": 0.5, "log_every": 1},
}
SMALL = {"rpn_pre_nms_top_n_train": 50, "rpn_post_nms_top_n_train": 20, "rpn_post_nms_top_n_test": 20}
for each in ("student", "teacher"):
    CONFIG[each]["arguments"] = {**SMALL, "box_batch_size_per_image": 16}


def write_set(root: Path, train: int = 8, val: int = 3) -> Path:
    """Pictures of one or two bright rectangles each, the first of the training set without any."""
    random = np.random.default_rng(0)
    for split, count in (("train", train), ("val", val)):
        folder = root / split
        folder.mkdir(parents=True)
        images, annotations = [], []
        for index in range(count):
            pixels = random.integers(0, 80, (SIZE, SIZE + 8, 3), dtype=np.uint8)
            for _ in range(0 if (split, index) == ("train", 0) else 1 + index % 2):
                x, y, width, height = (int(each) for each in random.integers([0, 0, 12, 12], [40, 40, 24, 24]))
                label = int(random.integers(2))
                pixels[y : y + height, x : x + width, label] = 250
                annotations.append(
                    {"id": len(annotations) + 1, "image_id": index, "category_id": label + 1, "iscrowd": 0}
                    | {"bbox": [x, y, width, height], "area": width * height}
                )
            name = f"{index:03}.png"
            Image.fromarray(pixels).save(folder / name)
            images.append({"id": index, "file_name": name, "width": SIZE + 8, "height": SIZE})
        categories = [{"id": number, "name": name} for number, name in enumerate(CLASSES, start=1)]
        (root / "annotations").mkdir(exist_ok=True)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def write_config(path: Path, root: Path) -> Path:
    """The tiny configuration for the set in `root`, as a YAML file."""
    path.write_text(yaml.safe_dump({**CONFIG, "data": {**CONFIG["data"], "root": str(root)}}))
    return path
