"""torchvision's Faster R-CNN as its example distils it."""

import pytest

pytest.importorskip("torchvision")

from torchvision_models import (  # noqa: E402
    RANDOM_SIZES,
    check_torchvision_predictions,
    check_torchvision_step,
    check_torchvision_terms,
)

from examples.frameworks import torchvision_faster_rcnn as example  # noqa: E402

OWN = {"loss_classifier", "loss_box_reg", "loss_objectness", "loss_rpn_box_reg"}


@pytest.fixture
def distiller():
    return example.make_distiller(*example.build(3, weights_backbone=None, **RANDOM_SIZES))


def test_faster_rcnn_terms_at_random_sizes(distiller):
    assert len(check_torchvision_terms(distiller, OWN)) > 1


def test_faster_rcnn_predictions_and_step(distiller):
    check_torchvision_predictions(distiller)
    check_torchvision_step(distiller, example.train, ["rpn", "roi_heads"])
