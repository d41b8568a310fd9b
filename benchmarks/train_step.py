"""The suite ``train_step``: a whole step of a detector, forward and backward, without and with distillation.

torchvision's Faster R-CNN with a ResNet-50 learns from one with a ResNet-101, both at random weights. All peers run the
same detector and the same teacher; only the loss between their features differs. That loss is checked in the suite
``fbkd_loss``; a detector's own result is random (it samples proposals) and is not. In 16 bits a step runs under
autocast.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fbkd_ops
from benchmarks.inputs import FINEST_STRIDE, LAYOUTS, LEVELS, Case, Implementation, Suite
from benchmarks.loss_suites import STRIDES, loss_of, their_loss_of
from benchmarks.mmrazor import NotInstalledError

CLASSES, BOXES = 91, 8
LEVEL_NAMES = ("0", "1", "2", "3")  # P2..P5; torchvision's fifth has no counterpart in the preset


def make_detector(case: Case, depth: int) -> nn.Module:
    """At the same random weights for all."""
    torch.manual_seed(0)
    try:
        from torchvision.models.detection import FasterRCNN
        from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
    except ModuleNotFoundError as error:
        raise NotInstalledError("not installed: pip install torchvision") from error

    height, width = (FINEST_STRIDE * side for side in case.shape[2:])
    backbone = resnet_fpn_backbone(backbone_name=f"resnet{depth}", weights=None, trainable_layers=5)
    size = dict(min_size=min(height, width), max_size=max(height, width))
    detector = FasterRCNN(backbone, num_classes=CLASSES, **size)
    return detector.to(case.device, case.parameter_dtype, memory_format=LAYOUTS[case.layout])


def images_of(case: Case) -> list[Tensor]:
    n, _, height, width = case.shape
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(n, 3, FINEST_STRIDE * height, FINEST_STRIDE * width, generator=generator)
    return list(images.to(case.device, case.parameter_dtype))


def _targets(images: tuple[Tensor, ...]) -> list[dict[str, Tensor]]:
    """Boxes of a quarter of each side in a row from the top left corner to the bottom right one."""
    targets = []
    for image in images:
        height, width = image.shape[1:]
        corners = torch.linspace(0, 0.75, BOXES, device=image.device)[:, None]
        scale = torch.tensor([width, height] * 2, device=image.device)
        boxes = torch.cat([corners, corners, corners + 0.25, corners + 0.25], dim=1) * scale
        targets.append({"boxes": boxes, "labels": torch.arange(1, BOXES + 1, device=image.device)})
    return targets


class Step(nn.Module):
    """The sum of all losses of a step; ``detector`` is a student alone or in a distiller."""

    def __init__(self, detector: nn.Module, case: Case):
        super().__init__()
        self.detector, self.device = detector.train(), case.device
        self.dtype = getattr(torch, case.dtype)

    def forward(self, *images: Tensor) -> Tensor:
        with torch.autocast(self.device, self.dtype, enabled=self.dtype.itemsize == 2):
            return sum(self.detector(list(images), _targets(images)).values())


class TheirTerms(nn.Module):
    """MMRazor's scalar loss as a distiller takes it."""

    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, students: list[Tensor], teachers: list[Tensor]) -> dict[str, Tensor]:
        return {"loss_mmrazor": self.loss(students, teachers)}


def _alone(case: Case) -> Implementation:
    return Step(make_detector(case, 50), case)


def _distilled(make_loss: Callable[[Case], nn.Module]) -> Callable[[Case], Implementation]:
    def made(case: Case) -> Implementation:
        places: dict[str, Any] = dict(student_layers="backbone", teacher_entry="backbone")
        levels = dict(student_levels=LEVEL_NAMES, teacher_levels=LEVEL_NAMES)
        models = make_detector(case, 50), make_detector(case, 101)
        loss = make_loss(case).to(case.parameter_dtype)
        return Step(fbkd_ops.Distiller(*models, loss, **places, **levels), case)

    return made


def _compiled(case: Case) -> nn.Module:
    return TheirTerms(torch.compile(their_loss_of(case), dynamic=False))


TRAIN_STEP = Suite(
    "relation_loss",
    images_of,
    {
        "no_distillation": _alone,
        "mmrazor": _distilled(lambda case: TheirTerms(their_loss_of(case))),
        "compile": _distilled(_compiled),
        "fbkd_ops": _distilled(loss_of),
    },
    cost=None,
    cases=(Case((1, LEVELS["P2"][1], 80, 128), strides=STRIDES),),
    brief=(Case((1, LEVELS["P2"][1], 48, 64), strides=STRIDES),),
    not_in_brief=("compile",),
    strides=lambda shape: STRIDES,
    checked_as="fbkd_loss",
    states=("default", "fresh"),
    capturable=False,
)
