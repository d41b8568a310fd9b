"""A small detector for the tests of taps, distillers and integrations."""

import torch
from helpers import randomise
from torch import Tensor, nn

from fbkd_ops import Distiller, FBKDLoss

TERMS = set(FBKDLoss.term_names)


class Backbone(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.down = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = self.stem(x).relu()
        return {"fine": fine, "coarse": self.down(fine)}


class Detector(nn.Module):
    """Losses in training, a prediction in eval."""

    def __init__(self, width: int = 4, form: str = "dict"):
        super().__init__()
        self.backbone, self.head = Backbone(width), nn.Conv2d(width, 1, 1)
        self.dropout, self.form = nn.Dropout(0.5), form

    def forward(self, images: Tensor, targets=None):
        prediction = self.head(self.dropout(self.backbone(images)["coarse"]))
        if not self.training:
            return prediction
        loss = (prediction.mean() - targets).square()
        losses = {"dict": {"loss_box": loss, "loss_cls": 2 * loss}, "list": [loss, 2 * loss], "scalar": loss}
        return losses[self.form]


def make_distiller(form: str = "dict", layers="backbone", **arguments) -> Distiller:
    """Another width on each side, and weights of the loss with which every parameter has a gradient."""
    loss = randomise(FBKDLoss(4, 6, num_levels=2))
    return Distiller(Detector(4, form), Detector(6), loss, student_layers=layers, **arguments)


def images(batch: int = 2, size: int = 8) -> Tensor:
    return torch.randn(batch, 3, size, size)
