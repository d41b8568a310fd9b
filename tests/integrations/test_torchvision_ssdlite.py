"""torchvision's SSDlite as its example distils it: six levels of different widths, the last one of a single pixel."""

import pytest
import torch

pytest.importorskip("torchvision")

from torchvision.models import mobilenet_v3_small  # noqa: E402
from torchvision.models.detection import ssdlite320_mobilenet_v3_large  # noqa: E402
from torchvision_models import (  # noqa: E402
    batch,
    check_torchvision_predictions,
    check_torchvision_step,
    check_torchvision_terms,
)

from examples.frameworks import torchvision_ssdlite as example  # noqa: E402
from fbkd_ops import _validation  # noqa: E402

OWN = {"classification", "bbox_regression"}
WIDTHS = [672, 480, 512, 256, 256, 128]


def ssdlite():
    return ssdlite320_mobilenet_v3_large(num_classes=3, weights=None, weights_backbone=None)


def small_ssdlite():
    """With the trunk of a MobileNetV3-Small, which torchvision has no function for."""
    from torchvision.models.detection import _utils, ssdlite

    model = ssdlite320_mobilenet_v3_large(num_classes=3, weights=None, weights_backbone=None)
    norm = torch.nn.BatchNorm2d
    model.backbone = ssdlite._mobilenet_extractor(mobilenet_v3_small(weights=None), 6, norm)
    widths = _utils.retrieve_out_channels(model.backbone, (320, 320))
    model.head = ssdlite.SSDLiteHead(widths, model.anchor_generator.num_anchors_per_location(), 3, norm)
    return model


@pytest.fixture
def distiller():
    return example.make_distiller(small_ssdlite(), ssdlite())


def test_ssdlite_terms_of_six_levels(distiller):
    levels = distiller.loss.levels
    assert [level.teacher_channels for level in levels] == WIDTHS
    assert [level.student_channels for level in levels][:2] != WIDTHS[:2]
    assert check_torchvision_terms(distiller, OWN, steps=1) == {(320, 320)}


def test_ssdlite_predictions_and_step(distiller):
    check_torchvision_predictions(distiller)
    check_torchvision_step(distiller, example.train, ["head"])


def test_ssdlite_warns_of_strides_larger_than_a_map(distiller, monkeypatch):
    monkeypatch.setattr(_validation, "_warned_of_clamping", False)
    with pytest.warns(UserWarning, match="stride 2 is larger than a map of 1x1 pixels"):
        distiller.train()(*batch())


def test_ssdlite_refuses_one_image_as_torchvision_does(distiller):
    images, targets = (each[:1] for each in batch())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        distiller.train()(images, targets)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        ssdlite().train()(images, targets)
