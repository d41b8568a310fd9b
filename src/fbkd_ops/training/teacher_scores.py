"""How sure a teacher is of an object at each pixel of its maps: what its own head says of them.

A function of the teacher and its features returns one map ``(N, H, W)`` per level, each number between 0 and 1: the
largest probability of any class and anchor. The heads are recognised by what they have: this module imports no
framework.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._validation import Features, check_callable
from .feature_tap import unwrapped

__all__ = [
    "ScoreFunction",
    "checked_score_function",
    "find_scores",
    "of_mmdet",
    "of_torchvision",
    "of_ultralytics",
    "resized_scores",
    "scores_of",
]

ScoreFunction = Callable[[nn.Module, Features], Any]


def of_torchvision(teacher: nn.Module, features: Features) -> list[Tensor]:
    """Return the scores of RetinaNet's, FCOS's (times centerness, its square root) or a region proposal network's head.

    Args:
        teacher: the detector.
        features: of its whole pyramid.
    """
    model: Any = unwrapped(teacher)
    maps = _listed(features)
    if hasattr(model, "rpn"):
        objectness, _ = model.rpn.head(maps)
        return [logits.sigmoid().amax(dim=1) for logits in objectness]  # (N, A, H, W)
    scores = [_by_cell(model.head.classification_head([x]).sigmoid().amax(dim=2), x) for x in maps]  # (N, HWA, K)
    if not hasattr(model.head.regression_head, "bbox_ctrness"):
        return scores
    centres = [_by_cell(model.head.regression_head([x])[1].sigmoid()[..., 0], x) for x in maps]
    return [(score * centre).sqrt() for score, centre in zip(scores, centres, strict=True)]


def of_mmdet(teacher: nn.Module, features: Features) -> list[Tensor]:
    """Return the class scores of a dense head of MMDetection (``bbox_head``), of whatever else it returns nothing.

    Args:
        teacher: the detector.
        features: what its neck returns.
    """
    head: Any = unwrapped(teacher).bbox_head
    logits, *_ = head(tuple(_listed(features)))
    classes = head.cls_out_channels
    found = []
    for each in logits:
        by_class = each.unflatten(1, (-1, classes))  # (N, A, K, H, W)
        # A softmax has the background as its last class.
        scores = by_class.sigmoid() if getattr(head, "use_sigmoid_cls", True) else by_class.softmax(dim=2)[:, :, :-1]
        found.append(scores.amax(dim=(1, 2)))
    return found


def of_ultralytics(teacher: nn.Module, features: Features) -> list[Tensor]:
    """Return the class scores of a ``Detect`` head.

    Args:
        teacher: the model.
        features: what the head is given.
    """
    model: Any = unwrapped(teacher)
    head = model.model[-1]
    return [branch(x).sigmoid().amax(dim=1) for branch, x in zip(head.cv3, _listed(features), strict=True)]


def find_scores(teacher: nn.Module) -> ScoreFunction:
    """Return the function that knows the teacher's head.

    Raises:
        TypeError: no head that is known.
    """
    model: Any = unwrapped(teacher)
    head = getattr(model, "head", None)
    if hasattr(getattr(model, "rpn", None), "head") or hasattr(head, "classification_head"):
        return of_torchvision
    if hasattr(getattr(model, "bbox_head", None), "cls_out_channels"):
        return of_mmdet
    layers = getattr(model, "model", None)
    if isinstance(layers, nn.Sequential) and len(layers) and hasattr(layers[-1], "cv3"):
        return of_ultralytics
    raise TypeError(
        f"the loss needs the teacher's scores, but the head of {type(model).__name__} is not known: give "
        "Distiller(teacher_scores=...), a function of the teacher and its features that returns one map (N, H, W) of "
        "numbers between 0 and 1 per level"
    )


def scores_of(function: ScoreFunction, teacher: nn.Module, features: Features) -> Any:
    """Return the scores, without gradient; by the features' keys where these have some."""
    with torch.no_grad():
        scores = function(teacher, features)
    if isinstance(features, Mapping) and isinstance(scores, (list, tuple)) and len(scores) == len(features):
        return dict(zip(features, scores, strict=True))
    return scores


def resized_scores(scores: Any, features: Features) -> list[Tensor]:
    """Return the scores in the sizes of the maps, matched by key or by position."""
    keys = list(features) if isinstance(features, Mapping) else range(len(features))
    found = []
    for key in keys:
        score, size = scores[key], features[key].shape[2:]
        same = score.shape[1:] == size
        found.append(score if same else F.interpolate(score[:, None], size, mode="bilinear", align_corners=False)[:, 0])
    return found


def checked_score_function(teacher: nn.Module, function: Any) -> ScoreFunction:
    """Return the given function, or the one that knows the teacher's head."""
    if function is None:
        return find_scores(teacher)
    check_callable(function, "teacher_scores")
    return function


def _listed(features: Features) -> list[Tensor]:
    return list(features.values()) if isinstance(features, Mapping) else list(features)


def _by_cell(scores: Tensor, feature: Tensor) -> Tensor:
    """Return ``(N, H, W)`` of ``(N, H W A)``: the largest of each cell's anchors."""
    height, width = feature.shape[2:]
    return scores.unflatten(1, (height, width, -1)).amax(dim=3)
