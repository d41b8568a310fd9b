"""COCO average precision, through pycocotools."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import redirect_stdout

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchvision.ops import box_convert

from .data import Images, Target, Track

RESAMPLINGS = 100
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, 1e10)}  # COCO's ranges of areas


def predict(
    detector: nn.Module, images: Images, device: torch.device, batch_size: int, track: Track = iter
) -> list[dict[str, Tensor]]:
    """The detections on every image, on the CPU; `track` wraps the loop over batches."""
    starts = track(range(0, len(images), batch_size))
    batches = ([images[i][0] for i in range(start, min(start + batch_size, len(images)))] for start in starts)
    return [found for batch in batches for found in detect(detector, batch, device)]


@torch.no_grad()
def detect(detector: nn.Module, batch: Iterable[Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """The detections on each image of a batch, on the CPU."""
    detector.eval()
    found = detector([image.to(device) for image in batch])
    return [{name: value.cpu() for name, value in result.items()} for result in found]


def _ground_truth(targets: Sequence[Target], num_classes: int) -> COCO:
    """The boxes of all images as pycocotools holds them."""
    annotations: list[dict] = []
    for index, target in enumerate(targets):
        boxes = box_convert(target["boxes"], "xyxy", "xywh")
        areas = target.get("area", boxes[:, 2] * boxes[:, 3])
        crowds = target.get("iscrowd", torch.zeros(len(boxes), dtype=torch.int64))
        values = (each.tolist() for each in (boxes, target["labels"], areas, crowds))
        annotations.extend(
            {"image_id": index, "category_id": label, "bbox": box, "area": area, "iscrowd": int(crowd)}
            for box, label, area, crowd in zip(*values, strict=True)
        )
    for number, annotation in enumerate(annotations, start=1):
        annotation["id"] = number
    coco = COCO()
    coco.dataset = {
        "images": [{"id": index} for index in range(len(targets))],
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
    """COCO AP of a list of predictions; can be asked again for a resample of the images.

    Args:
        truth: the images, or a list of one target an image: ``boxes``, ``labels`` and, where they are known, ``area``
            and ``iscrowd``. Crowds are neither found nor missed.
        by_size: whether `sizes` is filled, which takes four times as long.

    Attributes:
        ap, ap50, ap75: over objects of all sizes.
        class_ap: AP of each class, NaN where there is no object of it.
        sizes: AP by the objects' size (`SIZES`), NaN where there is no such object.
    """

    def __init__(
        self,
        truth: Images | Sequence[Target],
        predictions: list[dict[str, Tensor]],
        num_classes: int,
        *,
        by_size: bool = False,
    ) -> None:
        targets = truth
        if isinstance(truth, Images):
            pairs = zip(truth.boxes, truth.labels, strict=True)
            targets = [{"boxes": boxes, "labels": labels} for boxes, labels in pairs]
        ranges = {"all": (0, 1e10)} | (SIZES if by_size else {})
        with redirect_stdout(io.StringIO()):
            known = _ground_truth(targets, num_classes)
            rows = _detections(predictions)
            self._evaluator = COCOeval(known, known.loadRes(rows) if len(rows) else COCO(), "bbox")
            parameters = self._evaluator.params
            parameters.areaRng, parameters.areaRngLbl = [list(each) for each in ranges.values()], list(ranges)
            parameters.maxDets = [100]
            self._evaluator.evaluate()
        self._matches = np.array(self._evaluator.evalImgs, dtype=object)
        self._matches = self._matches.reshape(num_classes, len(ranges), len(targets))
        by_range = self._precision(np.arange(len(targets)))
        precision = by_range[..., 0, :]
        self.ap, self.ap50, self.ap75 = (_mean(part) for part in (precision, precision[0], precision[5]))  # IoU .5:.95
        self.class_ap = [_mean(precision[:, :, label], math.nan) for label in range(num_classes)]
        self.sizes = {
            name: _mean(by_range[..., index, :], math.nan) for index, name in enumerate(ranges) if name != "all"
        }

    def resampled_ap(self, chosen: np.ndarray) -> float:
        """AP on the images `chosen (len(images),)`, which may repeat."""
        return _mean(self._precision(chosen)[..., 0, :])

    def _precision(self, chosen: np.ndarray) -> np.ndarray:
        """Precision ``(thresholds, recalls, classes, ranges, 1)`` on the images `chosen`."""
        self._evaluator.evalImgs = list(self._matches[:, :, chosen].reshape(-1))
        with redirect_stdout(io.StringIO()):
            self._evaluator.accumulate()
        return self._evaluator.eval["precision"]


def _mean(precision: np.ndarray, nothing: float = 0.0) -> float:
    """Mean over what is defined: a class without objects has -1; `nothing` where none has any."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else nothing


def standard_error(statistic: Callable[[np.ndarray], float], length: int) -> float:
    """The bootstrap's standard error of a `statistic` of ``length`` images, given as the indices drawn."""
    rng = np.random.default_rng(0)
    return float(np.std([statistic(rng.integers(length, size=length)) for _ in range(RESAMPLINGS)], ddof=1))
