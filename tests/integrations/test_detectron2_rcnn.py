"""Detectron2's example: on Detectron2 itself where it is installed, and on a module with its interface."""

import contextlib
import copy
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from contract import Calls, check_predictions, check_step, check_terms
from torch import nn

from examples.frameworks import detectron2_rcnn as example
from fbkd_ops import Distiller

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


class StandIn:
    """What stands in for Detectron2."""

    losses = {"loss_rpn_cls", "loss_box_reg"}
    padded = (64, 96)

    def model(self, width):
        return StandInRCNN(width, 0.4 + 0.01 * width)

    def instances(self, size):
        return torch.tensor(1.0)

    def storage(self):
        return contextlib.nullcontext()

    def predicted(self, output):
        return [each["instances"] for each in output]


class Real:
    """Detectron2's Faster R-CNN with a ResNet-18, at random weights."""

    losses = {"loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"}
    padded = (64, 96)

    def __init__(self):
        pytest.importorskip("detectron2")

    def config(self, width):
        from detectron2 import model_zoo
        from detectron2.config import get_cfg

        config = get_cfg()
        config.merge_from_file(model_zoo.get_config_file("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
        config.MODEL.DEVICE, config.MODEL.WEIGHTS = "cpu", ""
        config.MODEL.RESNETS.DEPTH, config.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
        config.MODEL.FPN.OUT_CHANNELS, config.MODEL.ROI_HEADS.NUM_CLASSES = width, 3
        config.MODEL.ROI_BOX_HEAD.FC_DIM, config.MODEL.BACKBONE.FREEZE_AT = 16, 0
        return config

    def model(self, width):
        from detectron2.modeling import build_model

        return build_model(self.config(width))

    def instances(self, size):
        from detectron2.structures import Boxes, Instances

        boxes, classes = Boxes(torch.tensor([[3.0, 4, 30, 40]])), torch.tensor([1])
        return Instances(size, gt_boxes=boxes, gt_classes=classes)

    def storage(self):
        from detectron2.utils.events import EventStorage

        return EventStorage()

    def predicted(self, output):
        return [each["instances"].pred_boxes.tensor for each in output]


@pytest.fixture(params=[StandIn, Real], ids=["stand-in", "Detectron2"])
def framework(request):
    torch.manual_seed(0)
    found = request.param()
    with found.storage():
        yield found


@pytest.fixture
def distiller(framework):
    return example.make_distiller(framework.model(4), framework.model(6))


@pytest.fixture
def inputs(framework):
    sizes = [(60, 80), (50, 90)]
    return [
        {"image": 255 * torch.rand(3, *size), "instances": framework.instances(size), "image_id": 7} for size in sizes
    ]


def images(teacher, inputs):
    """The teacher's own, as it normalizes and pads them."""
    found = teacher.preprocess_image(inputs)
    return getattr(found, "tensor", found)


def test_terms_of_a_padded_batch(framework, distiller, inputs):
    backbone = Calls(distiller.student.backbone)
    losses = check_terms(
        distiller,
        lambda: distiller(inputs),
        lambda teacher: (backbone[-1][1], teacher.backbone(images(teacher, inputs))),
    )
    assert backbone[-1][0][0].shape == (2, 3, *framework.padded)
    assert set(losses) == framework.losses | set(distiller.terms())


def test_predictions_and_step(framework, distiller, inputs):
    check_predictions(distiller, lambda model: framework.predicted(model(inputs)))
    check_step(
        distiller,
        lambda: example.train(distiller, [inputs], lr=0.001),
        [distiller.teacher.proposal_generator, distiller.teacher.roi_heads],
        lambda: distiller.teacher(inputs),
    )


def test_fvcores_checkpointer_resumes(framework, distiller, inputs, tmp_path):
    """The real base of Detectron2's own checkpointer."""
    checkpoint = pytest.importorskip("fvcore.common.checkpoint")
    example.train(distiller, [inputs] * 2, lr=0.001)
    checkpoint.Checkpointer(distiller, str(tmp_path)).save("model")
    resumed = example.make_distiller(framework.model(4), distiller.teacher)
    checkpoint.Checkpointer(resumed).load(str(tmp_path / "model.pth"))
    assert resumed.step == 2
    for name, value in distiller.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value)


def test_layers_are_found(framework, inputs, capsys):
    distiller = Distiller.for_model(framework.model(4), framework.model(6), preset="two_stage", share_every=1).train()
    levels = ", ".join(f"'p{level}': 4 channels, stride {2**level}" for level in range(2, 7))
    assert f"student: Detectron2 detector, at 'backbone': {levels}\n" in capsys.readouterr().out
    assert distiller.student_levels == ["p2", "p3", "p4", "p5", "p6"]
    for _ in range(2):
        sum(distiller(inputs).values()).backward()
    assert float(distiller.share.share) > 0


def test_detectron2s_own_trainer(tmp_path):
    """As the example says: a ``DefaultTrainer`` whose ``build_model`` returns the distiller."""
    real = Real()
    from detectron2.data import build_detection_train_loader
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import inference_on_dataset

    torch.manual_seed(0)
    config, teacher = real.config(4), real.model(6)
    inputs = [
        {"image": 255 * torch.rand(3, 60, 80), "instances": real.instances((60, 80)), "height": 60, "width": 80}
        for _ in range(4)
    ]
    config.OUTPUT_DIR, config.SOLVER.MAX_ITER, config.SOLVER.CHECKPOINT_PERIOD = str(tmp_path), 4, 2
    config.SOLVER.BASE_LR, config.TEST.EVAL_PERIOD = 0.001, 0

    class Trainer(DefaultTrainer):
        @classmethod
        def build_model(cls, config):
            return example.make_distiller(real.model(4), teacher)

        @classmethod
        def build_train_loader(cls, config):
            return build_detection_train_loader(inputs, mapper=copy.copy, total_batch_size=2, num_workers=0)

        def build_hooks(self):
            return [hook for hook in super().build_hooks() if type(hook).__name__ != "EvalHook"]

    trainer = Trainer(config)
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.model.step == 4 and not trainer.model.teacher.training
    inference_on_dataset(trainer.model, [inputs], evaluator=None)
    resumed = Trainer(config)
    resumed.resume_or_load(resume=True)
    for name, value in trainer.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value)
