"""Two Faster R-CNNs of one design and different size, for small pictures and without pretrained weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torchvision.models import get_model
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead

ANCHOR_SIDES = (0.25, 0.35, 0.5, 0.7)  # of the picture, one a level


@dataclass(frozen=True)
class DetectorConfig:
    """A torchvision trunk, the stages (name, width) that feed the pyramid, and the widths behind them."""

    name: str
    trunk: str
    stages: tuple[tuple[str, int], ...]
    pyramid_width: int
    head_width: int


TEACHER = DetectorConfig("ResNet-18", "resnet18", (("layer1", 64), ("layer2", 128), ("layer3", 256)), 64, 256)
STUDENT = DetectorConfig(
    "ShuffleNetV2 x0.5", "shufflenet_v2_x0_5", (("maxpool", 24), ("stage2", 48), ("stage3", 96)), 32, 128
)


def build_detector(config: DetectorConfig, num_classes: int, image_size: int, seed: int) -> FasterRCNN:
    """A detector of `num_classes` classes beside the background; the same `seed` gives the same weights.

    The pyramid has strides 4, 8, 16 and 32. Numbers of proposals are far below torchvision's, which are meant for
    pictures of 800 pixels.
    """
    torch.manual_seed(seed)
    return FasterRCNN(
        build_backbone(config),
        min_size=image_size,
        max_size=image_size,
        rpn_anchor_generator=build_anchors(ANCHOR_SIDES, image_size),
        rpn_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=200,
        rpn_pre_nms_top_n_test=200,
        rpn_post_nms_top_n_train=100,
        rpn_post_nms_top_n_test=100,
        box_batch_size_per_image=32,
        box_positive_fraction=0.5,
        box_head=TwoMLPHead(config.pyramid_width * 7**2, config.head_width),
        box_predictor=FastRCNNPredictor(config.head_width, num_classes + 1),
        box_detections_per_img=50,
    )


def build_backbone(config: DetectorConfig) -> BackboneWithFPN:
    """The trunk and the pyramid behind it, with random weights."""
    return BackboneWithFPN(
        get_model(config.trunk, weights=None),
        return_layers={name: str(level) for level, (name, _) in enumerate(config.stages)},
        in_channels_list=[width for _, width in config.stages],
        out_channels=config.pyramid_width,
    )


def build_anchors(sides: tuple[float, ...], image_size: int) -> AnchorGenerator:
    """Anchors of one side, a part of the picture's, and three shapes on each level."""
    return AnchorGenerator(
        sizes=tuple((round(side * image_size),) for side in sides), aspect_ratios=((0.5, 1.0, 2.0),) * len(sides)
    )


def count_parameters(module: nn.Module) -> int:
    """How many numbers `module` learns."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
