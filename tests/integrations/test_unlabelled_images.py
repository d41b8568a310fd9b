"""Images without labels in torchvision's Faster R-CNN, as their example has them."""

import pytest
import torch

pytest.importorskip("torchvision")

from contract import Calls  # noqa: E402
from torchvision_models import RANDOM_SIZES, batch  # noqa: E402

from examples.teachers import unlabelled_images as example  # noqa: E402


def test_unlabelled_images_step():
    torch.manual_seed(0)
    distiller = example.make_distiller(*example.build(3, weights_backbone=None, **RANDOM_SIZES))
    backbones = [Calls(model.backbone) for model in (distiller.student, distiller.teacher)]
    heads = [Calls(distiller.student.rpn), Calls(distiller.student.roi_heads)]
    others = [torch.rand(3, 50, 70), torch.rand(3, 60, 60)]
    example.train(distiller, [batch()] * 2, [others] * 2)
    assert [len(calls) for calls in backbones] == [4, 4] and [len(calls) for calls in heads] == [2, 2]
    assert distiller.step == 2
    student, teacher = (calls[-1][0][0] for calls in backbones)
    assert torch.equal(student, teacher)  # both see the images as the student resized them
