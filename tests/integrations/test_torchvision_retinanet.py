"""torchvision's RetinaNet as its example distils it."""

import pytest

pytest.importorskip("torchvision")

from torchvision_models import (  # noqa: E402
    RANDOM_SIZES,
    check_torchvision_predictions,
    check_torchvision_step,
    check_torchvision_terms,
)

from examples.frameworks import torchvision_retinanet as example  # noqa: E402

OWN = {"classification", "bbox_regression"}


@pytest.fixture
def distiller():
    return example.make_distiller(*example.build(3, weights_backbone=None, **RANDOM_SIZES))


def test_retinanet_terms_at_random_sizes(distiller):
    assert len(check_torchvision_terms(distiller, OWN)) > 1


def test_retinanet_predictions_and_step(distiller):
    check_torchvision_predictions(distiller)
    check_torchvision_step(distiller, example.train, ["head"])
