"""A transformer of timm as the teacher of torchvision's Faster R-CNN, as its example has it."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from contract import Calls  # noqa: E402
from torchvision_models import batch  # noqa: E402

from examples.teachers import vit_teacher as example  # noqa: E402

TINY = dict(weights_backbone=None, vit="vit_tiny_patch16_224", pretrained=False)


def test_vit_teacher_terms_and_step():
    torch.manual_seed(0)
    student, teacher = example.build(3, **TINY)
    student.transform.min_size, student.transform.max_size = (64, 96), 128
    distiller = example.make_distiller(student, teacher)
    backbone, before = Calls(student.backbone), student.backbone.fpn.layer_blocks[1][0].weight.clone()
    for _ in range(3):
        example.train(distiller, [batch()])
        ((images,), levels) = backbone[-1]
        with torch.no_grad():
            (expected,) = teacher(images)
        assert expected.shape[2:] == levels["2"].shape[2:]  # the cells of stride 16
    _, students, teachers = distiller.run(*batch())
    assert [x.shape[2:] for x in students] == [x.shape[2:] for x in teachers]
    assert list(distiller.terms()) == ["loss_pkd"] and distiller.terms()["loss_pkd"] > 0
    assert not torch.equal(before, student.backbone.fpn.layer_blocks[1][0].weight)
    assert int(distiller.share.measured) > 0
