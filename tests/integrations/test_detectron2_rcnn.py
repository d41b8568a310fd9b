"""Detectron2's example on a stand-in, a module with GeneralizedRCNN's interface; Detectron2 itself does not run."""

from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from contract import Calls, check_predictions, check_step, check_terms
from torch import nn

from examples.frameworks import detectron2_rcnn as example

ShapeSpec = namedtuple("ShapeSpec", "channels stride")
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}


class StandInBackbone(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.width, self.project = width, nn.Conv2d(3, width, 1)

    def forward(self, images):
        x = self.project(images)
        return {name: F.avg_pool2d(x, stride, ceil_mode=True) for name, stride in STRIDES.items()}

    def output_shape(self):
        return {name: ShapeSpec(self.width, stride) for name, stride in STRIDES.items()}


class StandInRCNN(nn.Module):
    """Takes a list of dicts, normalizes and pads; a dict of losses in training, a list of dicts in eval mode."""

    def __init__(self, width, pixel_mean):
        super().__init__()
        self.backbone = StandInBackbone(width)
        self.proposal_generator, self.roi_heads = nn.Conv2d(width, 1, 1), nn.Conv2d(width, 1, 1)
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), pixel_mean), persistent=False)

    @property
    def device(self):
        return self.pixel_mean.device

    def preprocess_image(self, batched_inputs):
        """(N, 3, H, W) with H and W multiples of 32."""
        images = [each["image"] - self.pixel_mean for each in batched_inputs]
        height, width = (-(-max(image.shape[side] for image in images) // 32) * 32 for side in (1, 2))
        return torch.stack([F.pad(x, (0, width - x.shape[2], 0, height - x.shape[1])) for x in images])

    def forward(self, batched_inputs):
        features = self.backbone(self.preprocess_image(batched_inputs))
        proposals, boxes = self.proposal_generator(features["p2"]), self.roi_heads(features["p3"])
        if not self.training:
            return [{"instances": (proposals[i].mean() + boxes[i])} for i in range(len(batched_inputs))]
        targets = sum(each["instances"] for each in batched_inputs)
        return {"loss_rpn_cls": proposals.square().mean(), "loss_box_reg": (boxes.mean() - targets).square()}


def batched_inputs():
    sizes = [(60, 80), (50, 90)]
    return [{"image": torch.rand(3, *size), "instances": torch.tensor(1.0), "image_id": 7} for size in sizes]


@pytest.fixture
def distiller():
    return example.make_distiller(StandInRCNN(4, 0.5), StandInRCNN(6, 0.4))


def test_stand_in_terms_of_a_padded_batch(distiller):
    inputs, backbone = batched_inputs(), Calls(distiller.student.backbone)
    losses = check_terms(
        distiller,
        lambda: distiller(inputs),
        lambda teacher: (backbone[-1][1], teacher.backbone(teacher.preprocess_image(inputs))),
    )
    assert backbone[-1][0][0].shape == (2, 3, 64, 96)
    assert set(losses) == {"loss_rpn_cls", "loss_box_reg"} | set(distiller.terms())


def test_stand_in_predictions_and_step(distiller):
    inputs = batched_inputs()
    check_predictions(distiller, lambda model: model(inputs))
    check_step(
        distiller,
        lambda: example.train(distiller, [inputs], lr=0.1),
        [distiller.teacher.proposal_generator, distiller.teacher.roi_heads],
        lambda: distiller.teacher(inputs),
    )


def test_stand_in_resumes_from_fvcores_checkpointer(distiller, tmp_path):
    """The real base of Detectron2's own checkpointer."""
    checkpoint = pytest.importorskip("fvcore.common.checkpoint")
    example.train(distiller, [batched_inputs()] * 2)
    checkpoint.Checkpointer(distiller, str(tmp_path)).save("model")
    resumed = example.make_distiller(StandInRCNN(4, 0.5), distiller.teacher)
    checkpoint.Checkpointer(resumed).load(str(tmp_path / "model.pth"))
    assert resumed.step == 2
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)
