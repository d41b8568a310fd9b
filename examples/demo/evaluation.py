"""COCO average precision, through pycocotools."""

from __future__ import annotations

import io
from collections.abc import Callable
from contextlib import redirect_stdout

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert

from .data import Images, Track

RESAMPLINGS = 100


def predict(
    detector: nn.Module, images: Images, device: torch.device, batch_size: int, track: Track = iter
) -> list[dict[str, Tensor]]:
    """The detections on every image, on the CPU; `track` wraps the loop over batches."""
    detector.eval()
    found: list[dict[str, Tensor]] = []
    with torch.no_grad():
        for start in track(range(0, len(images), batch_size)):
            batch = [images[index][0].to(device) for index in range(start, min(start + batch_size, len(images)))]
            found.extend({name: value.cpu() for name, value in result.items()} for result in detector(batch))
    return found


def _ground_truth(images: Images, num_classes: int) -> COCO:
    """The boxes of `images` as pycocotools holds them."""
    annotations = [
        {"image_id": index, "category_id": label, "bbox": box, "area": box[2] * box[3], "iscrowd": 0}
        for index, (boxes, labels) in enumerate(zip(images.boxes, images.labels, strict=True))
        for box, label in zip(box_convert(boxes, "xyxy", "xywh").tolist(), labels.tolist(), strict=True)
    ]
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(images))],
        "categories": [{"id": label} for label in range(1, num_classes + 1)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco


def _detections(predictions: list[dict[str, Tensor]]) -> np.ndarray:
    """One row ``image, x, y, w, h, score, label`` a detection, as pycocotools reads arrays."""
    rows = [np.zeros((0, 7))]
    for index, found in enumerate(predictions):
        boxes = box_convert(found["boxes"], "xyxy", "xywh").numpy()
        rows.append(np.column_stack([np.full(len(boxes), index), boxes, found["scores"], found["labels"]]))
    return np.concatenate(rows)


class CocoScore:
    """COCO AP of a list of predictions, over objects of all sizes; can be asked again for a resample of the images."""

    def __init__(self, images: Images, predictions: list[dict[str, Tensor]], num_classes: int) -> None:
        with redirect_stdout(io.StringIO()):
            truth = _ground_truth(images, num_classes)
            rows = _detections(predictions)
            self._evaluator = COCOeval(truth, truth.loadRes(rows) if len(rows) else COCO(), "bbox")
            parameters = self._evaluator.params
            parameters.areaRng, parameters.areaRngLbl, parameters.maxDets = [[0, 1e10]], ["all"], [100]
            self._evaluator.evaluate()
        self._matches = np.array(self._evaluator.evalImgs, dtype=object).reshape(num_classes, len(images))
        precision = self._precision(np.arange(len(images)))
        self.ap, self.ap50, self.ap75 = (_mean(part) for part in (precision, precision[0], precision[5]))  # IoU .5:.95

    def resampled_ap(self, chosen: np.ndarray) -> float:
        """AP on the images `chosen (len(images),)`, which may repeat."""
        return _mean(self._precision(chosen))

    def _precision(self, chosen: np.ndarray) -> np.ndarray:
        self._evaluator.evalImgs = list(self._matches[:, chosen].reshape(-1))
        with redirect_stdout(io.StringIO()):
            self._evaluator.accumulate()
        return self._evaluator.eval["precision"]


def _mean(precision: np.ndarray) -> float:
    """Mean over what is defined: a class without objects has -1."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else 0.0


def standard_error(statistic: Callable[[np.ndarray], float], length: int) -> float:
    """The bootstrap's standard error of a `statistic` of ``length`` images, given as the indices drawn."""
    rng = np.random.default_rng(0)
    return float(np.std([statistic(rng.integers(length, size=length)) for _ in range(RESAMPLINGS)], ddof=1))
