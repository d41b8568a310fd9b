"""Two detectors of one design, whose pyramids and heads have the same shapes, so that a student can inherit them."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from torchvision.models.detection import RetinaNet

from examples.demo.detectors import STUDENT, TEACHER, build_anchors, build_backbone, build_detector

PYRAMID_WIDTH, HEAD_WIDTH = 32, 128
CONFIGS = {
    role: dataclasses.replace(config, pyramid_width=PYRAMID_WIDTH, head_width=HEAD_WIDTH)
    for role, config in (("teacher", TEACHER), ("student", STUDENT))
}
ANCHOR_SIDES = (0.22, 0.32, 0.45, 0.7)  # of the picture, one a level


def faster_rcnn(role: str, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Return the demo's Faster R-CNN for ``num_classes`` classes, whose weights depend on the seed alone."""
    return build_detector(CONFIGS[role], num_classes, image_size, seed)


def retinanet(role: str, num_classes: int, image_size: int, seed: int) -> nn.Module:
    """Return a RetinaNet of ``num_classes`` classes, whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return RetinaNet(
        build_backbone(CONFIGS[role]),
        num_classes + 1,
        min_size=image_size,
        max_size=image_size,
        anchor_generator=build_anchors(ANCHOR_SIDES, image_size),
        topk_candidates=100,
        detections_per_img=50,
    )


DETECTORS = {"faster_rcnn": faster_rcnn, "retinanet": retinanet}
