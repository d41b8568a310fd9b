"""A detector and a transformer as teachers of torchvision's Faster R-CNN, as their example has them."""

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("timm")

from test_vit_teacher import TINY  # noqa: E402
from torchvision_models import batch  # noqa: E402

from examples.teachers import two_teachers as example  # noqa: E402


def test_two_teachers_terms_and_step():
    torch.manual_seed(0)
    student, teachers = example.build(3, **TINY)
    student.transform.min_size, student.transform.max_size = (64,), 96
    distiller = example.make_distiller(student, teachers)
    before = {name: {key: value.clone() for key, value in each.state_dict().items()} for name, each in teachers.items()}
    example.train(distiller, [batch(), batch()])
    assert {name.rsplit("_", 1)[0] for name in distiller.terms()} == {"loss_fbkd", "loss"}
    assert all(torch.isfinite(term) and term > 0 for term in distiller.terms().values())
    assert (
        distiller.weights()["fbkd_gradient_share_vit"] > 0 and distiller.weights()["fbkd_gradient_share_detector"] > 0
    )
    for name, teacher in teachers.items():
        assert all(torch.equal(value, before[name][key]) for key, value in teacher.state_dict().items())
