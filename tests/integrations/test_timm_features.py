"""timm's backbones, also one with channels last, as their example distils them."""

import pytest
import torch
from torch import nn

pytest.importorskip("timm")

from contract import Calls, check_predictions, check_step, check_terms  # noqa: E402

from examples.frameworks import timm_features as example  # noqa: E402


class Detector(nn.Module):
    """A user's own: it predicts one map, and returns its loss in training."""

    def __init__(self, name, **arguments):
        super().__init__()
        self.backbone = example.backbone(name, **arguments)
        self.head = nn.LazyConv2d(1, 1)

    def forward(self, images, targets=None):
        last = self.backbone(images)[-1]
        prediction = self.head(
            last if self.backbone.feature_info.channels()[-1] == last.shape[1] else last.movedim(-1, 1)
        )
        return (prediction.mean() - targets).square() if self.training else prediction


IMAGES, TARGETS = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor(1.0)
SMALL_SWIN = dict(img_size=64, embed_dim=24, depths=(1, 1, 1, 1), num_heads=(1, 2, 3, 4))


@pytest.fixture(params=["resnet18", "mobilenetv3_small_050"])
def distiller(request):
    student, teacher = Detector(request.param), Detector("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    for model in (student, teacher):
        model.eval()(IMAGES)
    return example.make_distiller(student, teacher)


def test_timm_terms_of_channels_last_features(distiller):
    backbone = Calls(distiller.student.backbone)
    own = []
    distiller.student.register_forward_hook(lambda module, inputs, output: own.append(output))
    total = check_terms(
        distiller,
        lambda: distiller(IMAGES, TARGETS),
        lambda teacher: (backbone[-1][1], [level.movedim(-1, 1) for level in teacher.backbone(IMAGES)]),
    )
    assert [level.teacher_channels for level in distiller.loss.levels] == [24, 48, 96, 192]
    torch.testing.assert_close(total, own[0] + sum(distiller.terms().values()))


def test_timm_predictions_and_step(distiller):
    check_predictions(distiller, lambda model: model(IMAGES))
    check_step(
        distiller,
        lambda: example.train(distiller, [(IMAGES, TARGETS)], lr=0.01),
        [distiller.teacher.head],
        lambda: distiller.teacher(IMAGES),
    )
