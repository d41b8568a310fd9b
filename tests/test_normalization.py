"""A student and a teacher that normalise their images differently: when that is warned of, and when it is right."""

import re
import warnings

import pytest
import torch
from detectors import Backbone, Detector, images, make_distiller
from torch import Tensor, nn

from fbkd_ops import Distiller, FBKDLoss, Renormalize, TeacherImagesWarning

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
HALVES = ([0.5] * 3, [0.5] * 3)
TARGETS = torch.tensor(1.0)


def scaled(side, unit=255.0):
    return tuple([unit * value for value in values] for values in side)


class Transform(nn.Module):
    """Torchvision's: a part of the detector, before its backbone."""

    def __init__(self, side):
        super().__init__()
        self.image_mean, self.image_std = side

    def forward(self, x: Tensor) -> Tensor:
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (self.image_mean, self.image_std))
        return (x - mean) / std


class Whole(Detector):
    def __init__(self, width: int, side):
        super().__init__(width)
        self.transform = Transform(side)

    def forward(self, x, targets=None):
        return super().forward(self.transform(x), targets)


def torchvision(width, side):
    return Whole(width, side)


def detectron2(width, side):
    model = Detector(width)
    for name, values in zip(("pixel_mean", "pixel_std"), scaled(side), strict=True):
        model.register_buffer(name, torch.tensor(values).view(3, 1, 1))
    return model


def timm(width, side):
    model = Detector(width)
    model.backbone.pretrained_cfg = {"mean": tuple(side[0]), "std": tuple(side[1])}
    return model


def mmdet(width, side, flips=False):
    model = Detector(width)
    model.data_preprocessor = preprocessor = nn.Module()
    preprocessor._enable_normalize, preprocessor._channel_conversion = side is not None, flips
    if side is not None:
        for name, values in zip(("mean", "std"), scaled(side), strict=True):
            preprocessor.register_buffer(name, torch.tensor(values).view(3, 1, 1), False)
    return model


def without(width, side):
    return Detector(width)


def found(student: nn.Module, teacher: nn.Module, **arguments) -> list[str]:
    """The warnings of two training steps."""
    loss = FBKDLoss(4, 6, num_levels=2)
    distiller = Distiller(student, teacher, loss, student_layers="backbone", **arguments)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            distiller(images(), TARGETS)
    return [str(each.message) for each in caught if each.category is TeacherImagesWarning]


# How the student and the teacher say it, the teacher's entry, and what the warning says of it.
DIFFERENT = {
    "timm": (
        timm,
        timm,
        None,
        "with mean .0.485, 0.456, 0.406.* trained with mean .0.5, 0.5, 0.5.*backbone.pre",
    ),
    "timm, entry": (timm, timm, "backbone", "trained with mean"),
    "mmdet": (mmdet, mmdet, None, r"with mean \(123.7, .*0\.\.255 .*trained with mean \(127.5"),
    "the entry skips it": (
        torchvision,
        torchvision,
        "backbone",
        "with mean .0.485.*transform.image_mean.*trained with",
    ),
    "detectron2's entry": (detectron2, detectron2, "backbone", r"mean \(123.7.*pixel_mean.*trained with mean \(127.5"),
    "twice": (timm, torchvision, None, "normalised already, with mean .0.485.*once more, with mean .0.5"),
    "never": (torchvision, timm, None, "as they are, for the student normalises them inside"),
    "of two frameworks": (mmdet, timm, None, r"123.7.*0\.\.255.*trained with mean \(0.5.*0\.\.1 "),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_different_images_are_warned_of_once(case):
    student, teacher, entry, message = DIFFERENT[case]
    arguments = dict(student=student(4, IMAGENET), teacher=teacher(6, HALVES), teacher_entry=entry)
    (text,) = found(**arguments)
    assert re.search(f"{message}.*teacher_input=", text), text
    renormalize = Renormalize(student=IMAGENET, teacher=HALVES)
    assert found(student(4, IMAGENET), teacher(6, HALVES), teacher_entry=entry, teacher_input=renormalize) == []


RIGHT = {
    "each normalises raw images": (torchvision, torchvision, None),
    "each normalises raw ones of its unit": (torchvision, detectron2, None),
    "the student says nothing": (without, timm, None),
    "the teacher says nothing": (timm, without, None),
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_right_or_unknown_is_not(case):
    student, teacher, entry = RIGHT[case]
    assert found(student(4, IMAGENET), teacher(6, HALVES), teacher_entry=entry) == []


@pytest.mark.parametrize("kind", [torchvision, detectron2, timm, mmdet])
def test_the_same_images_are_right_wherever_the_teacher_starts(kind):
    for entry in (None, "backbone"):
        assert found(kind(4, IMAGENET), kind(6, IMAGENET), teacher_entry=entry) == []


def test_units_and_rounding_are_no_difference():
    rounded = ([0.4851, 0.4560, 0.4059], [0.229, 0.2240, 0.2249])
    assert found(mmdet(4, IMAGENET), timm(6, rounded)) == []


def test_an_entry_that_normalises_by_itself_is_given_raw_images():
    class Holder(nn.Module):
        def __init__(self, width, side):
            super().__init__()
            self.detector = Whole(width, side)

        def forward(self, *args):
            return self.detector(*args)

    arguments = dict(teacher_entry="detector")
    loss = FBKDLoss(4, 6, num_levels=2)
    layers = dict(student_layers="detector.backbone")
    distiller = Distiller(Holder(4, IMAGENET), Holder(6, HALVES), loss, **layers, **arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TeacherImagesWarning)
        distiller(images(), TARGETS)


def test_the_order_of_channels_and_no_mean_count_in_mmdetection():
    (text,) = found(mmdet(4, IMAGENET), mmdet(6, IMAGENET, flips=True))
    assert "channels reversed" in text
    (text,) = found(mmdet(4, IMAGENET), mmdet(6, None))
    assert "data_preprocessor without a mean" in text
    assert found(mmdet(4, None), mmdet(6, None)) == []


def test_evaluation_and_numbers_without_values_say_nothing():
    distiller = make_distiller()
    assert isinstance(distiller.student.backbone, Backbone)
    distiller.student.backbone.pretrained_cfg = {"mean": (0.1,) * 3, "std": (1.0,) * 3}
    distiller.teacher.register_buffer("pixel_mean", torch.zeros(3, device="meta"))
    distiller.teacher.register_buffer("pixel_std", torch.zeros(3, device="meta"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", TeacherImagesWarning)
        distiller.eval()(images())
        distiller.train()(images(), TARGETS)
